"""docs/lora.md keeps its word: its example runs with `peft`, every named module takes part, merging changes nothing.

Skips without peft, but for the names.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from parity import all_tokens
from torch import nn

import dinox_model
from dinox_model import ViTConfig
from tests.model.foreign_weights import SMALL, perturbed

TARGETS = ["qkv", "projection", "gate", "up", "down"]


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", ["none", "full", "k_masked"])
def test_every_linear_of_a_block_has_one_of_the_names_and_is_called(mlp: str, bias: str) -> None:
    """A linear whose weight is used past the module would leave an adapter around it without effect."""
    model = perturbed(ViTConfig.from_dict(SMALL.to_dict() | {"mlp": mlp, "qkv_bias": bias}))
    called: set[str] = set()
    linears = {name: module for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linears.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(torch.randn(1, 3, 32, 32))
    assert called == set(linears)
    assert {name.rpartition(".")[2] for name in linears} == set(TARGETS) - (set() if mlp == "swiglu" else {"gate"})


@pytest.mark.parametrize("bias", ["none", "full", "k_masked"])
def test_adapters_start_as_nothing_learn_and_merge(bias: str) -> None:
    peft = pytest.importorskip("peft")
    model = perturbed(dataclasses.replace(SMALL, qkv_bias=bias))
    x = torch.randn(2, 3, 32, 32)
    before = all_tokens(model(x)).detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    assert torch.equal(all_tokens(adapted(x)), before)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 4 * SMALL.num_layers
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05)
    all_tokens(adapted(x)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained.values())
    learned = all_tokens(adapted(x)).detach()
    assert (learned - before).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    assert merged.state_dict().keys() == dinox_model.build(model.config).state_dict().keys()
    assert (all_tokens(merged(x)) - learned).abs().max() < 1e-4


def test_the_documented_example_runs(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", (repository / "docs/lora.md").read_text(), re.M | re.S))
    dinox_model.save(perturbed(SMALL), tmp_path / "network")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/lora.md", "exec"), {})  # noqa: S102 (the example of our own documentation)
    dinox_model.load(tmp_path / "tuned")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
