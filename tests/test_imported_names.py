"""What popular packs import exists: it works, or says that its feature is missing when it is used."""

from __future__ import annotations

import asyncio
import importlib
import operator
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import comfy.missing
from comfy.missing import FeatureMissingError

NEWER, REMOVED, OTHERS, NOT_THERE = (
    "newer than ComfyUI 0.3.64; packs look for it and do without",
    "gone before ComfyUI 0.3.64; packs look for it and do without",
    "of a pack's own network or object",
    "not in ComfyUI either: packs look whether somebody put it there",
)
# names (with what is below them) that do not resolve -> why
ABSENT = {
    "comfy.context_windows.create_sampler_sample_wrapper": NEWER,
    "comfy.k_diffusion.sampling.default_noise_sampler.init": NOT_THERE,
    "comfy.k_diffusion.sampling.torch.init": NOT_THERE,
    "comfy.latent_formats.HunyuanVideo15": NEWER,
    "comfy.ldm.hidream_o1.model.IMAGE_TOKEN_ID": NEWER,
    "comfy.ldm.lightricks.vae.audio_vae.LATENT_DOWNSAMPLE_FACTOR": NEWER,
    "comfy.ldm.modules.attention._ATTN_PRECISION": REMOVED,
    "comfy.model_base.BaseModel().diffusion_model.dtype": OTHERS,
    "comfy.model_patcher.ModelPatcherDynamic": NEWER,
    "comfy.model_patcher.QuantizedTensor": NEWER,
    "comfy.model_patcher.low_vram_patch_estimate_vram": NEWER,
    "comfy.model_patcher.ModelPatcher().model.diffusion_model": OTHERS,
    "comfy.model_patcher.ModelPatcher().model_keys": REMOVED,
    "comfy.model_sampling.IMG_TO_IMG_FLOW": NEWER,
    "comfy.multigpu": NEWER,
    "comfy.ops.linear_input_act": NEWER,
    "comfy.quant_ops": NEWER,
    "comfy.sample.prepare_mask": REMOVED,
    "comfy.samplers.CFGNoisePredictor": REMOVED,
    "comfy.samplers.KSampler.SAMPLERS.replace": NOT_THERE,
    "comfy.samplers.KSampler.SAMPLERS.startswith": NOT_THERE,
    "comfy.samplers.KSampler.SCHEDULERS.replace": NOT_THERE,
    "comfy.samplers.KSampler.SCHEDULERS.startswith": NOT_THERE,
    "comfy.samplers.calculate_sigmas_scheduler": REMOVED,
    "comfy.samplers.cast_transformer_options": NEWER,
    "comfy.samplers.wrap_model": REMOVED,
    "comfy.sd.load_controlnet": REMOVED,
    "comfy.sd3_clip": REMOVED,
    "comfy.weight_adapter.BypassInjectionManager": NEWER,
    "comfy_extras.nodes_custom_sampler.SamplerCustom.execute": NEWER,
    "comfy_extras.nodes_custom_sampler.SamplerCustomAdvanced().execute": NEWER,
    "comfy_extras.nodes_mask.ImageCompositeMasked.execute": NEWER,
    "comfy_extras.nodes_model_advanced.ModelSamplingFlux().patch_aura": REMOVED,
    "comfy_extras.nodes_model_advanced.rescale_zero_terminal_snr_sigmas": REMOVED,
    "latent_preview.get_previewer.__wrapped__": NOT_THERE,
    "nodes.VAEEncode.vae_encode_crop_pixels": REMOVED,
}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    import nodes

    comfy.missing.provide_modules()
    asyncio.run(nodes.init_builtin_extra_nodes())


def listed() -> dict[str, list[str]]:
    """The names by module."""
    lines = (Path(__file__).parent / "imported_names.txt").read_text().splitlines()[2:]
    modules = (line.partition(": ") for line in lines)
    return {module: [entry.partition("=")[0].lstrip("+-") for entry in names.split()] for module, _, names in modules}


