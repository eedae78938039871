"""The ways attention's kernels are shipped, for the compile proof.

Invariant: types, alignment and constants are those that `attention.py` launches with.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from dinox_model.kernels import attention
from dinox_model.kernels import attention_backward as backward
from dinox_model.kernels import attention_forward as forward
from dinox_model.kernels.tiles import Launch, Tiles, tiles_for


def launches(arch: str) -> Iterator[Launch]:
    """The ways the three kernels are shipped for `arch`, as the compile proof compiles them.

    Not every combination: those of `_SHIPPED` stand for the others, whose code is theirs with switches left off. fp16
    differs from bf16 in single conversions, and head_dim 80 and 96 run 128's code with columns masked.
    """
    functions = (forward.attention_forward, backward.attention_queries, backward.attention_keys_values)
    for name, function in zip(attention.KERNELS, functions, strict=True):
        for (head_dim, dtype), switches in _SHIPPED.items():
            for switched_on in switches:
                facts = {each: each in switched_on for each in ("causal", "packed", "dropout")}
                table = attention.table_name(name, causal=facts["causal"], dropout=facts["dropout"])
                tiles = tiles_for(table, arch=arch, dtype=dtype, head_dim=head_dim, length=1024)
                if tiles is not None:
                    yield _launch(table, function, arch, dtype, head_dim, facts, tiles)


_PLAIN: tuple[str, ...] = ()
_ALL = ("causal", "packed", "dropout")
_SHIPPED: dict[tuple[int, str], tuple[tuple[str, ...], ...]] = {
    (64, "bf16"): (_PLAIN, ("packed",), ("causal",), _ALL),
    (64, "fp16"): (_PLAIN, _ALL),
    (64, "fp32"): (_PLAIN,),
    (80, "bf16"): (_PLAIN,),
    (96, "bf16"): (_PLAIN,),
    (128, "bf16"): (_PLAIN, _ALL),
    (128, "fp16"): (_PLAIN,),
    (128, "fp32"): (_PLAIN,),
}


def _launch(
    name: str, function: Any, arch: str, dtype: str, head_dim: int, facts: dict[str, bool], tiles: Tiles
) -> Launch:
    data = dict.fromkeys(("qkv", "out", "d_out", "d_qkv"), f"*{dtype}")
    types = data | {"per_row": "*fp32", "shifts": "*fp32", "lengths": "*i32", "seed": "*i64"}
    types |= dict.fromkeys(("tokens", "length", "num_heads", "drop_below"), "i32")
    types |= dict.fromkeys(("scale", "scale_log2", "keep_scale"), "fp32")
    constants = attention.constants(arch, dtype, head_dim, **facts)
    constants |= {each: None for each, there in (("lengths", "packed"), ("seed", "dropout")) if not facts[there]}
    names = inspect.signature(function.fn).parameters
    signature = {each: types[each] for each in names if each in types and each not in constants}
    return Launch(
        kernel=name,
        function=function,
        signature=signature,
        constants=constants,
        aligned=tuple(each for each in signature if signature[each].startswith("*")),
        tiles=tiles,
        dtype=dtype,
        head_dim=head_dim,
        uses_dot=True,
        facts=facts,
    )
