"""Weights stay where they are: loading again, changing patches and clones touch only what differs.

`always_copy` makes the CPU a device of its own, so that placed weights are copies as on a GPU.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

import comfy.model_management as management
from comfy import accounting
from comfy.model_patcher import ModelPatcher
from tests.models.test_patcher import CPU, Network, X, difference


@pytest.fixture
def one() -> ModelPatcher:
    """A patcher whose network's weights must be copied to be used."""
    made = ModelPatcher(Network(), CPU, CPU)
    made.weight_store.always_copy = True
    return made


def copied(action: Any) -> int:
    """Bytes of weights that `action` copies."""
    before = accounting.begin("test").counts.get("weight_bytes", 0)
    action()
    return accounting.current().counts.get("weight_bytes", 0) - before


def addresses(patcher: ModelPatcher) -> dict[str, int]:
    """Where each weight is."""
    return {key: value.data_ptr() for key, value in patcher.model.state_dict().items()}


def small_card(monkeypatch: pytest.MonkeyPatch, patcher: ModelPatcher, capacity: int) -> None:
    """Let a GPU have `capacity` bytes for weights and nothing else."""
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    free = lambda device=None, torch_free_too=False: capacity - patcher.weight_store.loaded_bytes  # noqa: E731
    monkeypatch.setattr(management, "get_free_memory", free)
    monkeypatch.setattr(management, "get_total_memory", lambda device=None, torch_total_too=False: capacity)


def test_what_is_in_place_is_not_copied_again(one: ModelPatcher) -> None:
    size = one.model_size()
    assert copied(lambda: management.load_models_gpu([one])) == size
    version, places = one.weight_store.layout_version, addresses(one)
    assert copied(lambda: management.load_models_gpu([one])) == 0
    assert copied(lambda: management.load_models_gpu([one.clone()])) == 0
    assert (one.weight_store.layout_version, addresses(one)) == (version, places)
    assert one.loaded_size() == size


def test_patches_are_written_into_the_memory_that_is_there(one: ModelPatcher) -> None:
    management.load_models_gpu([one])
    plain, places, version = one.model(X), addresses(one), one.weight_store.layout_version
    strong, weak = one.clone(), one.clone()
    strong.add_patches(difference("first.weight", (16, 8)), 0.5)
    weak.add_patches(difference("first.weight", (16, 8)), 0.25)
    results = []
    for patcher in (strong, weak, strong, one):
        assert copied(lambda patcher=patcher: management.load_models_gpu([patcher])) == 0, "from the kept original"
        results.append(one.model(X))
        assert (addresses(one), one.weight_store.layout_version) == (places, version)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[3], plain)
    fresh = ModelPatcher(Network(), CPU, CPU)
    fresh.add_patches(difference("first.weight", (16, 8)), 0.25)
    fresh.patch_model(CPU)
    assert torch.equal(results[1], fresh.model(X))


def test_without_kept_originals_patches_come_from_the_source(one: ModelPatcher) -> None:
    management.load_models_gpu([one])
    patched, plain = one.clone(), one.model(X)
    patched.add_patches(difference("second.weight", (4, 16)), 1.5)
    management.load_models_gpu([patched])
    want = one.model(X)
    one.weight_store.release_pristine()
    weight = one.model.second.weight
    assert copied(lambda: management.load_models_gpu([one])) == weight.nbytes
    assert torch.equal(one.model(X), plain)
    management.load_models_gpu([patched])
    one.weight_store.release_pristine()
    other = one.clone()
    other.add_patches(difference("second.weight", (4, 16)), 1.5)
    management.load_models_gpu([other])
    assert torch.equal(one.model(X), want)


