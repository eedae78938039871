"""What one uploads of a run: networks, card, lineage, evaluation; and what may be uploaded at all."""
