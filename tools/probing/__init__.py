"""What a network's frozen features are worth: the protocol of docs/evaluation.md, and what holds a probe to it."""
