"""Parts of weights: only what is held is copied; patches are those of the whole weight."""

from __future__ import annotations

import pytest
import torch

import comfy.model_management as management
from comfy import ops
from comfy.model_patcher import ModelPatcher
from comfy.weights.held import Held
from tests.models.test_patcher import CPU, Network, difference
from tests.models.test_weight_store import addresses, copied

PARTS = {
    "first.weight": Held(((1, 4), (9, 12))), "first.bias": Held(((1, 4), (9, 12))),
    "second.weight": Held(((3, 5), (6, 7)), axis=1), "second.bias": Held(),
}  # fmt: skip


@pytest.fixture
def one() -> ModelPatcher:
    return ModelPatcher(Network(), CPU, CPU)


def parts(patcher: ModelPatcher) -> dict[str, torch.Tensor]:
    """Copies of what the network has."""
    return {key: value.clone() for key, value in patcher.model.state_dict().items()}


def whole(patches: dict[str, float]) -> dict[str, torch.Tensor]:
    """The weights of a network that is held wholly."""
    patcher = ModelPatcher(Network(), CPU, CPU)
    for key, strength in patches.items():
        patcher.add_patches(difference(key, tuple(patcher.model.state_dict()[key].shape)), strength)
    patcher.patch_model(CPU)
    return parts(patcher)


def check(patcher: ModelPatcher, wanted: dict[str, torch.Tensor]) -> None:
    for key, value in patcher.model.state_dict().items():
        held = PARTS.get(key)
        same = wanted[key] if held is None or not held.slices else held.take(wanted[key])
        assert torch.equal(value, same), key


def test_parts_of_weights_that_are_patched_and_restored(one: ModelPatcher) -> None:
    sources = {key: one.weight_store.source(key).clone() for key in one.model.state_dict()}
    one.weight_store.hold(PARTS)
    management.load_models_gpu([one])
    check(one, whole({}))
    places, version = addresses(one), one.weight_store.layout_version
    assert copied(lambda: management.load_models_gpu([one])) == 0
    patched = one.clone()
    patched.add_patches(difference("first.weight", (16, 8)), 0.5)
    patched.add_patches(difference("second.weight", tuple(sources["second.weight"].shape)), 0.25)
    for patcher, strengths in ((patched, {"first.weight": 0.5, "second.weight": 0.25}), (one, {}), (patched.clone(), {
        "first.weight": 0.5, "second.weight": 0.25})):  # fmt: skip
        management.load_models_gpu([patcher])
        check(patcher, whole(strengths))
        assert (addresses(one), one.weight_store.layout_version) == (places, version), "written in place"
    for key, value in sources.items():
        assert torch.equal(one.weight_store.source(key), value), "originals are whole and as they were"
    one.weight_store.hold({})
    management.load_models_gpu([one])
    assert {key: value.shape for key, value in parts(one).items()} == {key: v.shape for key, v in sources.items()}


def test_only_what_is_held_is_counted_and_copied(one: ModelPatcher) -> None:
    one.weight_store.always_copy = True
    all_of_it = one.model_size()
    one.weight_store.hold(PARTS)
    first, second = one.weight_store.source("first.weight"), one.weight_store.source("second.weight")
    kept = (6 * first.shape[1] + 6 + 3 * second.shape[0]) * 4
    named = sum(one.weight_store.source(key).nbytes for key in PARTS)
    assert one.model_size() == kept + all_of_it - named
    assert copied(lambda: management.load_models_gpu([one])) == one.model_size() == one.loaded_size()
    one.detach()
    assert one.loaded_size() == 0 and one.model.first.weight.shape == (16, 8)


def test_flat_parts(one: ModelPatcher) -> None:
    one.weight_store.hold({"first.weight": Held(((5, 77),), axis=None)})
    management.load_models_gpu([one])
    assert torch.equal(one.model.first.weight.data, whole({})["first.weight"].view(-1)[5:77])


def test_scales_and_rounding_are_those_of_the_whole_weight() -> None:
    operations = ops.scaled_fp8_ops()

    def made() -> ModelPatcher:
        layer = operations.Linear(8, 16, bias=False)
        layer.weight = torch.nn.Parameter(torch.linspace(-3, 3, 128).view(16, 8).to(torch.float8_e4m3fn), False)
        layer.scale_weight.data.fill_(0.5)
        patcher = ModelPatcher(torch.nn.ModuleDict({"layer": layer}), CPU, CPU)
        patcher.add_patches(difference("layer.weight", (16, 8)), 0.3)
        return patcher

    one, other = made(), made()
    held = Held(((3, 9),), axis=1 - 1)
    one.weight_store.hold({"layer.weight": held})
    for patcher in (one, other):
        patcher.patch_model(CPU)
    part, all_of_it = (p.model["layer"].weight.data.float() for p in (one, other))
    assert torch.equal(part, all_of_it[3:9])


def test_a_method_of_its_own_finds_the_whole_weight(one: ModelPatcher) -> None:
    class Other(ModelPatcher):
        def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False):
            weight = self.model.first.weight
            self.model.first.weight = torch.nn.Parameter(weight + torch.arange(128.0).view(16, 8), False)

    other = Other(Network(), CPU, CPU)
    other.add_patches(difference("first.weight", (16, 8)), 0.5)
    other.weight_store.hold(PARTS)
    other.patch_model(CPU)
    wanted = whole({})["first.weight"] + torch.arange(128.0).view(16, 8)
    assert torch.equal(other.model.first.weight.data, PARTS["first.weight"].take(wanted))


def test_parts_that_cannot_be(one: ModelPatcher) -> None:
    with pytest.raises(ValueError, match=r"slices \(\(3, 17\),\) along axis 0 of a weight of shape \(16, 8\)"):
        one.weight_store.hold({"first.weight": Held(((3, 17),))})

    class Packed(torch.Tensor):
        """A pack's format."""

    one.model.first.weight = torch.nn.Parameter(one.model.first.weight.data.as_subclass(Packed), False)
    with pytest.raises(ValueError, match=r"first.weight is stored as \w+, of which no part can be held"):
        one.weight_store.hold({"first.weight": Held(((3, 6),))})
