"""Counts the memory that tensors take, from each storage's birth to its death, at any moment of a computation.

It sees what torch's operators return, on real tensors and on fake ones (torch's `FakeTensorMode`: shapes without
memory), also in the backward pass. It does not see what an operator takes for itself and gives back before it returns,
nor what an allocator rounds up.

Invariant: the bytes of all owners add up to `live`, and those of `at_peak` to `peak`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WEIGHT_CASTS = "casts of weights"
"""Owner of what autocast makes of weights: kept until the backward where they have gradients."""


class StorageMeter(TorchDispatchMode):
    """A context. Within it, each new storage belongs to the owner of the innermost `owner(name)`."""

    def __init__(self) -> None:
        super().__init__()
        self.live: int = 0
        """Bytes of all storages that are alive, each counted once."""
        self.peak: int = 0
        """The most that `live` has been."""
        self.by_owner: Counter[str] = Counter()
        """`live`, shared out."""
        self.at_peak: Counter[str] = Counter()
        """`peak`, shared out: `by_owner` at the first moment of the peak."""
        self._owner = "other"
        self._known: dict[int, tuple[str, int, weakref.ref[torch.UntypedStorage]]] = {}
        self._cast: set[int] = set()

    @contextmanager
    def owner(self, name: str) -> Iterator[None]:
        """What is born within belongs to `name`; once dead, it belongs to nobody."""
        before, self._owner = self._owner, name
        try:
            yield
        finally:
            self._owner = before

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of `tensors` that are not known yet, as born now: for those made outside the context."""
        for tensor in tensors:
            self._see(tensor, self._owner)
        self._keep_peak()

    def watch_casts(self, weights: Iterable[Tensor]) -> None:
        """Casts of these to another dtype will belong to `WEIGHT_CASTS`, whoever makes them."""
        self._cast |= {weight.untyped_storage()._cdata for weight in weights}

    def give(self, tensor: Tensor, owner: str) -> None:
        """From now on the storage of `tensor` belongs to `owner`. Raises KeyError for one that was never seen."""
        key = tensor.untyped_storage()._cdata
        before, size, alive = self._known[key]
        self._known[key] = owner, size, alive
        self.by_owner[before] -= size
        self.by_owner[owner] += size

    def forget_peak(self) -> None:
        """From now on the peak is what is alive, until more is."""
        self.peak, self.at_peak = self.live, Counter(self.by_owner)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        owner = self._owner
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._cast:
            owner = WEIGHT_CASTS
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(tensor, owner)
        self._keep_peak()
        return output

    def _see(self, tensor: Tensor, owner: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = owner, size, weakref.ref(storage, lambda _: self._forget(key))
        self.live += size
        self.by_owner[owner] += size

    def _forget(self, key: int) -> None:
        owner, size, _ = self._known.pop(key)
        self.live -= size
        self.by_owner[owner] -= size

    def _keep_peak(self) -> None:
        if self.live > self.peak:
            self.forget_peak()