@pytest.mark.parametrize("capacity", [300, 700])
def test_a_network_that_does_not_fit_is_the_same_at_every_run(
    one: ModelPatcher, monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    whole = ModelPatcher(Network(), CPU, CPU)
    for patcher in (whole, one):
        patcher.add_patches(difference("first.weight", (16, 8)), 0.5)
        patcher.add_patches(difference("second.weight", (4, 16)), 0.5)
    whole.patch_model(CPU)
    want = whole.model(X)
    small_card(monkeypatch, one, capacity)
    loaded = set()
    for _ in range(3):
        management.load_models_gpu([one])
        torch.testing.assert_close(one.model(X), want)
        loaded.add(one.loaded_size())
        assert [len(m.weight_function) for m in (one.model.first, one.model.second)] in ([1, 0], [0, 1], [1, 1])
    assert len(loaded) == 1
    assert loaded.pop() <= capacity


def test_saving_on_a_small_card_saves_patched_weights(one: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    before = one.model.second.weight.clone()
    one.add_patches(difference("second.weight", (4, 16)))
    small_card(monkeypatch, one, 100)
    management.load_models_gpu([one], force_patch_weights=True)
    assert torch.equal(one.model.state_dict()["second.weight"], before + 1)
    want = one.model(X)
    management.load_models_gpu([one])  # and computing with it afterwards does not patch twice
    torch.testing.assert_close(one.model(X), want)


def test_a_positional_force_patch_weights_is_taken(one: ModelPatcher) -> None:
    one.add_patches(difference("second.weight", (4, 16)))
    before = one.model.second.weight.clone()
    one.load(CPU, 1, True)
    assert torch.equal(one.model.state_dict()["second.weight"], before + 1)


@pytest.mark.parametrize("dead", [False, True])
def test_plain_patched_plain_gives_the_plain_network(one: ModelPatcher, dead: bool) -> None:
    management.load_models_gpu([one])
    plain = one.model(X)
    patched = one.clone()
    patched.add_object_patch("second", torch.nn.Identity())
    management.load_models_gpu([patched])
    assert isinstance(one.model.second, torch.nn.Identity)
    if dead:
        del patched
        gc.collect()
    assert copied(lambda: management.load_models_gpu([one])) == 0
    assert torch.equal(one.model(X), plain)
    if not dead:
        management.load_models_gpu([patched])
        assert isinstance(one.model.second, torch.nn.Identity)
        patched.unpatch_model(CPU)
        assert not isinstance(one.model.second, torch.nn.Identity)


def test_a_network_outlives_the_clone_that_loaded_it(one: ModelPatcher) -> None:
    clone = one.clone()
    management.load_models_gpu([clone])
    del clone
    gc.collect()
    entries = [entry for entry in management.current_loaded_models if entry.model is one]
    assert len(entries) == 1, "so that its memory can still be asked for"
    entries[0].model_unload()
    assert one.loaded_size() == 0


def test_a_subclass_that_patches_by_itself_is_asked_and_undone(one: ModelPatcher) -> None:
    class Pack(ModelPatcher):
        def patch_weight_to_device(self, key: str, device_to: Any = None, inplace_update: bool = False) -> None:
            weight = getattr(self.model, key.split(".")[0]).weight
            self.model.second.weight = torch.nn.Parameter(weight * 2, requires_grad=False)

    pack = Pack(one.model, CPU, CPU)
    pack.add_patches(difference("second.weight", (4, 16)))
    management.load_models_gpu([one])
    plain = one.model.second.weight.clone()
    for _ in range(2):
        management.load_models_gpu([pack])
        assert torch.equal(one.model.second.weight, plain * 2)
    management.load_models_gpu([one])
    assert torch.equal(one.model.second.weight, plain)


def test_hooks_write_into_the_memory_that_is_there(one: ModelPatcher) -> None:
    import comfy.hooks

    management.load_models_gpu([one])
    plain, places, version = one.model(X), addresses(one), one.weight_store.layout_version
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)
    hook.weights = difference("first.weight", (16, 8))
    group = comfy.hooks.HookGroup()
    group.add(hook)
    one.add_hook_patches(hook, difference("first.weight", (16, 8)), 0.5)
    one.patch_hooks(group)
    assert not torch.equal(one.model(X), plain)
    one.patch_hooks(None)
    assert torch.equal(one.model(X), plain)
    assert (addresses(one), one.weight_store.layout_version) == (places, version)


def test_wrappers_of_weights_belong_to_their_clone(one: ModelPatcher) -> None:
    management.load_models_gpu([one])
    plain = one.model(X)
    wrapped = one.clone()
    wrapped.add_weight_wrapper("first.weight", lambda weight: weight * 0)
    for _ in range(2):
        management.load_models_gpu([wrapped])
        assert len(one.model.first.weight_function) == 1
        assert not torch.equal(one.model(X), plain)
    management.load_models_gpu([one])
    assert torch.equal(one.model(X), plain)


def test_a_deep_copy_has_weights_of_its_own(one: ModelPatcher) -> None:
    one.add_patches(difference("first.weight", (16, 8)))
    management.load_models_gpu([one])
    other = copy.deepcopy(one)
    want = one.model(X)
    assert torch.equal(other.model(X), want)
    one.detach()
    assert torch.equal(other.model(X), want)
    other.detach()
    assert torch.equal(other.model(X), one.model(X))


def test_room_is_made_by_the_network_used_longest_ago(one: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [ModelPatcher(Network(), CPU, CPU) for _ in range(2)]
    for patcher in others:
        patcher.weight_store.always_copy = True
    everyone = [one, *others]
    size = one.model_size()
    management.unload_all_models()
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    free = lambda device=None, torch_free_too=False: int(2.5 * size) - sum(p.loaded_size() for p in everyone)  # noqa: E731
    monkeypatch.setattr(management, "get_free_memory", free)
    for patcher in everyone:
        management.load_models_gpu([patcher])
    assert others[1].loaded_size() == others[0].loaded_size() == size
    assert one.loaded_size() < size


def test_copies_on_their_way_are_not_used_for_a_weight_that_was_replaced() -> None:
    from comfy.weights.streaming import WeightStream

    layer = Network().first
    stream = WeightStream.__new__(WeightStream)
    stream._pending = {}
    assert not stream._is_coming(layer)
    stream._pending[id(layer)] = ({}, lambda: None, 0, (layer.weight, layer.bias))
    assert stream._is_coming(layer)
    layer.weight = torch.nn.Parameter(torch.zeros(16, 8), requires_grad=False)  # as hooks do between two calls
    assert not stream._is_coming(layer)


def test_tensors_of_other_classes_are_brought_anew_when_patches_go(one: ModelPatcher) -> None:
    class Quantised(torch.Tensor):
        pass

    stored = torch.randn(4, 16).as_subclass(Quantised)
    one.model.second.weight = torch.nn.Parameter(stored, requires_grad=False)
    patched = one.clone()
    patched.add_patches(difference("second.weight", (4, 16)))
    management.load_models_gpu([patched])
    before = one.model.second.weight
    management.load_models_gpu([one])
    assert one.model.second.weight is not before, "its own patches would have stayed with it"
    assert torch.equal(one.model.second.weight.as_subclass(torch.Tensor), stored.as_subclass(torch.Tensor))
