"""What `tools/supervise.py` is made of. No torch and nothing of ours: it must live where the trainer dies."""
