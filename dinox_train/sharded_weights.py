"""The fp32 parameters of a network of which each rank holds a share: FSDP2 (`fully_shard`) with the face that
`MasterWeights` has (working_weights.py).

    forward and backward of a block    all ranks' rows are gathered, used, and freed again
    after its backward                 its gradients are added up over the ranks, each of which keeps its rows
    named, optimizer, clipping, EMA    this rank's rows, plain fp32 tensors in FSDP's own memory

A tensor is shared out by rows, in each of these groups by itself: every block, every head, and the rest of the
backbone (patches, tokens, norms). Invariant: the tensors of `named` are FSDP's, not copies, so what changes in one is
what the next forward gathers.

What precisions mean here. fp32, and bf16 (autocast): what is gathered is fp32. bf16_weights: blocks and heads are
gathered and computed in bf16, half the traffic; rows and the sum over ranks are fp32. Unlike one process, whose bf16
copies are of the products' weights alone, blocks then read their norms, LayerScale and biases of q and v in bf16, too,
and heads all that they have; their gradients come in bf16. The sum that residuals are added to stays fp32, since tokens
and the final norm do. On a CPU, where autocast leaves norms alone and torch's take no mixed dtypes, bf16_weights
gathers fp32 and computes as bf16 does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dinox_model import VisionTransformer
from dinox_model.execution import Execution
from dinox_train.part import Held, Part, part_of_rank
from dinox_train.teacher import update_teacher


def shard(network: nn.Module, mesh: DeviceMesh, precision: str) -> list[nn.Module]:
    """Share `network` out over the ranks of `mesh` (one dimension); returns what a forward is to be called on: its
    backbone and each of its heads.

    network: a VisionTransformer, or a Network (`backbone`, `heads`), on the mesh's device or on the host: then a block
    after the other is brought there, and the whole never is. `requires_grad` of its parameters stays; so do names.
    precision: the configuration's key. Gradients are added up over the ranks, in fp32, never averaged. Raises
    ValueError where torch is too old.
    """
    check_torch()
    # Features are slices of the tokens, and nothing here changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    backbone = network if isinstance(network, VisionTransformer) else network.backbone
    assert isinstance(backbone, VisionTransformer)
    heads = [] if network is backbone else [head for head in network.heads.values() if list(head.parameters())]  # type: ignore[union-attr, operator]
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = exact
    if precision == "bf16_weights" and mesh.device_type != "cpu":
        # Inputs are left alone: autocast rounds what products read, and millimetres must not be rounded.
        rounded = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    roots: list[nn.Module] = [backbone, *heads]  # type: ignore[list-item] # heads are modules
    for module in (*backbone.blocks, *roots):
        policy = exact if module is backbone else rounded
        # Also the outermost: a teacher, which has no backward, would else keep what it gathered before its average.
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        # Shares of a loss add up. Gloo has no sum that multiplies, which a factor alone would ask for.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return roots


def check_torch() -> None:
    """Raises ValueError where torch is too old."""
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ValueError(f"parallel.mode: fsdp needs torch 2.13 or newer; this is {torch.__version__}. Use ddp.")


def check_execution(execution: Execution) -> None:
    """Raises ValueError for what sharded networks cannot do."""
    if execution.compile == "full":
        raise ValueError(
            "execution.compile: full does not go with parallel.mode: fsdp, since weights are gathered between blocks, "
            "which no graph of the whole network holds. Use execution.compile: blocks, or parallel.mode: ddp."
        )


class ShardedWeights:
    """Owns this rank's rows of a network's parameters. Every rank makes one, in the same order, and every forward and
    backward is every rank's: one alone waits for the others."""

    def __init__(self, network: nn.Module, mesh: DeviceMesh, precision: str) -> None:
        """Shares `network` out, as `shard` says. Raises ValueError where a parameter is not fp32 or has no rows."""
        for name, parameter in network.named_parameters():
            if parameter.dtype != torch.float32:
                raise ValueError(f"{name} is {parameter.dtype}: master weights are fp32. Make the network in fp32.")
            if parameter.ndim == 0:
                raise ValueError(f"{name} is a single number without rows, which fsdp cannot share out: make it (1,).")
        self.network, self.mesh = network, mesh
        self._ran: set[nn.Module] = set()
        """What had a forward since the last `refresh`."""
        for root in shard(network, mesh, precision):
            root.register_forward_hook(lambda module, *_: self._ran.add(module))
        self._sharded: dict[str, nn.Parameter] = dict(network.named_parameters())
        for name, parameter in self._sharded.items():
            if not isinstance(parameter, DTensor):
                raise ValueError(f"{name} belongs to neither the backbone nor a head: nothing would gather it")
        self.named: list[tuple[str, nn.Parameter]] = []
        """fp32, this rank's rows, in the network's order: what the optimizer and clipping work on."""
        self.parts: dict[str, Part] = {}
        """The same, with where they stand in the whole."""
        rank, count = mesh.get_local_rank(), mesh.size()
        for name, parameter in self._sharded.items():
            rows = nn.Parameter(_rows(parameter), requires_grad=parameter.requires_grad)
            self.named.append((name, rows))
            self.parts[name] = part_of_rank(rows.detach(), parameter.shape, rank, count)

    def zero_gradients(self) -> None:
        """Forget all gradients; called before the first micro-batch of an update."""
        for name, rows in self.named:
            rows.grad = self._sharded[name].grad = None

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Have `named` hold the gradients, summed over the ranks and over the micro-batches so far; called after each
        micro-batch's backward. They share FSDP's memory, which the next backward adds to."""
        for name, rows in self.named:
            gradient = self._sharded[name].grad
            rows.grad = None if gradient is None else _rows(gradient)

    def refresh(self) -> None:
        """Forget what the forwards left behind; called whenever the masters have changed.

        A network without a backward, a teacher, would remember the order of all its forwards for ever.
        """
        for root in self._ran:
            assert isinstance(root, FSDPModule)
            root.reset_iter_state()
        self._ran.clear()

    @contextmanager
    def in_network(self) -> Iterator[nn.Module]:
        """The network, whose parameters are DTensors; to look at it. Values come and go by `state_dict`."""
        yield self.network

    def follow(self, student: ShardedWeights, momentum: float, applied: Tensor) -> None:
        """Be the teacher's average of `student`, whose shape and mesh are the same; as `update_teacher` says."""
        for (_, own), (_, theirs) in zip(self.named, student.named, strict=True):
            update_teacher(own.detach(), theirs.detach(), momentum, applied)

    def state_dict(self) -> dict[str, Held]:
        """Of all parameters this rank's rows, and all buffers, by the network's names; they share its memory."""
        return {**self.parts, **self._buffers()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's rows of whole tensors, from wherever they lie; no rank waits for another.

        Raises RuntimeError where names or shapes are other ones.
        """
        own = self.state_dict()
        if own.keys() != tensors.keys():
            missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
            raise RuntimeError(f"other names than this network's: missing {missing[:5]}, not known {foreign[:5]}")
        self.load_part(tensors)

    @torch.no_grad()
    def load_part(self, tensors: Mapping[str, Tensor]) -> None:
        """`load_state_dict` of some of the names. Raises RuntimeError for names or shapes that are not there."""
        own = self.state_dict()
        for name, whole in tensors.items():
            if name not in own:
                raise RuntimeError(f"other names than this network's: {name}")
            one = own[name]
            shape = one.shape
            if whole.shape != shape:
                raise RuntimeError(f"{name} has shape {tuple(whole.shape)}, this network's has {tuple(shape)}")
            if isinstance(one, Part):
                one.values.copy_(one.of(whole))
            else:
                one.copy_(whole)

    @torch.no_grad()
    def take_from(self, other: ShardedWeights, prefix: str = "") -> None:
        """Be `other`, a network on the same mesh whose names have `prefix` before them: each rank copies its rows.

        A Gram teacher takes the teacher's with prefix "backbone.". Raises KeyError where a name is not there.
        """
        theirs = other.state_dict()
        for name, one in self.state_dict().items():
            source = theirs[prefix + name]
            if isinstance(one, Part):
                assert isinstance(source, Part), name
                assert source.shape == one.shape, name
                one.values.copy_(source.values)
            else:
                assert isinstance(source, Tensor), name
                one.copy_(source)

    @torch.no_grad()
    def gathered(self, prefix: str = "") -> dict[str, Tensor] | None:
        """On rank 0 the whole tensors on the host, parameters and buffers, of the names that begin with `prefix`, which
        is taken off; None on the others. Every rank calls it; no device holds more than one whole parameter."""
        first = self.mesh.get_local_rank() == 0
        found: dict[str, Tensor] = {}
        for name, parameter in self._sharded.items():
            if not name.startswith(prefix):
                continue
            assert isinstance(parameter, DTensor)
            whole = parameter.full_tensor()
            if first:
                found[name.removeprefix(prefix)] = whole.detach().to("cpu", copy=True)
        if not first:
            return None
        for name, value in self._buffers().items():
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = value.detach().to("cpu", copy=True)
        return found

    def moments(self, tensors: Mapping[str, Tensor]) -> dict[str, Held]:
        """The optimizer's tensors, by KIND.PARAMETER, with where their rows stand: those of a parameter's own shape are
        its rows, others (step counts) are whole."""
        found: dict[str, Held] = {}
        for key, value in tensors.items():
            part = self.parts[key.partition(".")[2]]
            of_rows = value.ndim > 0 and value.shape == part.values.shape
            found[key] = Part(value, part.shape, part.first) if of_rows else value
        return found

    def empty_moments(self, shapes: Mapping[str, torch.Size]) -> dict[str, Held]:
        """Room for the optimizer's tensors of a checkpoint, whose whole shapes these are, by KIND.PARAMETER: fp32 on
        the parameters' device. Those of another optimizer's parameters are left out."""
        found: dict[str, Held] = {}
        for key, shape in shapes.items():
            part = self.parts.get(key.partition(".")[2])
            if part is None:
                continue
            if shape == part.shape:
                found[key] = Part(torch.empty_like(part.values), part.shape, part.first)
            else:
                found[key] = torch.empty(shape, device=part.values.device)
        return found

    def _buffers(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.network.state_dict().items() if name not in self._sharded}


def _rows(tensor: Tensor) -> Tensor:
    """This rank's rows of a DTensor, in its memory."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.to_local()