def instance(kind: Any) -> Any:
    """An object of a class, where its attributes are not all those of the class; else the class itself."""
    import torch

    from comfy.clip_vision import Output
    from comfy.hooks import WrapperHook
    from comfy.k_diffusion.sampling import DPMSolver
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import KSampler
    from comfy.utils import ProgressBar

    if kind is ModelPatcher:
        return ModelPatcher(torch.nn.Linear(1, 1), torch.device("cpu"), torch.device("cpu"))
    if kind is DPMSolver:
        return DPMSolver(None)
    if kind in (BaseModel, KSampler):
        return SimpleNamespace(**{name: getattr(kind, name) for name in dir(kind)}, diffusion_model=torch.nn.Linear(1, 1),
                               sigmas=torch.zeros(1))  # fmt: skip
    if kind is Output:
        return SimpleNamespace(penultimate_hidden_states=None)
    if kind is ProgressBar:
        return ProgressBar(1)
    return WrapperHook() if kind is WrapperHook else kind


def resolve(module: str, path: str) -> None:
    """Raises ImportError, AttributeError or KeyError where a name is missing."""
    value = importlib.import_module(module)
    for part in re.findall(r"\w+|\(\)|\[[^\]]*\]", "" if path == "(module)" else path):
        if part == "()":
            if not isinstance(value, type):
                return  # what a function or node returns
            value = instance(value)
        elif part.startswith("["):
            if not part.startswith('["'):
                return
            value = value[part[2:-2]]
        elif hasattr(value, part) or not isinstance(value, ModuleType):
            value = getattr(value, part)
        else:
            value = importlib.import_module(f"{value.__name__}.{part}")


@pytest.mark.parametrize("module", listed())
def test_names(module: str) -> None:
    missing, unexpected = [], []
    for path in listed()[module]:
        name = module if path == "(module)" else f"{module}.{path}"
        absent = any(name == known or name.startswith((f"{known}.", f"{known}(")) for known in ABSENT)
        if module == "server" and path.startswith("PromptServer.instance"):
            continue  # see test_the_server_of_packs
        try:
            resolve(module, path)
        except (ImportError, AttributeError, KeyError) as error:
            missing += [] if absent else [f"{name}: {error}"]
        else:
            unexpected += [name] if absent else []
    assert missing == [] and unexpected == []


def test_the_server_of_packs() -> None:
    """`PromptServer.instance` has what packs reach through it."""
    from execution import PromptQueue
    from server import PromptServer

    loop = asyncio.new_event_loop()
    before = getattr(PromptServer, "instance", None)
    try:
        PromptQueue(PromptServer(loop, listening=False))
        PromptServer.instance.last_node_id = PromptServer.instance.client_id = "1"
        PromptServer.instance.address = "127.0.0.1"
        for path in listed()["server"]:
            if path.startswith("PromptServer.instance"):
                resolve("server", path)
    finally:
        PromptServer.instance = before
        loop.close()


def test_the_list_is_whole() -> None:
    names = listed()
    assert len(names) >= 140 and sum(map(len, names.values())) >= 1500 and len(ABSENT) <= 40
    assert not [name for name in ABSENT if not any(name.startswith(module) for module in names)]


@pytest.mark.parametrize(
    "name",
    ["comfy.sd1_clip", "comfy.sdxl_clip", "comfy.clip_vision", "comfy.controlnet", "comfy.text_encoders.sd3_clip",
     "comfy.ldm.flux.model", "comfy.ldm.modules.diffusionmodules.openaimodel", "comfy_extras.nodes_upscale_model"],
)  # fmt: skip
def test_modules_are_attributes_of_their_packages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ComfyUI's start, whether or not somebody imported them, and however node packs are loaded."""
    package, _, module = name.rpartition(".")
    if module in vars(importlib.import_module(package)):
        monkeypatch.delattr(importlib.import_module(package), module)
    value = importlib.import_module(name.partition(".")[0])
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    assert value is sys.modules[name]


