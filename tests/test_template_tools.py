"""Stand-ins and cut-down prompts of `python -m tools.template_coverage --run`."""

from __future__ import annotations

import json

import numpy as np
import pytest

import comfy.model_detection
import comfy.utils
from tools import template_files, template_run
from tools.template_run import Run, difference, reduced


def test_sizes_and_steps_are_cut_down_through_links():
    prompt = {
        "size": {"class_type": "PrimitiveInt", "inputs": {"value": 1024}},
        "many": {"class_type": "PrimitiveInt", "inputs": {"value": 20}},
        "few": {"class_type": "PrimitiveInt", "inputs": {"value": 4}},
        "half": {"class_type": "PrimitiveInt", "inputs": {"value": 10}},
        "steps": {"class_type": "ComfySwitchNode", "inputs": {"on_false": ["many", 0], "on_true": 8, "switch": True}},
        "frames": {"class_type": "ComfyMathExpression", "inputs": {"expression": "5 * 16 + 1"}},
        "latent": {
            "class_type": "EmptyLatent",
            "inputs": {"width": ["size", 0], "height": 32, "length": ["frames", 1], "megapixels": 1.5},
        },
        "first": {
            "class_type": "KSamplerAdvanced",
            "inputs": {
                "steps": ["steps", 0], "start_at_step": 0, "end_at_step": ["half", 0],
                "return_with_leftover_noise": "enable",
            },
        },
        "second": {
            "class_type": "KSamplerAdvanced",
            "inputs": {
                "steps": 20, "start_at_step": 10, "end_at_step": 10000, "return_with_leftover_noise": "disable",
            },
        },
    }  # fmt: skip
    cut = reduced(prompt)
    assert cut == {"width": 1, "length": 1, "megapixels": 1, "steps": 3}
    assert prompt["latent"]["inputs"] == {"width": ["size", 0], "height": 32, "length": 9, "megapixels": 0.01}
    assert prompt["size"]["inputs"]["value"] == 96
    assert prompt["many"]["inputs"]["value"] == prompt["steps"]["inputs"]["on_true"] == 2
    assert prompt["few"]["inputs"]["value"] == 4, "nothing leads there"
    assert (prompt["half"]["inputs"]["value"], prompt["second"]["inputs"]["start_at_step"]) == (1, 1)
    assert prompt["second"]["inputs"]["end_at_step"] == 10000


def test_results_are_compared():
    grey = np.full((1, 4, 4, 3), 100, np.uint8)
    first = Run(outputs=[("images", grey), ("text", "a")])
    assert difference(first, Run(outputs=[("images", grey + 2), ("text", "a")])) == 2
    assert difference(first, Run(outputs=[("images", grey), ("text", "b")])) == float("inf")
    assert difference(first, Run(outputs=[("images", grey)])) == float("inf")
    assert difference(first, Run(outputs=[("images", grey[:, :2]), ("text", "a")])) == float("inf")


@pytest.mark.parametrize(
    ("name", "configuration", "config"),
    [
        ("flux1-fill-dev.safetensors", "FluxInpaint", {"in_channels": 96}),
        ("wan2.1_flf2v_720p_14B_fp16.safetensors", "WAN21_I2V", {"flf_pos_embed_token_number": 20, "clip_dim": 32}),
        ("wan2.2_fun_control_5B_bf16.safetensors", "WAN22_T2V", {"in_dim_ref_conv": 48, "text_dim": 64}),
        ("qwen_image_fp8_e4m3fn.safetensors", "QwenImage", {"num_attention_heads": 3}),
        ("hunyuan_video_t2v_720p_bf16.safetensors", "HunyuanVideo", {"vec_in_dim": 64}),
    ],
)
def test_stand_ins_are_told_from_their_content(tmp_path, name, configuration, config):
    files = {"diffusion_models": [name]}
    assert template_files.lacking(files) == []
    template_files.write_models(files, str(tmp_path))
    sd, metadata = comfy.utils.load_torch_file(str(tmp_path / "diffusion_models" / name), return_metadata=True)
    found = comfy.model_detection.model_config_from_unet(sd, "", metadata=metadata)
    assert type(found).__name__ == configuration
    assert {key: found.unet_config[key] for key in config} == config


def test_names_share_files_and_inputs_are_written(tmp_path):
    names = ["ae.safetensors", "ae.sft"]
    template_files.write_models({"vae": names}, str(tmp_path))
    assert len({(tmp_path / "vae" / name).stat().st_ino for name in names}) == 1
    assert template_files.lacking({"vae": ["unheard_of.safetensors"]}) == ["vae/unheard_of.safetensors"]
    assert template_files.write_inputs(["a.png", "b.mp4", "c.wav", "d.xyz"], str(tmp_path)) == ["d.xyz"]
    frames = template_run._frames((tmp_path / "b.mp4").read_bytes(), "b.mp4")
    assert frames is not None and frames.shape == (9, 64, 96, 3)
    picture = template_run._frames((tmp_path / "a.png").read_bytes(), "a.png")
    assert picture is not None and picture.shape == (1, 64, 96, 4) and picture[..., 3].min() == 0


def test_an_own_vocabulary_lies_beside_the_text_encoders(tmp_path, monkeypatch):
    import folder_paths
    from comfy.text_encoders.qwen_image import QwenImageTokenizer
    from tests import tiny_parts

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], {".safetensors"}))
    with pytest.raises(ValueError, match="put its tokenizer.json into models/text_encoders/qwen25"):
        QwenImageTokenizer().tokenize_with_weights("a")
    (tmp_path / "qwen25").mkdir()
    content = tiny_parts.VOCABULARIES["text_encoders/qwen25/tokenizer.json"]()
    (tmp_path / "qwen25" / "tokenizer.json").write_text(content)
    assert json.loads(content)["model"]["vocab"]["user"] == 872
    row = QwenImageTokenizer().tokenize_with_weights("hi")["qwen25_7b"][0]
    assert [token for token, _ in row[:2]] == [151644, 82] and 872 in [token for token, _ in row]
