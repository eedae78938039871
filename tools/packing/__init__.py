"""What the packing commands share."""
