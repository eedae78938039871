"""How much memory training or using a network takes, item by item, before any of it is taken.

A plan is a rehearsal: the network itself runs, forward and backward, on torch's fake tensors, which have shapes and no
memory, and a `StorageMeter` counts. So a plan cannot differ from the code, whatever options the network has, and the
largest network is planned on the smallest machine within seconds.

Not in a plan: what the kernels of matrix products and attention take for themselves meanwhile, what an allocator rounds
up, and the runtime's own memory (on a GPU, some hundred MB that torch.cuda.max_memory_allocated does not count either).
Compiled networks fuse more and keep less: a plan is of the eager one, with the chosen checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dinox_model.config import ViTConfig
from dinox_model.draws import Draws, moves_coordinates, num_residuals
from dinox_model.execution import Execution, prepare
from dinox_model.features import ViTFeatures
from dinox_model.fields import nearest
from dinox_model.flops import kept_rows
from dinox_model.storage_meter import WEIGHT_CASTS, StorageMeter
from dinox_model.vit import VisionTransformer
from dinox_model.workload import Workload, grid_of

PRECISIONS = ("fp32", "bf16", "bf16_weights")
MOMENTS = 2
"""fp32 numbers that AdamW keeps of each parameter."""
WEIGHTS, WORKING_WEIGHTS, GRADIENTS = "weights", "bf16 copies of weights", "gradients"
OPTIMIZER, TEACHER, GRAM_TEACHER = "optimizer", "teacher", "Gram teacher"
VIEWS, TARGETS = "views", "targets"
GLOBAL, LOCAL, HEADS = "activations, global views", "activations, local views", "activations, heads"
BACKWARD, FORWARD = "working, backward", "working, forward"


@dataclass(frozen=True)
class MemoryPlan:
    """What is alive at the moment when most is."""

    items: Mapping[str, int]
    """Bytes; their sum is the peak. A gradient that waits for its other views' share counts as working memory."""
    kept: Mapping[str, int]
    """Bytes that the forwards leave for the backward, by pass; none where there is no backward."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.items.values())

    def lines(self) -> list[str]:
        """A table in MiB, what stays for the whole update first, the sum below."""
        rows = [(name, size) for name, size in self.items.items() if size] + [("peak", self.peak)]
        return [f"{name:<28}{size / 2**20:>12,.1f} MiB" for name, size in rows]


def plan_training(
    config: ViTConfig,
    workload: Workload,
    *,
    precision: str = "fp32",
    execution: Execution | None = None,
    accumulates: bool = False,
) -> MemoryPlan:
    """The memory of an update with AdamW, at its peak.

    workload: one micro-batch. accumulates: it is not the only one of its update, so gradients of an earlier one are
    there already. bf16 runs under autocast on fp32 weights; bf16_weights too, on bf16 copies of the weights of all
    linears, with fp32 gradients. The peak lies in the student's passes; the targets are those of this micro-batch (a
    trainer that keeps a whole update's adds the others), and of the loss no more than the logits in fp32, their
    gradient and one intermediate. Raises ValueError for a view that is not a multiple of the patch size.
    """
    _check_precision(precision)
    for size in (workload.global_size, workload.local_size, workload.gram_size or workload.global_size):
        grid_of(config, size)
    with FakeTensorMode(), StorageMeter() as meter:
        rehearsal = _Training(config, workload, precision, execution or Execution(), meter)
        rehearsal.allocate(gradients=accumulates)
        targets = rehearsal.teach()
        kept = rehearsal.learn(targets)
    return MemoryPlan(_in_order(meter), kept)


def plan_pass(
    config: ViTConfig,
    images: int,
    size: int | tuple[int, int],
    *,
    precision: str = "fp32",
    execution: Execution | None = None,
    backward: bool = False,
) -> MemoryPlan:
    """The memory of one network in one forward of `images` inputs, at its peak; without gradients unless `backward`,
    which adds the backward of all its features. For bf16_weights the weights of linears are held in bf16 alone.

    Raises ValueError for a size that is not a multiple of the patch size.
    """
    _check_precision(precision)
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
    height, width = (side * config.patch_size for side in grid_of(config, size))
    with FakeTensorMode(), StorageMeter() as meter:
        with meter.owner(WEIGHTS):
            network = _fake_network(config)
            if precision == "bf16_weights":
                _put_bf16_copies(network)
            meter.watch_casts(network.parameters())
        meter.forget_peak()
        prepare(network, execution or Execution())
        with meter.owner(VIEWS):
            x = torch.empty(images, config.in_channels, height, width)
            mm_per_pixel = torch.empty(images, 2) if config.uses_mm_per_pixel else None
        with meter.owner(GLOBAL if backward else FORWARD), torch.set_grad_enabled(backward), _autocast(precision):
            features = network(x, mm_per_pixel=mm_per_pixel)
        kept = {name: meter.by_owner[name] for name in (GLOBAL, WEIGHT_CASTS)} if backward else {}
        if backward:
            _name_gradients(network, meter)
            with meter.owner(BACKWARD):
                loss = sum(part.float().sum() for part in features[:3] if isinstance(part, Tensor))
                assert isinstance(loss, Tensor)
                loss.backward()
    return MemoryPlan(_in_order(meter), kept)


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}{nearest(precision, PRECISIONS)}"
        )


class _Training:
    """The networks of an update on fake tensors, and its passes, in the trainer's order."""

    def __init__(
        self, config: ViTConfig, workload: Workload, precision: str, execution: Execution, meter: StorageMeter
    ) -> None:
        self.config, self.workload, self.precision, self.execution = config, workload, precision, execution
        self.meter = meter

    def allocate(self, *, gradients: bool) -> None:
        """Weights, optimizer, views; and gradients if they are there from the start."""
        workload, meter = self.workload, self.meter
        self.student, self.masters = self._networks(WEIGHTS)
        self.teacher, teacher_masters = self._networks(TEACHER)
        self.teacher.requires_grad_(False)
        prepare(self.student["backbone"], self.execution)
        self.gram = None
        if workload.gram_size is not None:
            with meter.owner(GRAM_TEACHER):
                self.gram = _fake_network(self.config).requires_grad_(False)
                meter.watch_casts(self.gram.parameters())
        with meter.owner(OPTIMIZER):
            self.held = [torch.empty_like(master) for master in self.masters for _ in range(MOMENTS)]
        self.held += teacher_masters
        if gradients:
            with meter.owner(GRADIENTS):
                for master in self.masters:
                    master.grad = torch.empty_like(master)
        _name_gradients(self.student, meter)
        with meter.owner(VIEWS):
            self.views = {
                GLOBAL: self._view(workload.global_views, workload.global_size),
                LOCAL: self._view(workload.local_views, workload.local_size),
            }
        meter.forget_peak()

    @torch.no_grad()
    def teach(self) -> list[Tensor]:
        """The teachers' passes: fp32 logits of each head, and the Gram teacher's patches."""
        with self.meter.owner(FORWARD), _autocast(self.precision):
            features = self._forward(self.teacher["backbone"], self.views[GLOBAL], student=False)
            logits = self._logits(self.teacher, [features])
            if self.gram is not None:
                size = self.workload.gram_size or 0
                gram = self._forward(self.gram, self._view(self.workload.gram_views, size), student=False)
                logits.append(gram.patches)
            del features
        with self.meter.owner(TARGETS):
            return [tensor.float().clone() for tensor in logits]

    def learn(self, targets: list[Tensor]) -> dict[str, int]:
        """The student's passes and their backward; what the forwards leave for it, by pass."""
        features = []
        with _autocast(self.precision):
            for name, x in self.views.items():
                if len(x):
                    with self.meter.owner(name):
                        features.append(self._forward(self.student["backbone"], x, student=True))
            with self.meter.owner(HEADS):
                logits = self._logits(self.student, features)
        with self.meter.owner(HEADS):
            terms = [_loss(part, target) for part, target in zip(logits, targets, strict=False)]
            terms = terms or [one.pooled.sum() for one in features]
            loss = torch.stack(terms).sum()
        del features, logits, terms
        kept = {name: self.meter.by_owner[name] for name in (GLOBAL, LOCAL, HEADS, WEIGHT_CASTS)}
        with self.meter.owner(BACKWARD):
            loss.backward()
            if self.precision == "bf16_weights":
                self._gather_gradients()
        return kept

    def _networks(self, owner: str) -> tuple[nn.ModuleDict, list[nn.Parameter]]:
        """A backbone with its heads, and the fp32 weights: where working weights are bf16, they stand beside."""
        workload, meter = self.workload, self.meter
        with meter.owner(owner):
            networks = nn.ModuleDict({"backbone": _fake_network(self.config)})
            for name, head in (("dino_head", workload.dino_head), ("ibot_head", workload.ibot_head)):
                if head is not None:
                    with torch.device("meta"):
                        networks[name] = head.build(self.config)
                    _give_memory(networks[name])
        masters = list(networks.parameters())
        if self.precision == "bf16_weights":
            with meter.owner(WORKING_WEIGHTS):
                _put_bf16_copies(networks)
        meter.watch_casts(networks.parameters())
        return networks, masters

    def _view(self, number: int, size: int) -> Tensor:
        return torch.empty(number, self.config.in_channels, size, size)

    def _gather_gradients(self) -> None:
        """As the trainer: gradients of bf16 copies are added to their fp32 masters', one after the other."""
        for copy, master in zip(self.student.parameters(), self.masters, strict=True):
            if copy is not master and copy.grad is not None:
                if master.grad is None:
                    master.grad = copy.grad.float()
                    self.meter.give(master.grad, GRADIENTS)
                copy.grad = None

    def _forward(self, network: nn.Module, x: Tensor, *, student: bool) -> ViTFeatures:
        config, num_views = self.config, len(x)
        masks = None
        if student and x is self.views[GLOBAL] and self.workload.masked_patches:
            rows, columns = grid_of(config, self.workload.global_size)
            masks = torch.empty(num_views, rows * columns, dtype=torch.bool)
        mm_per_pixel = torch.empty(num_views, 2) if config.uses_mm_per_pixel else None
        draws = _draws(config, num_views) if student else None
        return network(x, masks, draws=draws, mm_per_pixel=mm_per_pixel)

    def _logits(self, networks: nn.ModuleDict, features: list[ViTFeatures]) -> list[Tensor]:
        """Prototype logits of all views' CLS tokens, and of the masked patches of the first views."""
        logits = []
        if "dino_head" in networks:
            logits.append(networks["dino_head"](torch.cat([one.pooled for one in features])).float())
        if "ibot_head" in networks and self.workload.masked_patches:
            masked = torch.empty(self.workload.masked_patches, dtype=torch.int64)
            logits.append(networks["ibot_head"](features[0].patches.flatten(0, 1)[masked]).float())
        return logits


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """A cross-entropy of the first rows with as many targets."""
    divided = logits / 0.1
    return divided.logsumexp(dim=1).sum() - (divided[: len(targets)] * targets).sum()


