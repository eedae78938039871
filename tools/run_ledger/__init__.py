"""What `tools/runs.py` is made of: it reads run folders and changes nothing in them."""
