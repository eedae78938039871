"""Features of CT volumes by a network: where windows come from, what encodes them, where features go."""
