"""Parts of `compile_kernels.py`."""
