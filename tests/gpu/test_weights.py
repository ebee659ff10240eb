"""Weights on a real device: staged whole, streamed where they do not fit, patched in place under captured calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from comfy import accounting

pytestmark = pytest.mark.gpu

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class Layers(torch.nn.Module):
    """Sixteen linears of 8 MiB each, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        import comfy.ops

        generator = torch.Generator().manual_seed(3)
        self.layers = torch.nn.ModuleList(comfy.ops.disable_weight_init.Linear(2048, 2048) for _ in range(16))
        for parameter in self.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (noise / 45).bfloat16()
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def patcher() -> Any:
    from comfy.model_patcher import ModelPatcher

    return ModelPatcher(Layers(), CUDA, CPU)


def draw() -> torch.Tensor:
    """An input."""
    return torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)


def test_staged_weights_are_those_of_the_file(patcher: Any) -> None:
    before = {key: value.clone() for key, value in patcher.model.state_dict().items()}
    patcher.patch_model(CUDA)
    assert all(torch.equal(value.cpu(), before[key]) for key, value in patcher.model.state_dict().items())
    assert all(value.is_cuda for value in patcher.model.state_dict().values())


@pytest.mark.parametrize("pinned", [True, False])
def test_streamed_weights_compute_the_same_at_every_pass(
    patcher: Any, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.weights.pinned

    if not pinned:
        monkeypatch.setattr(comfy.weights.pinned, "BUDGET", 0.0)
    key = "layers.5.weight"
    patcher.add_patches({key: ("diff", (torch.randn(2048, 2048) / 45,))}, 0.5)
    patcher.patch_model(CUDA)
    with torch.inference_mode():
        inputs = [draw() for _ in range(4)]
        whole = [patcher.model(x) for x in inputs]
        patcher.partially_unload(CPU, patcher.model_size() * 3 // 4)
        assert patcher.model.model_lowvram
        accounting.begin("test")
        for x, wanted in zip(inputs, whole):
            assert torch.equal(patcher.model(x), wanted) or (patcher.model(x) - wanted).abs().max() < 0.05
    waiting = patcher.model_size() - patcher.loaded_size()
    moved = accounting.current().counts["weight_bytes"]
    assert moved >= 4 * waiting
    patcher.patch_model(CUDA)
    assert patcher.loaded_size() == patcher.model_size()
    with torch.inference_mode():
        assert torch.equal(patcher.model(inputs[0]), whole[0])


def test_patches_go_into_the_memory_a_captured_graph_reads(patcher: Any) -> None:
    patcher.patch_model(CUDA)
    x = draw()
    with torch.inference_mode():
        plain = patcher.model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = patcher.model(x)
        patched = patcher.clone()
        patched.add_patches({"layers.3.weight": ("diff", (torch.randn(2048, 2048) / 45,))}, 1.0)
        for one in (patched, patcher):
            one.patch_model(CUDA)
            graph.replay()
            assert torch.equal(out, patcher.model(x))
        assert torch.equal(out, plain)
