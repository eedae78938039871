"""Whether pretraining learns anything on the phantom: runs by seed and by loss term, probed on held-out patients."""
