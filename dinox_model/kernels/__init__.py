"""The network's fast kernels, one file each: the reference in torch and the Triton kernel side by side.

Importing a file of this package needs torch only. Where Triton is missing, its reference still runs, and `dispatch.py`
chooses it. Nothing is tuned while training: tiles come from `tiles.json`.
"""
