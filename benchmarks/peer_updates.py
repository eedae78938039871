"""The same update written plainly with torch and transformers: multi-crop DINO, iBOT, KoLeo, AdamW, teacher's average.

As one would write it from the papers, at its best: one pass for each size of view, all pairs of views in one product,
fused AdamW, foreach average. Runs in the peers' interpreter (serve.py); weights, views and masks come from
update_case.py. Legend: S student views, T = 2 teacher views, b images, K prototypes.
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
import torch.nn.functional as F
from peak_memory import wait
from peer_transformers import transformers as load_transformers
from timing import Prepared, Setup
from torch import Tensor, nn

PACKAGES = ("torch", "transformers", "numpy")
TEACHER_VIEWS = 2


def versions() -> dict[str, str]:
    """Of the peers' packages."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


class _Head(nn.Module):
    """Three layers, a direction, prototypes."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        (hidden, width), (second, _), (bottleneck, _), (prototypes, _) = shapes
        layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, second), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(second, bottleneck))
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class _Network(nn.Module):
    """A backbone and its two heads."""

    def __init__(self, settings: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__()
        transformers = load_transformers()
        config = transformers.DINOv3ViTConfig(**settings, attn_implementation="sdpa")
        self.backbone: Any = transformers.DINOv3ViTModel(config).eval()
        shapes = [tuple(value.shape) for name, value in weights.items() if name.startswith("heads.dino.") and
                  value.ndim == 2]  # fmt: skip
        self.heads = nn.ModuleDict({name: _Head(shapes) for name in ("dino", "ibot")})
        own = {name.replace("backbone.model.", "backbone."): name for name in self.state_dict()}
        self.load_state_dict({own[name]: value for name, value in weights.items()})


class _Update:
    def __init__(
        self,
        folder: str,
        settings: dict[str, Any],
        numbers: dict[str, float],
        precision: str,
        device: str,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.numbers, self.precision, self.device = numbers, precision, torch.device(device)
        weights = _load(Path(folder) / "weights.npz")
        self.student = _Network(settings, weights).to(self.device)
        self.teacher = _Network(settings, weights).to(self.device).requires_grad_(False)
        self.batch = {name: value.to(self.device) for name, value in _load(Path(folder) / "batch.npz").items()}
        vectors = ("cls_token", "mask_token", "register_tokens")
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.student.named_parameters():
            groups[parameter.ndim > 1 and not name.endswith(vectors)].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": groups[True], "weight_decay": numbers["weight_decay"]},
             {"params": groups[False], "weight_decay": 0.0}],
            lr=numbers["learning_rate"], betas=(numbers["beta1"], numbers["beta2"]), fused=True,
        )  # fmt: skip
        self.averages: list[Tensor] = list(self.teacher.parameters())
        self.averaged: list[Tensor] = list(self.student.parameters())

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision != "fp32")

    def run(self) -> dict[str, Tensor]:
        """One update; its terms."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad(), self.autocast():
            dino_targets, ibot_targets = self._targets()
        with self.autocast():
            terms = self._losses(dino_targets, ibot_targets)
        (terms["dino"] + terms["ibot"] + self.numbers["koleo_weight"] * terms["koleo"]).backward()
        for part in (self.student.backbone, *self.student.heads.values()):
            nn.utils.clip_grad_norm_(part.parameters(), self.numbers["clip_norm"])
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.averaged, 1.0 - self.numbers["teacher_momentum"])
        return {name: term.detach() for name, term in terms.items()}

    def _targets(self) -> tuple[Tensor, Tensor]:
        cls, masked = self._features(self.teacher, self.batch["global_views"], None)
        return tuple(
            _sinkhorn(logits.float(), self.numbers["teacher_temperature"], int(self.numbers["iterations"]))
            for logits in (self.teacher.heads["dino"](cls), self.teacher.heads["ibot"](masked))
        )  # type: ignore[return-value]

    def _features(self, network: _Network, views: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """CLS (b, d) of the views, and their masked patches (m, d)."""
        hidden = network.backbone(views, bool_masked_pos=masks).last_hidden_state
        prefix = 1 + network.backbone.config.num_register_tokens
        return hidden[:, 0], hidden[:, prefix:].flatten(0, 1)[self.batch["indices"]]

    def _losses(self, dino_targets: Tensor, ibot_targets: Tensor) -> dict[str, Tensor]:
        batch, temperature = self.batch, self.numbers["student_temperature"]
        cls, masked = self._features(self.student, batch["global_views"], batch["masks"])
        local = self.student.backbone(batch["local_views"]).last_hidden_state[:, 0]
        images = len(cls) // TEACHER_VIEWS
        logits = self.student.heads["dino"](torch.cat((cls, local))).float()
        said = F.log_softmax(logits / temperature, dim=-1).unflatten(0, (-1, images))
        pairs = torch.einsum("sbk,tbk->st", said, dino_targets.unflatten(0, (-1, images)))
        same = pairs.diagonal().sum()
        num_pairs = pairs.numel() - TEACHER_VIEWS
        patches = F.log_softmax(self.student.heads["ibot"](masked).float() / temperature, dim=-1)
        of_patch = -(ibot_targets * patches).sum(dim=-1) * batch["weights"]
        return {
            "dino": -(pairs.sum() - same) / (num_pairs * images),
            "ibot": of_patch.sum() / len(cls),
            "koleo": sum((_koleo(view.float()) for view in cls.chunk(TEACHER_VIEWS)), cls.new_zeros(())),
        }

    def timed(self) -> float:
        """One update. Returns images."""
        self.run()
        wait(self.device)
        return len(self.batch["global_views"]) // TEACHER_VIEWS

    def two_updates(self) -> list[dict[str, float]]:
        """Their terms."""
        return [{name: float(value) for name, value in self.run().items()} for _ in range(2)]


def _sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """(n, K): SwAV's loop."""
    shares = torch.exp(logits / temperature).t()
    prototypes, samples = shares.shape
    shares /= shares.sum()
    for _ in range(iterations):
        shares /= shares.sum(dim=1, keepdim=True) * prototypes
        shares /= shares.sum(dim=0, keepdim=True) * samples
    return (shares * samples).t()


def _koleo(features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features, dim=-1)
        with torch.no_grad():
            near = (x @ x.t()).fill_diagonal_(-1.0).argmax(dim=1)
        return -torch.log((x - x[near]).norm(dim=-1) + 1e-8).mean()


def _load(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


_made: list[_Update] = []


def _update(*arguments: Any) -> _Update:
    """The one update of this process."""
    if not _made:
        _made.append(_Update(*arguments))
    return _made[0]


def contenders(**arguments: Any) -> dict[str, Setup]:
    """`plain`. Work: images."""
    update = _update(*arguments.values())
    return {"plain": lambda: Prepared(update.timed, {})}


def tables(**arguments: Any) -> dict[str, Callable[[], Any]]:
    """`two_updates`: the terms of the next two."""
    return {"two_updates": _update(*arguments.values()).two_updates}
