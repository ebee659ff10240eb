"""Packs with patchers and weight formats of their own: they keep working, on clones too, and leave nothing behind."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import comfy.model_management as management
import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy.taco_dit import TACODiTModelPatcher
from tests import tiny_models
from tests.models.test_patcher import CPU, Network, X, difference
from tests.text import tiny

SAMPLE = Path(__file__).parents[1] / "packs" / "samples" / "own_weights" / "__init__.py"
LINEAR = "diffusion_model.double_blocks.0.img_mlp.0.weight"


@pytest.fixture(scope="module")
def pack() -> Any:
    """The sample pack."""
    spec = importlib.util.spec_from_file_location("own_weights", SAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def nothing_loaded() -> Any:
    management.unload_all_models()
    yield
    management.unload_all_models()


def flux() -> dict[str, torch.Tensor]:
    return tiny_models.random_weights(tiny_models.flux_shapes(), 3)


def packed(pack: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: pack.pack(value) if value.ndim == 2 and min(value.shape) > 8 else value for key, value in weights.items()}


def unpacked(pack: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What those weights stand for."""
    packs = packed(pack, weights)
    return {k: pack.unpack(v, torch.float32) if isinstance(v, pack.Packed) else v for k, v in packs.items()}


def call() -> list[torch.Tensor]:
    """What the network is called with."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 16, 6, 4), (1, 5, tiny_models.T5_WIDTH), (1, tiny_models.CLIP_WIDTH))
    x, context, y = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x, torch.tensor([0.5]), context, y, torch.tensor([3.5])]


def predict(patcher: Any) -> torch.Tensor:
    """A call of the network as a patcher has it."""
    management.load_models_gpu([patcher])
    return patcher.model.diffusion_model(*call())


def lora() -> dict[str, Any]:
    shape = flux()[LINEAR.removeprefix("diffusion_model.")].shape
    return {LINEAR: ("diff", (torch.full(shape, 0.05),))}


@pytest.fixture(params=["in place", "copied", "half in host memory"])
def loaded(pack: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pack's patcher of a network whose packed weights stay, are copied to a device, or partly fit on it."""
    model = comfy.sd.load_diffusion_model_state_dict(packed(pack, flux()), {"custom_operations": pack.PackedOps()})
    patcher = pack.PackedPatcher.clone(model)
    patcher.weight_store.always_copy = request.param != "in place"
    if request.param == "half in host memory":
        capacity = patcher.model_size() // 2
        monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
        monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
        monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
        free = lambda device=None, torch_free_too=False: capacity - patcher.weight_store.loaded_bytes  # noqa: E731
        monkeypatch.setattr(management, "get_free_memory", free)
    return patcher