def _draws(config: ViTConfig, rows: int) -> Draws | None:
    kept = scale = rope = None
    if config.drop_path:
        number = kept_rows(rows, config.drop_path)
        kept = tuple(torch.empty(number, dtype=torch.int64) for _ in range(num_residuals(config)))
        scale = (rows / number,) * num_residuals(config)
    if moves_coordinates(config):
        rope = torch.empty(2, 2)
    return Draws(kept, scale, rope) if kept or rope is not None else None


def _fake_network(config: ViTConfig) -> VisionTransformer:
    """A network with fake memory; under a `FakeTensorMode`."""
    with torch.device("meta"):
        network = VisionTransformer(config)
    _give_memory(network)
    return network


def _give_memory(network: nn.Module) -> None:
    """Put tensors on the CPU in the place of those on the meta device, which are made without first weights."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape))


def _put_bf16_copies(network: nn.Module) -> None:
    """Give all linears bf16 parameters."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().to(torch.bfloat16)))


def _name_gradients(network: nn.Module, meter: StorageMeter) -> None:
    """Have gradients belong to the item of that name as soon as they are there."""

    def name(parameter: Tensor) -> None:
        if parameter.grad is not None:
            meter.give(parameter.grad, GRADIENTS)

    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(name)


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "fp32"):
        yield


_ORDER = (WEIGHTS, WORKING_WEIGHTS, GRADIENTS, OPTIMIZER, TEACHER, GRAM_TEACHER, VIEWS, TARGETS, GLOBAL, LOCAL, HEADS)


def _in_order(meter: StorageMeter) -> dict[str, int]:
    names = (*_ORDER, *(name for name in meter.at_peak if name not in _ORDER))
    return {name: meter.at_peak[name] for name in names if meter.at_peak[name]}
