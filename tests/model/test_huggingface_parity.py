"""Our network computes what Hugging Face's `DINOv3ViTModel` does with the same weights (skips without it)."""

import re

import pytest
import torch

import dinox_model
from dinox_model import PRESETS, VisionTransformer, ViTConfig

transformers = pytest.importorskip("transformers")

SMALL = {
    "gelu": ViTConfig(width=96, num_layers=3, num_heads=3, mlp_hidden=384),
    "swiglu": ViTConfig(width=96, num_layers=3, num_heads=3, mlp_hidden=256, mlp="swiglu"),
}

# Their names by ours; what is not listed is called the same or needs the queries, keys and values joined.
RENAMED = [
    (r"patch_embed\.", "embeddings.patch_embeddings."),
    (r"^(cls|mask|register)_token", r"embeddings.\1_token"),
    (r"attention\.projection", "attention.o_proj"),
    (r"gamma(\d)", r"layer_scale\1.lambda1"),
    (r"mlp\.(up|down|gate)\.", r"mlp.\1_proj."),
    (r"attention\.([qv])_bias", r"attention.\1_proj.bias"),
    (r"^blocks\.", "model.layer."),
]


def their_name(name: str) -> str:
    for ours, theirs in RENAMED:
        name = re.sub(ours, theirs, name)
    return name


def peer_of(config: ViTConfig):
    settings = transformers.DINOv3ViTConfig(
        hidden_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_hidden,
        use_gated_mlp=config.mlp == "swiglu",
        hidden_act="silu" if config.mlp == "swiglu" else "gelu",
        num_register_tokens=config.num_registers,
        query_bias=True,
        key_bias=False,
        value_bias=True,
        mlp_bias=True,
        layer_norm_eps=1e-5,
    )
    return transformers.DINOv3ViTModel(settings).eval()


def with_weights_of(peer, config: ViTConfig) -> VisionTransformer:
    theirs, ours = peer.state_dict(), dinox_model.build(config)
    mapped = {}
    for name, tensor in ours.state_dict().items():
        if name.endswith("qkv.weight"):
            source = torch.cat([theirs[their_name(name).replace("qkv", f"{part}_proj")] for part in "qkv"])
        else:
            source = theirs[their_name(name)]
        mapped[name] = source.reshape(tensor.shape)
    ours.load_state_dict(mapped)
    return ours.eval()


def perturb(module: torch.nn.Module, seed: int) -> None:
    """Weights at which every part matters: LayerScale near 1, no bias zero, no token zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            near_one = "lambda1" in name or ("norm" in name and name.endswith("weight"))
            parameter.copy_(1.0 + 0.1 * noise if near_one else noise * (0.5 if "token" in name else 0.05))


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (512, 512)])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("masked", [False, True])
def test_all_tokens_are_equal(mlp: str, size: tuple[int, int], masked: bool) -> None:
    torch.manual_seed(0)
    peer = peer_of(SMALL[mlp])
    perturb(peer, seed=1)
    model = with_weights_of(peer, SMALL[mlp])
    x = torch.randn(2, 3, *size)
    masks = torch.rand(2, size[0] * size[1] // 256) < 0.4 if masked else None
    with torch.no_grad():
        theirs = peer(x, bool_masked_pos=masks).last_hidden_state
        ours = model(x, masks)
    joined = torch.cat((ours.cls[:, None], ours.registers, ours.patches), dim=1)
    difference = (joined - theirs).abs().max().item()
    print(f"{mlp} {size} masked={masked}: max |difference| {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_as_many_parameters(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = dinox_model.build(name), peer_of(PRESETS[name])
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