def test_what_is_no_module_is_no_attribute() -> None:
    import comfy.ldm

    for name in ("quant_ops", "__wrapped__", "Nothing"):
        assert not hasattr(comfy, name) and not hasattr(comfy.ldm, name)


def test_a_missing_family_can_be_asked_for():
    from comfy.ldm.anima.model import Anima, rope_of

    import comfy.model_base
    import comfy.supported_models

    assert not isinstance(object(), comfy.model_base.SVD_img2vid) and not isinstance(object(), Anima)
    assert comfy.supported_models.SD15 is not None
    with pytest.raises(FeatureMissingError, match="the model family of SVD_img2vid is not in this version"):
        comfy.model_base.SVD_img2vid()
    with pytest.raises(FeatureMissingError, match="comfy.ldm.anima is not in this version"):
        rope_of(8, None)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        comfy.model_base.Nothing  # noqa: B018
    import comfy.ldm.anima.model as again

    assert again.Anima is Anima


def test_types_of_v1_nodes():
    from comfy.comfy_types import IO, CheckLazyMixin

    differs = operator.ne  # what validation of links asks
    assert IO.INT == "INT" and not differs(IO.NUMBER, "INT") and differs(IO.NUMBER, "IMAGE")
    assert not differs(IO.ANY, "X") and differs(IO.INT, "FLOAT")
    assert CheckLazyMixin().check_lazy_status(a=None, b=1) == ["a"]


def test_hint_and_weight_decomposition():
    import torch

    from comfy.sd import model_detection_error_hint
    from comfy.weight_adapter.base import decompose, weight_decompose

    assert "Load LoRA" in model_detection_error_hint("x", {"a.lora_down.weight": 1})
    assert model_detection_error_hint("x", {"a": 1}) == ""
    weight, change, scale = torch.rand(3, 4), torch.rand(3, 4), torch.rand(3, 1)
    torch.testing.assert_close(
        weight_decompose(scale, weight, change, 0.5, 0.8, torch.float32, lambda x: x),
        decompose(scale, weight, change * 0.5, 0.8),
    )


def test_joined_json():
    from utils.json_util import merge_json_recursive

    base = {"a": {"x": 1, "y": [1]}, "b": 2}
    assert merge_json_recursive(base, {"a": {"y": [2], "z": 3}, "b": [4]}) == {
        "a": {"x": 1, "y": [1, 2], "z": 3},
        "b": [4],
    }
    assert base == {"a": {"x": 1, "y": [1]}, "b": 2}


def test_the_format_to_write():
    from comfy_api.input_impl.video_types import container_to_output_format

    formats = [container_to_output_format(name) for name in ("mov,mp4,m4a", "mp4", "", None)]
    assert formats == ["mov", "mp4", None, None]


def test_lists_and_pictures_of_models(tmp_path, monkeypatch):
    import io

    import torch
    from safetensors.torch import save_file

    import folder_paths
    from app.model_manager import ModelFileManager

    cover = "aGVsbG8="
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"ssmd_cover_images": f'["{cover}"]'})
    (tmp_path / "m.preview.png").write_bytes(b"x")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    manager = ModelFileManager()
    assert [entry["name"] for entry in manager.get_model_file_list("loras")] == ["m.safetensors"]
    picture, cover = manager.get_model_previews(str(tmp_path / "m.safetensors"))
    assert picture.endswith("m.preview.png") and isinstance(cover, io.BytesIO) and cover.read() == b"hello"


def test_configurations_that_come_with_the_program():
    import app.run
    from comfy.sd import _read_config

    folder = Path(app.run.__file__).parent / "builtin_models" / "configs"
    read = {path.stem: _read_config(str(path))["model"]["params"] for path in folder.iterdir()}
    assert len(read) == 11
    assert {name for name, told in read.items() if told["parameterization"] == "v"} == {
        "v2-inference-v",
        "v2-inference-v_fp32",
    }
    skipping = {name for name, told in read.items() if "cond_stage_config" in told}
    assert skipping == {"anything_v3", "v1-inference_clip_skip_2", "v1-inference_clip_skip_2_fp16"}
