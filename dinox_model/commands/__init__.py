"""The commands of `python -m dinox_model`, a file each.

`add_to(subparsers)` declares one, and names the function that runs it.
"""
