"""The fp32 parameters of a network in one buffer, and, for `bf16_weights`, the bf16 copies that its products read.

    masters, fp32   [ those with a copy                 | norms, tokens, LayerScale … ]   one buffer
                         │ refresh            ▲ gather_gradients
    copies,  bf16   [ weights and biases of Linears     ]                                 one buffer, in the network

Autocast rounds each weight to bf16 in every forward of every micro-batch. With `bf16_weights` that is done once an
update. What is computed is the same, bit for bit, as gradients still add up in fp32: only casts are gone. Norms, tokens
and LayerScale stay fp32: no product reads them, and autocast computes with them in fp32 anyway.

Invariant: a copy is its master rounded, except between a change of the masters and `refresh`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinox_train.teacher import update_teacher

ALIGNMENT = 16
"""Elements: each parameter begins at a multiple of 64 bytes in the buffer, as vector instructions like it."""


@dataclass(frozen=True)
class _Place:
    """Where a parameter with a copy stands in the network."""

    module: nn.Module
    name: str
    master: nn.Parameter
    copy: nn.Parameter


class MasterWeights:
    """Owns the parameters of a network that stands on its final device. For `fp32` and `bf16` (autocast) the masters
    are the network's own parameters, and there are no copies.
    """

    def __init__(self, network: nn.Module, precision: str) -> None:
        """Move the parameters of `network` into one buffer; they stay the same objects, with the same values.

        precision: the configuration's key. Raises ValueError where a parameter is not fp32.
        """
        self.network = network
        self.named: list[tuple[str, nn.Parameter]] = list(network.named_parameters())
        """fp32, in the network's order: what the optimizer, clipping and checkpoints work on."""
        for name, parameter in self.named:
            if parameter.dtype != torch.float32:
                raise ValueError(f"{name} is {parameter.dtype}: master weights are fp32. Make the network in fp32.")
        places = self._products() if precision == "bf16_weights" else []
        first = [getattr(module, name) for module, name in places]
        in_first = {id(parameter) for parameter in first}
        rest = [parameter for _, parameter in self.named if id(parameter) not in in_first]
        self.buffer, views = _laid_out([*first, *rest], torch.float32)
        """fp32 (n,): all masters, each at an aligned place, zeros in between; what the teacher's average works on."""
        for parameter, view in zip([*first, *rest], views, strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.copies, views = _laid_out(first, torch.bfloat16)
        """bf16 (m,): all copies; element i is that of the buffer's element i."""
        self._copied = [
            _Place(module, name, master, nn.Parameter(view, requires_grad=master.requires_grad))
            for (module, name), master, view in zip(places, first, views, strict=True)
        ]
        self._entered = 0
        self._put_copies()

    def zero_gradients(self) -> None:
        """Forget all gradients; called before the first micro-batch of an update."""
        for _, master in self.named:
            master.grad = None
        for one in self._copied:
            one.copy.grad = None

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Add what arrived at the copies to the masters' gradients, in fp32; called after each micro-batch's backward.

        In bf16, which has 8 bits, the gradients of later micro-batches would be rounded away against the sum so far.
        """
        sums: list[Tensor] = []
        arrived: list[Tensor] = []
        for one in self._copied:
            if one.copy.grad is None:
                continue
            if one.master.grad is None:
                one.master.grad = one.copy.grad.float()
            else:
                sums.append(one.master.grad)
                arrived.append(one.copy.grad)
            one.copy.grad = None
        if sums:
            torch._foreach_add_(sums, arrived)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the copies; called whenever the masters have changed."""
        self.copies.copy_(self.buffer[: len(self.copies)])

    def follow(self, student: MasterWeights, momentum: float, applied: Tensor) -> None:
        """Be the teacher's average of `student`, a network of the same shape, as `update_teacher` says."""
        update_teacher(self.buffer, student.buffer, momentum, applied)

    @contextmanager
    def in_network(self) -> Iterator[nn.Module]:
        """The network with its fp32 masters in it, to be saved or loaded into; copies are made anew afterwards.

        It may be entered again meanwhile: the masters stay until the outermost is left.
        """
        self._entered += 1
        for one in self._copied:
            setattr(one.module, one.name, one.master)
        try:
            yield self.network
        finally:
            self._entered -= 1
            if not self._entered:
                self._put_copies()

    def gathered(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of `state_dict` whose names begin with `prefix`, which is taken off; in its memory."""
        return {
            name.removeprefix(prefix): value for name, value in self.state_dict().items() if name.startswith(prefix)
        }

    def load_part(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of some of `state_dict`. Raises RuntimeError for names or shapes that are not there."""
        with self.in_network() as network:
            unknown = network.load_state_dict(tensors, strict=False).unexpected_keys
        if unknown:
            raise RuntimeError(f"other names than this network's: {unknown[:5]}")

    def moments(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The optimizer's tensors as a checkpoint holds them: as they are."""
        return tensors

    def take_from(self, other: MasterWeights, prefix: str = "") -> None:
        """Be `other`, whose names have `prefix` before them."""
        self.load_state_dict(other.gathered(prefix))

    def state_dict(self) -> dict[str, Tensor]:
        """All parameters in fp32 and all buffers, by the network's names; they share its memory."""
        with self.in_network() as network:
            return network.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take the values of `state_dict`. Raises RuntimeError where names or shapes are other ones."""
        with self.in_network() as network:
            network.load_state_dict(tensors)

    def _put_copies(self) -> None:
        self.refresh()
        for one in self._copied:
            setattr(one.module, one.name, one.copy)

    def _products(self) -> list[tuple[nn.Module, str]]:
        """The parameters that matrix products read: modules, and the parameters' names in them.

        Not q_bias and v_bias: they become part of a bias first, whose gradients autocast adds up in fp32.
        """
        return [
            (module, name)
            for module in self.network.modules()
            if isinstance(module, nn.Linear)
            for name, _ in module.named_parameters(recurse=False)
        ]


def _laid_out(parameters: list[nn.Parameter], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A buffer of zeros for all of `parameters`, and the view of it that belongs to each."""
    begins, end = [], 0
    for parameter in parameters:
        begins.append(end)
        end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    buffer = torch.zeros(end, dtype=dtype, device=parameters[0].device if parameters else None)
    views = [
        buffer[begin : begin + parameter.numel()].view(parameter.shape)
        for begin, parameter in zip(begins, parameters, strict=True)
    ]
    return buffer, views