def test_a_format_of_a_pack_computes_and_is_patched(pack: Any, loaded: Any) -> None:
    want = comfy.sd.load_diffusion_model_state_dict(unpacked(pack, flux()))
    want_patched = want.clone()
    assert want_patched.add_patches(lora(), 0.5) == [LINEAR]
    patched = loaded.clone()
    assert type(patched) is pack.PackedPatcher and patched.add_patches(lora(), 0.5) == [LINEAR]
    pack.PackedPatcher.calls.clear()
    for _ in range(2):
        torch.testing.assert_close(predict(loaded), predict(want), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(predict(patched), predict(want_patched), atol=2e-5, rtol=1e-4)
    assert {"load", "unpatch_model"} <= set(pack.PackedPatcher.calls)
    del patched
    gc.collect()
    torch.testing.assert_close(predict(loaded), predict(want), atol=2e-5, rtol=1e-4)
    assert not any(getattr(weight, "patches", None) for weight in loaded.model.parameters())


def test_room_that_is_made_keeps_the_patches(pack: Any, loaded: Any) -> None:
    loaded.add_patches(lora())
    before = predict(loaded)
    loaded.partially_unload(CPU, loaded.loaded_size())
    torch.testing.assert_close(loaded.model.diffusion_model(*call()), before)
    loaded.detach()
    assert not any(getattr(weight, "patches", None) for weight in loaded.model.parameters())


def test_scales_in_the_file_stay_as_precise_as_they_are(pack: Any) -> None:
    """Weights that a pack's layer takes by itself are not cast to the network's dtype."""
    half = {key: value.to(torch.bfloat16) for key, value in flux().items()}
    half["single_blocks.0.linear2.bias"] = flux()["single_blocks.0.linear2.bias"]
    model = comfy.sd.load_diffusion_model_state_dict(
        half, {"custom_operations": pack.PackedOps, "dtype": torch.bfloat16}
    )
    network = model.model.diffusion_model
    assert network.single_blocks[0].linear2.bias.dtype == torch.float32
    assert network.single_blocks[0].linear1.bias.dtype == torch.bfloat16


def test_a_patcher_of_a_pack_keeps_the_engine(pack: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of a network that was loaded for several ranks are spread, whoever made the patcher."""
    loaded.taco_parallel = settings = object()
    seen = []
    monkeypatch.setattr(
        TACODiTModelPatcher, "evaluate_batches", lambda self, *rest: seen.append((self, self.taco_parallel))
    )
    clone = loaded.clone()
    clone.evaluate_batches(clone.model, [], {})
    assert seen == [(clone, settings)]


def test_text_encoders_without_projection(pack: Any) -> None:
    parts = [tiny.clip_l(projection=False), tiny.t5()]
    kinds = {"clip_type": comfy.sd.CLIPType.FLUX}
    want = comfy.sd.load_text_encoder_state_dicts([unpacked(pack, part) for part in parts], **kinds)
    clip = comfy.sd.load_text_encoder_state_dicts(
        [packed(pack, part) for part in parts], model_options={"custom_operations": pack.PackedOps}, **kinds
    )
    clip.patcher = pack.PackedPatcher.clone(clip.patcher)
    for made, known in zip(*(c.encode_from_tokens(c.tokenize("a (small:1.2) test"), True) for c in (clip, want))):
        torch.testing.assert_close(made, known, atol=1e-4, rtol=1e-4)


# ---- methods that packs replace --------------------------------------------------------------------------------------


@pytest.fixture
def one() -> ModelPatcher:
    made = ModelPatcher(Network(), CPU, CPU)
    made.weight_store.always_copy = True
    return made


@pytest.mark.parametrize("method", ["patch_model", "load", "partially_load"])
def test_methods_replaced_on_an_object_are_called(one: ModelPatcher, method: str) -> None:
    """As packs do it: keep the method that was there, call it with what one was given, add something."""
    before, seen = getattr(one, method), []

    def replaced(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return before(*args, **kwargs)

    setattr(one, method, replaced)
    plain = ModelPatcher(Network(), CPU, CPU)
    plain.patch_model(CPU)
    management.load_models_gpu([one])
    assert len(seen) == 1 and torch.equal(one.model(X), plain.model(X))
    assert one.loaded_size() == one.model_size()
    other = one.clone()
    management.load_models_gpu([other])
    assert len(seen) == 1, "a clone has the methods of its class"


def test_methods_replaced_on_the_class_are_called(one: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    before, budgets = ModelPatcher.partially_load, []

    def less(self: Any, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        budgets.append(extra_memory)
        return before(self, device_to, 300, force_patch_weights)

    monkeypatch.setattr(ModelPatcher, "partially_load", less)
    want = one.model(X)
    management.load_models_gpu([one])
    assert budgets[0] > one.model_size() and 0 < one.loaded_size() <= 300
    torch.testing.assert_close(one.model(X), want)


@pytest.mark.parametrize("dead", [False, True])
def test_a_patch_model_that_does_something_else_leaves_loading_to_load(one: ModelPatcher, dead: bool) -> None:
    class Pack(ModelPatcher):
        def patch_model(self, device_to: Any = None, *args: Any, load_weights: bool = True, **kwargs: Any) -> Any:
            self.asked = load_weights
            self.model.second.extra = 1
            return self.model

        def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
            vars(self.model.second).pop("extra", None)
            super().unpatch_model(device_to, unpatch_weights)

    pack = Pack(one.model, CPU, CPU)
    pack.add_patches(difference("second.weight", (4, 16)))
    plain = one.model.second.weight.clone()
    management.load_models_gpu([pack])
    assert pack.asked is False and torch.equal(one.model.second.weight, plain + 1) and one.model.second.extra == 1
    if dead:
        del pack
        gc.collect()
    management.load_models_gpu([one])
    assert torch.equal(one.model.second.weight, plain) and not hasattr(one.model.second, "extra")


def test_what_weights_pass_through_moves_with_them(one: ModelPatcher) -> None:
    class Function:
        places: list[str] = []

        def move_to(self, device: Any) -> int:
            self.places.append(str(device))
            return 1

        def __call__(self, weight: torch.Tensor) -> torch.Tensor:
            return weight

    from comfy.model_patcher import move_weight_functions

    one.add_weight_wrapper("first.weight", Function())
    management.load_models_gpu([one])
    assert move_weight_functions(one.model.first, CPU) == 1
    one.detach()
    assert Function.places == ["cpu"] * 3 and not one.model.first.weight_function


def test_nothing_of_a_pack_keeps_a_network() -> None:
    """The patcher that could undo its changes is kept without the network, which goes when nobody holds it."""
    import types
    import weakref

    one = ModelPatcher(Network(), CPU, CPU)
    one.unpatch_model = types.MethodType(lambda self, *args, **kwargs: None, one)
    management.load_models_gpu([one])
    network = weakref.ref(one.model)
    del one
    gc.collect()
    management.cleanup_models_gc()
    gc.collect()
    assert network() is None
