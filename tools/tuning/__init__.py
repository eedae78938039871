"""Fine-tuning a network for a task of the probe, and how it compares with the frozen one by the same folds."""
