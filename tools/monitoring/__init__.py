"""A look at a run from outside: which slices, what its checkpoints make of them, pictures, and when it is over."""
