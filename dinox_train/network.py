"""A backbone with the heads that an objective puts on it, and the networks that take part in a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dinox_model import VisionTransformer
from dinox_model.execution import Execution, prepare, use
from dinox_model.initialisation import Initialised, initialise_linear, materialise
from dinox_model.kernels.dispatch import REFERENCE, Kernels
from dinox_model.linear import OFF, Routes, route
from dinox_train.working_weights import MasterWeights


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

    def __init__(self, student: Network, teacher: Network, precision: str) -> None:
        """Student and teacher have the same shape. The parameters of each move into one buffer."""
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.student_weights = MasterWeights(student, precision)
        self.teacher_weights = MasterWeights(self.teacher, precision)
        self.gram: VisionTransformer | None = None
        """The frozen Gram teacher, from the update on that takes it."""
        self.execution = Execution()
        self.kernels, self.routes = REFERENCE, OFF

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
        with self.teacher_weights.in_network():
            backbone = self.teacher.backbone
            self.gram = self._empty_gram() if self.gram is None else self.gram
            self.gram.load_state_dict(backbone.state_dict())

    def load_gram_teacher(self, tensors: Mapping[str, Tensor]) -> None:
        """Be what a checkpoint holds."""
        self.gram = self._empty_gram()
        self.gram.load_state_dict(tensors)

    def _empty_gram(self) -> VisionTransformer:
        device = next(self.teacher.parameters()).device
        with torch.device("meta"):
            gram = VisionTransformer(self.teacher.backbone.config)
        gram = gram.to_empty(device=device).requires_grad_(False)
        use(gram, self.kernels)
        route(gram, self.routes)
        prepare(gram, Execution(compile=self.execution.compile))
        return gram
