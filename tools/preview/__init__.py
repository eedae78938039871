"""Pictures of a set of shards for people to look at: a contact sheet a volume, and a page of random windows."""
