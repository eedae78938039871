"""Objectives: pure functions of tensors. Sums over ranks go through a callable of the caller's."""
