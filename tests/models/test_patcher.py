"""ModelPatcher: partial loading, unloading and sharing give the same network as loading everything."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import comfy.model_management as management
import comfy.ops
import comfy.utils
from comfy.float import stochastic_rounding
from comfy.model_patcher import ModelPatcher
from comfy.taco_dit import TACODiTModelPatcher

CPU = torch.device("cpu")


class Network(torch.nn.Module):
    """Two linears and a norm, whose weights may be cast or patched at use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = comfy.ops.disable_weight_init.Linear(8, 16)
        self.norm = comfy.ops.disable_weight_init.LayerNorm(16)
        self.second = comfy.ops.disable_weight_init.Linear(16, 4)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)).relu())


def patcher(kind: type[ModelPatcher] = ModelPatcher) -> ModelPatcher:
    """A patcher around a fresh network."""
    return kind(Network(), CPU, CPU)


def difference(key: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """A `diff` patch of a weight."""
    return {key: ("diff", (torch.ones(shape),))}


X = torch.linspace(-1, 1, 24).reshape(3, 8)


@pytest.mark.parametrize("budget", [1, 300, 600, 10**6])
def test_partly_loaded_equals_wholly_loaded(budget: int) -> None:
    whole, part = patcher(), patcher()
    for one in (whole, part):
        one.add_patches(difference("first.weight", (16, 8)), 0.5)
        one.add_patches(difference("second.bias", (4,)), -2.0)
    whole.patch_model(CPU)
    part.patch_model(CPU, lowvram_model_memory=budget)
    assert part.model.model_lowvram == (budget < part.model_size())
    torch.testing.assert_close(part.model(X), whole.model(X))
    assert part.loaded_size() <= max(budget, 0)


def test_partial_unload_keeps_the_result_and_counts_memory() -> None:
    one = patcher()
    one.add_patches(difference("second.weight", (4, 16)), 1.5)
    one.patch_model(CPU)
    before, size = one.model(X), one.loaded_size()
    # On the CPU nothing has moved, so nothing can be freed: asking must be harmless.
    freed = one.partially_unload(CPU, 200)
    assert one.loaded_size() == size - freed
    torch.testing.assert_close(one.model(X), before)


def test_unloading_restores_every_weight() -> None:
    one = patcher()
    originals = {key: value.clone() for key, value in one.model.state_dict().items()}
    places = {key: value.data_ptr() for key, value in one.model.state_dict().items()}
    one.add_patches(difference("first.weight", (16, 8)))
    one.patch_model(CPU)
    assert not one.model.state_dict()["first.weight"].equal(originals["first.weight"])
    assert set(one.backup) == {"first.weight"}
    one.detach()
    after = one.model.state_dict()
    assert all(after[key].equal(originals[key]) for key in originals)
    assert {key: value.data_ptr() for key, value in after.items()} == places
    assert not one.backup


def test_clones_share_the_network_and_take_turns() -> None:
    plain = patcher()
    strong = plain.clone()
    strong.add_patches(difference("first.bias", (16,)), 3.0)
    weak = strong.clone()
    weak.add_patches(difference("first.bias", (16,)), -2.5)
    results = {}
    for name, one in (("plain", plain), ("strong", strong), ("weak", weak), ("plain again", plain)):
        management.load_models_gpu([one])
        results[name] = one.model(X)
    assert plain.is_clone(weak)
    assert not plain.clone_has_same_weights(weak)
    torch.testing.assert_close(results["plain"], results["plain again"])
    assert not torch.equal(results["plain"], results["strong"])
    assert not torch.equal(results["weak"], results["strong"])
    assert strong.patches["first.bias"] is not weak.patches["first.bias"]


def test_options_of_a_clone_are_its_own() -> None:
    one = patcher(TACODiTModelPatcher)
    one.set_model_patch(lambda args: args, "double_block")
    one.set_model_patch_replace(print, "dit", "double_block", 0)
    other = one.clone()
    other.set_model_patch(lambda args: args, "double_block")
    other.set_model_patch_replace(print, "dit", "double_block", 1)
    options = one.model_options["transformer_options"]
    assert len(options["patches"]["double_block"]) == 1
    assert list(options["patches_replace"]["dit"]) == [("double_block", 0)]
    assert isinstance(other, TACODiTModelPatcher)
    assert copy.deepcopy(one).model is not one.model


def test_object_patches_come_and_go() -> None:
    one = patcher()
    before = one.model.second
    one.add_object_patch("second", torch.nn.Identity())
    assert isinstance(one.get_model_object("second"), torch.nn.Identity)
    one.patch_model(CPU)
    assert isinstance(one.model.second, torch.nn.Identity)
    one.unpatch_model(CPU)
    assert one.model.second is before


def test_a_module_replaced_by_somebody_becomes_the_original() -> None:
    one = patcher()
    one.patch_model(CPU)
    one.unpatch_model(CPU)
    one.model.first.weight = torch.nn.Parameter(torch.zeros(16, 8), requires_grad=False)
    one.patch_model(CPU)
    one.unpatch_model(CPU)
    assert not one.model.first.weight.any()


def test_patches_for_unknown_keys_are_not_taken() -> None:
    assert patcher().add_patches(difference("nowhere.weight", (1,))) == []


def test_versions_of_weights_are_never_reused() -> None:
    one, other = patcher(), patcher()
    seen = {one.weight_store.layout_version, other.weight_store.layout_version}
    for each in (one, other):
        each.add_patches(difference("first.bias", (16,)))
        each.patch_model(CPU)
        seen.add(each.weight_store.layout_version)
    assert len(seen) == 4


def test_loaded_models_are_forgotten_with_their_patcher() -> None:
    one = patcher()
    management.load_models_gpu([one])
    assert any(entry.model is one for entry in management.current_loaded_models)
    del one
    other = patcher()
    management.load_models_gpu([other])
    assert all(not entry.is_dead() for entry in management.current_loaded_models)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_stochastic_rounding_is_unbiased_and_reproducible(dtype: torch.dtype) -> None:
    value = torch.full((20000,), 0.3)
    rounded = stochastic_rounding(value, dtype, seed=3)
    assert rounded.float().equal(stochastic_rounding(value, dtype, seed=3).float())
    assert abs(rounded.float().mean().item() - 0.3) < 2e-3
    exact = torch.tensor([0.0, 0.5, -1.0, 448.0 if dtype == torch.float8_e4m3fn else 57344.0])
    assert stochastic_rounding(exact, dtype, seed=1).float().equal(exact)


def test_a_clone_of_a_packs_own_class_is_evaluated_by_ours_and_loads() -> None:
    """As GGUF packs do it: the class is changed while cloning, `load` sets one argument and passes the others on."""

    class Quantised(ModelPatcher):
        def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> None:
            loaded.append(kwargs["lowvram_model_memory"])
            super().load(*args, force_patch_weights=True, **kwargs)

        def clone(self, *args: Any, **kwargs: Any) -> Any:
            before, self.__class__ = self.__class__, Quantised
            other = super().clone(*args, **kwargs)
            self.__class__ = before
            return other

    loaded: list[int] = []
    one = patcher(TACODiTModelPatcher)
    one.taco_parallel = "settings"
    other = Quantised.clone(one)
    assert type(one) is TACODiTModelPatcher and type(other) is type(other.clone()) is Quantised
    assert other.clone().evaluator is TACODiTModelPatcher and other.clone().taco_parallel == "settings"
    other.patch_model(CPU)
    assert loaded == [0]
    other.unpatch_model(CPU)
