"""Networks with weights at which every part matters; the key names of others, written down a second time, from their
documented layouts and not from our maps.
"""

from pathlib import Path

import torch
from parity import perturb
from safetensors.torch import save_file
from torch import Tensor

import dinox_model
from dinox_model import VisionTransformer, ViTConfig

WIDTH, LAYERS, HIDDEN, REGISTERS = 32, 2, 64, 4
SMALL = ViTConfig(width=WIDTH, num_layers=LAYERS, num_heads=2, mlp_hidden=HIDDEN)


def perturbed(config: ViTConfig, seed: int = 0) -> VisionTransformer:
    """A network of ours in evaluation mode."""
    model = dinox_model.build(config)
    perturb(model, seed)
    return model.eval()


def meta_shapes(*, swiglu: bool = False, bias: str = "k_masked", local_norm: bool = False) -> dict[str, tuple]:
    """Names and shapes of a state dict of Meta's, width 32, 2 blocks, 2 heads, 4 registers, patch 16."""
    shapes: dict[str, tuple] = {
        "cls_token": (1, 1, WIDTH),
        "storage_tokens": (1, REGISTERS, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 16, 16),
        "patch_embed.proj.bias": (WIDTH,),
        "rope_embed.periods": (4,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for block in ("blocks.0.", "blocks.1."):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (WIDTH,), f"{block}{norm}.bias": (WIDTH,)}
        shapes |= {f"{block}ls1.gamma": (WIDTH,), f"{block}ls2.gamma": (WIDTH,)}
        shapes[f"{block}attn.qkv.weight"] = (3 * WIDTH, WIDTH)
        if bias != "none":
            shapes[f"{block}attn.qkv.bias"] = (3 * WIDTH,)
        if bias == "k_masked":
            shapes[f"{block}attn.qkv.bias_mask"] = (3 * WIDTH,)
        shapes |= {f"{block}attn.proj.weight": (WIDTH, WIDTH), f"{block}attn.proj.bias": (WIDTH,)}
        if swiglu:
            for part in ("w1", "w2"):
                shapes |= {f"{block}mlp.{part}.weight": (HIDDEN, WIDTH), f"{block}mlp.{part}.bias": (HIDDEN,)}
            shapes |= {f"{block}mlp.w3.weight": (WIDTH, HIDDEN), f"{block}mlp.w3.bias": (WIDTH,)}
        else:
            shapes |= {f"{block}mlp.fc1.weight": (HIDDEN, WIDTH), f"{block}mlp.fc1.bias": (HIDDEN,)}
            shapes |= {f"{block}mlp.fc2.weight": (WIDTH, HIDDEN), f"{block}mlp.fc2.bias": (WIDTH,)}
    if local_norm:
        shapes |= {"local_cls_norm.weight": (WIDTH,), "local_cls_norm.bias": (WIDTH,)}
    return shapes


def meta_tensors(seed: int = 0, **kind: object) -> dict[str, Tensor]:
    """Random numbers of these shapes; the mask of the keys' bias and the periods as Meta's code makes them (the periods
    rounded to bf16, as its files have them)."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in meta_shapes(**kind).items():  # type: ignore[arg-type]
        made[name] = 0.1 * torch.randn(shape, generator=generator)
        if name.endswith("bias_mask"):
            made[name] = torch.ones(shape)
            made[name][WIDTH : 2 * WIDTH] = 0
    made["rope_embed.periods"] = (100 ** (2 * torch.arange(4) / 8)).bfloat16().float()
    return made


def write(tensors: dict[str, Tensor], path: Path) -> Path:
    """A safetensors file; returns its path."""
    save_file(tensors, path)
    return path
