"""What popular packs import exists: it works, or says that its feature is missing when it is used."""

from __future__ import annotations

import asyncio
import importlib
import operator
from pathlib import Path

import pytest

import comfy.missing
from comfy.missing import FeatureMissingError

LINES = (Path(__file__).parent / "imported_names.txt").read_text().splitlines()[1:]
NAMES = [(module, name) for module, _, names in (line.partition(": ") for line in LINES) for name in names.split()]

NEWER, REMOVED, INSIDE = (
    "newer than ComfyUI 0.3.64",
    "gone before ComfyUI 0.3.64",
    "an inner part that is built in another way here",
)
# (module, name or None for all) -> why it is absent
ABSENT = {
    ("comfy.sd3_clip", None): REMOVED,
    ("comfy.nested_tensor", None): NEWER,
    ("comfy.quant_ops", None): NEWER,
    ("comfy.memory_management", None): NEWER,
    ("comfy.multigpu", None): NEWER,
    ("comfy.ldm.modules.attention", "_ATTN_PRECISION"): REMOVED,
    ("comfy.model_patcher", "QuantizedTensor"): NEWER,
    ("comfy.model_patcher", "low_vram_patch_estimate_vram"): NEWER,
    ("comfy.ldm.lightricks.vae.audio_vae", "LATENT_DOWNSAMPLE_FACTOR"): NEWER,
    ("comfy.ldm.hidream_o1.model", "IMAGE_TOKEN_ID"): NEWER,
    ("comfy.model_patcher", "move_weight_functions"): INSIDE,
    ("comfy.k_diffusion.sampling", "DPMSolver"): INSIDE,
    ("comfy.k_diffusion.sampling", "PIDStepSizeController"): INSIDE,
    ("comfy.sd1_clip", "safe_load_embed_zip"): INSIDE,
    ("comfy_extras.nodes_easycache", "EasyCacheHolder"): INSIDE,
    ("comfy.ldm.modules.diffusionmodules.model", "vae_attention"): INSIDE,
}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    import nodes

    comfy.missing.provide_modules()
    asyncio.run(nodes.init_builtin_extra_nodes())


def imported(module, name):
    """Whether `from module import name` works."""
    try:
        content = importlib.import_module(module)
        if name in ("(module)", "*") or hasattr(content, name):
            return True
        importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES])
def test_names(module, name):
    absent = (module, None) in ABSENT or (module, name) in ABSENT
    assert imported(module, name) is not absent


def test_the_list_is_whole():
    assert len(NAMES) >= 480 and len(ABSENT) <= 20


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
