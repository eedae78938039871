"""transformers' DINOv3ViTModel as a contender: forward, and forward with backward. Runs in the peers' interpreter.

Its settings, weights and input come from network_case.py. Attention is torch's scaled_dot_product_attention, and
nothing is compiled. In evaluation form: in training form it would move its coordinates at random.
Invariant: nothing of dinox is imported.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peak_memory import peak_bytes, wait
from peer_transformers import transformers as load_transformers
from timing import Prepared, Setup

PACKAGES = ("torch", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Of the peers' packages."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


class _Peer:
    def __init__(self, folder: str, settings: dict[str, Any], precision: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.folder, self.precision, self.device = Path(folder), precision, torch.device(device)
        transformers = load_transformers()
        model: Any = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**settings, attn_implementation="sdpa"))
        if model.config._attn_implementation != "sdpa":
            raise RuntimeError("transformers did not take torch's scaled_dot_product_attention")
        with np.load(self.folder / "weights.npz", allow_pickle=False) as weights:
            own = {name.removeprefix("model."): name for name in model.state_dict()}
            model.load_state_dict({own[name]: torch.from_numpy(weights[name]) for name in weights.files})
        self.model = model.eval().to(self.device)
        self.x = torch.from_numpy(np.load(self.folder / "input.npy", allow_pickle=False)).to(self.device)
        self.gradient: torch.Tensor | None = None

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision != "fp32")

    def forward(self) -> float:
        with torch.no_grad(), self.autocast():
            self.model(self.x)
        wait(self.device)
        return len(self.x)

    def both(self) -> float:
        self.model.zero_grad(set_to_none=True)
        with self.autocast():
            hidden = self.model(self.x).last_hidden_state
        if self.gradient is None:
            self.gradient = torch.ones_like(hidden)
        hidden.backward(self.gradient)
        wait(self.device)
        return len(self.x)

    def answers(self) -> None:
        """Write what is to be compared: fp32 features, and a gradient that has been through all blocks."""
        hidden = self.model(self.x).last_hidden_state
        hidden.sum().backward()
        bias = self.model.embeddings.patch_embeddings.bias.grad
        np.save(self.folder / "hidden.npy", hidden.detach().cpu().numpy())
        np.save(self.folder / "gradient.npy", (bias / bias.abs().max()).cpu().numpy())
        self.model.zero_grad(set_to_none=True)

    def memory(self) -> dict[str, int]:
        """Bytes at the peak of each pass, weights and input included."""
        self.model.zero_grad(set_to_none=True)
        held = [*self.model.parameters(), self.x]
        found = {"forward": peak_bytes(self.forward, self.device, held)}
        self.both()  # makes the gradient that comes in
        self.model.zero_grad(set_to_none=True)
        return {**found, "both": peak_bytes(self.both, self.device, held)}


def contenders(folder: str, settings: dict[str, Any], precision: str, device: str, threads: int) -> dict[str, Setup]:
    """`forward` and `both`. Work: images."""
    peer = _peer(folder, settings, precision, device, threads)
    return {"forward": lambda: Prepared(peer.forward, {}), "both": lambda: Prepared(peer.both, {})}


def tables(
    folder: str, settings: dict[str, Any], precision: str, device: str, threads: int
) -> dict[str, Callable[[], Any]]:
    """`answers` (files) and `memory` (bytes)."""
    peer = _peer(folder, settings, precision, device, threads)
    return {"answers": peer.answers, "memory": peer.memory}


_made: list[_Peer] = []


def _peer(*arguments: Any) -> _Peer:
    """The one network of this process."""
    if not _made:
        _made.append(_Peer(*arguments))
    return _made[0]
