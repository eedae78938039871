"""A backbone with the heads that an objective puts on it, and the networks that take part in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from dinox_model import VisionTransformer
from dinox_model.execution import Execution, prepare, use
from dinox_model.initialisation import Initialised, initialise_linear, materialise
from dinox_model.kernels.dispatch import REFERENCE, Kernels
from dinox_model.linear import OFF, Routes, route
from dinox_train.working_weights import MasterWeights

if TYPE_CHECKING:
    from dinox_train.sharded_weights import ShardedWeights

    Weights = MasterWeights | ShardedWeights

Forward = Callable[[], dict[str, Tensor]]
"""A forward of the student: losses by name, with gradients."""


class SumsGradients(Protocol):
    """Several ranks: runs a forward, after the backward of whose `last` one in an update the student's gradients are
    summed over the ranks."""

    def __call__(self, forward: Forward, *, last: bool) -> dict[str, Tensor]: ...


class Shards(Protocol):
    """Shares the parameters of a network out over the ranks (fsdp)."""

    def __call__(self, network: nn.Module, precision: str) -> ShardedWeights: ...


class Network(nn.Module):
    """A backbone with heads by name; the student is one, the teacher another. Parameters: backbone.…, heads.NAME.…"""

    def __init__(self, backbone: VisionTransformer, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(dict(heads))


class LinearHead(Initialised):
    """One Linear: features (…, in_features) to (…, out_features). First weights are a function of sizes and `seed`."""

    def __init__(self, in_features: int, out_features: int, *, seed: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.linear = nn.Linear(in_features, out_features)
        materialise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def initialise(self, generator: torch.Generator) -> None:
        initialise_linear(self.linear, generator)


class Networks:
    """The networks of a step, on their final device. Only the student has gradients."""

    def __init__(self, student: Network, teacher: Network, precision: str, shards: Shards | None = None) -> None:
        """Student and teacher have the same shape. The parameters of each move into one buffer, or are shared out as
        `shards` says."""
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.shards, self.precision = shards, precision
        self.student_weights = self._weights_of(student)
        self.teacher_weights = self._weights_of(self.teacher)
        self._gram_weights: Weights | None = None
        self.gram: VisionTransformer | None = None
        """The frozen Gram teacher, from the update on that takes it."""
        self.execution = Execution()
        self.kernels, self.routes = REFERENCE, OFF
        self.sums_gradients: SumsGradients | None = None
        """None: there is one rank, or the weights' shards do it themselves."""

    def _weights_of(self, network: nn.Module) -> Weights:
        return MasterWeights(network, self.precision) if self.shards is None else self.shards(network, self.precision)

    def student_pass(self, forward: Forward, *, last: bool) -> dict[str, Tensor]:
        """What `forward` gives: the losses of one of an update's micro-batches, its last one perhaps."""
        return forward() if self.sums_gradients is None else self.sums_gradients(forward, last=last)

    def run_with(self, kernels: Kernels, routes: Routes = OFF) -> None:
        """Run with these kernels and libraries of matrix products; before the first `run_as` that compiles."""
        self.kernels, self.routes = kernels, routes
        for network in (self.student, self.teacher, self.gram):
            if network is not None:
                use(network, kernels)
                route(network, routes)

    def run_as(self, execution: Execution) -> None:
        """Run as `execution` says from now on, in this form whatever an earlier call said. Names and values of
        parameters stay. Teachers are compiled like the student; nothing of them is kept for a backward.
        """
        self.execution = execution
        prepare(self.student.backbone, execution)
        for teacher in (self.teacher.backbone, self.gram):
            if teacher is not None:
                prepare(teacher, Execution(compile=execution.compile))

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Within it nothing is compiled or computed again: for what looks at each operator that runs. torch gives up
        compiling for good what it first meets under such a look."""
        execution = self.execution
        self.run_as(Execution())
        try:
            yield
        finally:
            self.run_as(execution)

    def take_gram_teacher(self) -> None:
        """Make the Gram teacher the copy of the teacher as it is now."""
        self.gram_weights.take_from(self.teacher_weights, "backbone.")  # type: ignore[arg-type] # both are of one kind

    @property
    def gram_weights(self) -> Weights:
        """The Gram teacher's, fp32; asking for them makes an empty one where there is none."""
        if self.gram is None or self._gram_weights is None:
            device = next(self.teacher.parameters()).device
            with torch.device("meta"):
                gram = VisionTransformer(self.teacher.backbone.config)
            gram = gram.to_empty(device=device).requires_grad_(False)
            # Without copies in bf16, which would be a third of its memory more: a Gram teacher runs in few updates.
            made = MasterWeights(gram, "fp32") if self.shards is None else self.shards(gram, self.precision)
            use(gram, self.kernels)
            route(gram, self.routes)
            prepare(gram, Execution(compile=self.execution.compile))
            self.gram, self._gram_weights = gram, made
        return self._gram_weights

    def forget_gram_teacher(self) -> None:
        """Be without one."""
        self.gram = self._gram_weights = None
