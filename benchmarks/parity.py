"""Our networks against Hugging Face's with the same weights, all tokens, fp32 on the CPU: a table for the docs.

Each row: a network of ours with random weights at which every part matters is written by `save_pretrained`, loaded by
transformers' AutoModel, compared; written again by transformers, read by `load_pretrained`, and compared bit for bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peer_transformers import transformers as load_transformers
from torch import Tensor, nn

import dinox_model
from dinox_model import VisionTransformer, ViTConfig, ViTFeatures

LIMIT = 1e-5
SIZES = ((224, 224), (96, 160), (512, 512))
SMALL = ViTConfig(width=96, num_layers=3, num_heads=3, mlp_hidden=384)
SMALL_DINOV2 = ViTConfig(
    width=96,
    num_layers=3,
    num_heads=3,
    mlp_hidden=384,
    qkv_bias="full",
    norm_eps=1e-6,
    patch_size=14,
    positions="learned",
    learned_grid=(16, 16),
)
NETWORKS: dict[str, ViTConfig] = {
    "DINOv3, GELU": SMALL,
    "DINOv3, SwiGLU": ViTConfig.from_dict(SMALL.to_dict() | {"mlp": "swiglu", "mlp_hidden": 256}),
    "DINOv2 with registers, GELU": SMALL_DINOV2,
    "DINOv2 with registers, SwiGLU": ViTConfig.from_dict(SMALL_DINOV2.to_dict() | {"mlp": "swiglu", "mlp_hidden": 256}),
    "DINOv3, vit_s": dinox_model.PRESETS["vit_s"],
}

_EXAMPLES = """\
examples:
  python benchmarks/parity.py
  python benchmarks/parity.py --network "DINOv3, GELU"

needs transformers (the [hf] extra).
exit code: 0 all differences below the limit and all round trips bit-equal; 1 not; 2 wrong usage
"""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    network: str
    size: tuple[int, int]
    masked: bool
    difference: float
    """Largest absolute difference of any number of any token."""
    bit_equal: bool
    """Whether the weights came back from transformers as they were."""

    @property
    def holds(self) -> bool:
        """Whether it is what it should be."""
        return self.difference < LIMIT and self.bit_equal

    def __str__(self) -> str:
        back = "bit-equal" if self.bit_equal else "DIFFERENT"
        size = f"{self.size[0]} × {self.size[1]}"
        return f"| {self.network} | {size} | {'yes' if self.masked else 'no'} | {self.difference:.1e} | {back} |"


HEADER = """\
| network | input | masked | largest difference | weights there and back |
| --- | --- | --- | --- | --- |"""


def perturb(module: nn.Module, seed: int = 0) -> None:
    """Random weights at which every part matters: LayerScale and norms near 1, no bias zero, no token zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            near_one = "gamma" in name or ("norm" in name and name.endswith("weight"))
            parameter.copy_(1.0 + 0.1 * noise if near_one else noise * (0.5 if "token" in name else 0.05))


def all_tokens(features: ViTFeatures) -> Tensor:
    """(b, t, d), in the order of the others."""
    assert features.cls is not None
    return torch.cat((features.cls[:, None], features.registers, features.patches), dim=1)


def same_numbers(one: VisionTransformer, other: VisionTransformer) -> bool:
    """Whether two networks have the same tensors, bit for bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def loaded_by_peer(folder: Path) -> Any:
    """What transformers makes of an exported folder. Raises ValueError where it misses or adds a tensor."""
    peer, found = load_transformers().AutoModel.from_pretrained(folder, output_loading_info=True)
    wrong = {name: keys for name, keys in found.items() if keys}
    if wrong:
        raise ValueError(f"transformers finds in {folder}: {wrong}")
    return peer.eval()


def compare(name: str, config: ViTConfig, sizes: tuple[tuple[int, int], ...] = SIZES) -> Iterator[Row]:
    """All rows of one network; two images of each size, with and without masked patches."""
    model = dinox_model.build(config).eval()
    perturb(model)
    with tempfile.TemporaryDirectory() as folder:
        dinox_model.save_pretrained(model, Path(folder) / "ours", format="hf")
        peer = loaded_by_peer(Path(folder) / "ours")
        peer.save_pretrained(Path(folder) / "theirs")
        back, _ = dinox_model.load_pretrained(Path(folder) / "theirs")
    bit_equal = back.config == model.config and same_numbers(back, model)
    generator = torch.Generator().manual_seed(1)
    for height, width in sizes:
        side = config.patch_size
        size = (height // side * side, width // side * side)
        x = torch.randn(2, config.in_channels, *size, generator=generator)
        masks = torch.rand(2, size[0] // side * (size[1] // side), generator=generator) < 0.4
        for mask in (None, masks):
            with torch.no_grad():
                theirs = peer(x, bool_masked_pos=mask).last_hidden_state
                ours = all_tokens(model(x, mask))
            yield Row(name, size, mask is not None, (ours - theirs).abs().max().item(), bit_equal)


def main(arguments: list[str] | None = None) -> int:
    """Exit code of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", action="append", choices=NETWORKS, help="only this one; repeatable")
    options = parser.parse_args(arguments)
    try:
        transformers = load_transformers()
    except ImportError:
        parser.error("transformers is not installed: pip install 'dinox[hf]'")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, fp32, CPU\n\n{HEADER}")
    holds = True
    for name in options.network or NETWORKS:
        for row in compare(name, NETWORKS[name]):
            print(row, flush=True)
            holds &= row.holds
    print(f"\nall below {LIMIT:g}, all bit-equal" if holds else f"\nNOT all below {LIMIT:g} and bit-equal")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
