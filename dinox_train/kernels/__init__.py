"""Fast forms of what the objective, the views and the optimizer compute, one file each; their references are the plain
files of `dinox_train`.
"""
