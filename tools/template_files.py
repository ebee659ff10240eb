"""Stand-ins for the files that templates name: tiny random weights in the layouts of the real files, pictures, videos.

`stand_in(folder, name)` says what stands in for a model file; widths fit each other, so that every diffusion model works with
the text encoders, VAEs and adapters that templates give it. `write_inputs` writes the pictures, videos and sounds.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import os
import wave
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import save_file

from tests import tiny_adapters, tiny_families, tiny_models, tiny_parts, tiny_unets
from tests.tiny_adapters import VISION_WIDTH
from tests.tiny_families import TINY, Tiny
from tests.tiny_models import CLIP_WIDTH, HIDDEN, T5_WIDTH, Shapes, StateDict

PICTURE = (96, 64)  # width and height of pictures and videos that templates load
FRAMES, FPS = 9, 16
REFINER: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "model_channels": 384, "num_res_blocks": [1, 1], "channel_mult": [1, 1],
    "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 0], "transformer_depth_middle": -2,
    "use_linear_in_transformer": True, "context_dim": 1280, "num_head_channels": 64, "num_classes": "sequential",
    "adm_in_channels": 2560,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class File:
    """A file to make: its weights, and its metadata."""

    make: Callable[[], StateDict]
    metadata: dict[str, str] | None = None


def _joined(parts: Mapping[str, StateDict]) -> StateDict:
    """One state dict of parts by key prefix."""
    return {prefix + key: value for prefix, weights in parts.items() for key, value in weights.items()}


def _network(tiny: Tiny) -> File:
    return File(functools.cache(lambda: tiny_models.random_weights(tiny.shapes(), 21)), tiny.metadata)


def _changed(name: str, **config: Any) -> Tiny:
    tiny = TINY[name]
    return dataclasses.replace(tiny, config={**tiny.config, **config})


def _flux(**shapes: tuple[int, ...]) -> File:
    """A Flux with other shapes of some layers, `img_in` for `img_in.weight`."""
    changed: Shapes = {f"{layer}.weight": shape for layer, shape in shapes.items()}
    return File(lambda: tiny_models.random_weights({**tiny_models.flux_shapes(), **changed}, 1))


def _wan(name: str, in_dim: int, configuration: str | None = None, **config: Any) -> File:
    tiny = _changed(name, in_dim=in_dim, text_dim=T5_WIDTH, **config)
    return _network(dataclasses.replace(tiny, configuration=configuration or tiny.configuration))


def _sd35() -> Tiny:
    """SD3.5 large with pooled prompts of the real width, which its ControlNets take for granted."""
    return _changed("sd35_large", adm_in_channels=768 + 1280)


def _sd35_checkpoint() -> StateDict:
    parts = {
        "model.diffusion_model.": tiny_models.random_weights(_sd35().shapes(), 21),
        "first_stage_model.": tiny_models.random_weights(tiny_models.vae_shapes(), 22),
        "text_encoders.clip_l.transformer.": tiny_models.random_weights(
            tiny_models.clip_l_shapes(768, 1), 23, torch.float16
        ),
        "text_encoders.clip_g.transformer.": tiny_models.random_weights(
            {**tiny_models.clip_l_shapes(1280, 1), "text_projection.weight": (1280, 1280)}, 24, torch.float16
        ),
    }
    return _joined(parts)


def _lumina() -> StateDict:
    """An all-in-one file, with its text encoder's vocabulary."""
    out = tiny_families.checkpoint(TINY["lumina2"])
    for key, value in tiny_parts.gemma2().items():
        out[f"text_encoders.{'' if key == 'spiece_model' else 'gemma2_2b.transformer.'}{key}"] = value
    return out


def _sdxl_refiner() -> StateDict:
    parts = {
        "model.diffusion_model.": tiny_models.random_weights(tiny_unets.unet_shapes(REFINER), 24, torch.float16),
        "conditioner.embedders.0.model.": tiny_unets.clip_g(25),
        "first_stage_model.": tiny_models.random_weights(tiny_models.vae_4_shapes(), 26, torch.float16),
    }
    return _joined(parts)


def _vision_for_sdxl() -> StateDict:
    """OpenCLIP's bigG, whose features stand in for SDXL's pooled prompt."""
    shapes = {**tiny_adapters.vision_shapes(48, 2, 8), "visual_projection.weight": (1280, VISION_WIDTH)}
    return tiny_models.random_weights(shapes, 34)


def _weights(make: Callable[[], Shapes], seed: int) -> File:
    return File(lambda: tiny_models.random_weights(make(), seed))


_I2V = {"clip_dim": VISION_WIDTH}
_FIRST_LAST = {**_I2V, "flf_pos_embed_token_number": 20}  # two pictures of 3 x 3 patches and a class token
_QWEN = _network(TINY["qwen_image"])
_WANS: tuple[tuple[str, File], ...] = (
    ("*vace*", _network(_changed("wan_vace", text_dim=T5_WIDTH))),
    ("wan2.1_flf2v*", _wan("wan_i2v", 36, **_FIRST_LAST)),
    ("wan2.1_i2v*|wan2.1_fun_inp*", _wan("wan_i2v", 36, **_I2V)),
    ("wan2.1_fun_control*", _wan("wan_i2v", 48, **_I2V)),
    ("wan2.1_fun_camera*", _wan("wan_t2v", 32, "WAN21_Camera", model_type="camera", **_I2V)),
    ("wan2.2_fun_camera*", _wan("wan_t2v", 36, "WAN22_Camera", model_type="camera_2.2")),
    ("wan2.2_fun_control_5b*", _wan("wan_5b", 148, in_dim_ref_conv=48)),
    ("wan2.2_fun_inpaint_5b*", _wan("wan_5b", 100)),
    ("wan2.2_fun_control*", _wan("wan_t2v", 52, in_dim_ref_conv=16)),
    ("wan2.2_fun_inpaint*|wan2.2_i2v*", _wan("wan_t2v", 36)),
    ("*ti2v*5b*", _wan("wan_5b", 48)),
    ("wan*t2v*", _wan("wan_t2v", 16)),
)
# Patterns of lower-case names, the first that fits counts.
_STAND_INS: dict[str, tuple[tuple[str, File], ...]] = {
    "diffusion_models": (
        ("*fill*", _flux(img_in=(HIDDEN, 384))),
        ("flux1-canny*|flux1-depth*", _flux(img_in=(HIDDEN, 128))),
        ("*schnell*", _weights(lambda: tiny_models.flux_shapes(guidance=False), 1)),
        ("flux1*", _flux()),
        ("qwen_image*|firered*", _QWEN),
        ("hunyuan_video*", _network(_changed("hunyuan_video", vec_in_dim=CLIP_WIDTH))),
        *_WANS,
    ),
    "checkpoints": (
        ("flux1-schnell*", File(lambda: tiny_models.checkpoint(guidance=False))),
        ("flux1*", File(tiny_models.checkpoint)),
        ("sd3.5_large*", File(_sd35_checkpoint)),
        ("sd_xl_refiner*", File(_sdxl_refiner)),
        ("sd_xl*", File(tiny_unets.sdxl_checkpoint)),
        ("netayume*", File(_lumina)),
        ("ltx-video*", File(lambda: tiny_families.checkpoint(_changed("ltxv", caption_channels=T5_WIDTH)))),
    ),
    "text_encoders": (
        ("clip_l*", _weights(tiny_models.clip_l_shapes, 2)),
        ("t5xxl*", _weights(tiny_models.t5_shapes, 3)),
        ("umt5*", File(tiny_parts.umt5)),
        ("qwen_2.5_vl_7b*", File(tiny_parts.qwen25)),
        ("llava_llama3*", File(tiny_parts.llama3)),
    ),
    "vae": (
        ("ae.*", _weights(tiny_models.vae_shapes, 4)),
        ("wan_alpha*|wan_2.1*|wan2_1*|qwen_image_vae*", File(tiny_parts.vae_wan21)),
        ("wan2.2*", File(tiny_parts.vae_wan22)),
        ("hunyuan_video*", File(tiny_parts.vae_hunyuan_video)),
    ),
    "clip_vision": (
        ("clip_vision_h*", File(tiny_adapters.vision_h)),
        ("clip_vision_g*", File(_vision_for_sdxl)),
        ("sigclip*", File(tiny_adapters.vision_siglip)),
    ),
    "controlnet": (
        ("sd3.5_large_*_blur*", File(lambda: _sd35_control(0))),
        ("sd3.5_large_*_canny*", File(lambda: _sd35_control(1))),
        ("sd3.5_large_*_depth*", File(lambda: _sd35_control(2))),
    ),
    "style_models": (("flux1-redux*", File(tiny_adapters.redux)),),
    "model_patches": (("uso*", File(tiny_adapters.uso)),),
    "upscale_models": (("realesrgan*", File(lambda: tiny_parts.upscaler(4))),),
    "loras": (
        ("*qwen*|*firered*", File(lambda: tiny_families.kohya_lora(TINY["qwen_image"]))),
        ("*wan*|*lightx2v*", File(lambda: tiny_families.kohya_lora(TINY["wan_t2v"]))),
        ("*flux*|removal*", File(tiny_models.kohya_lora)),
    ),
}  # fmt: skip


def _sd35_control(kind: int) -> StateDict:
    tiny = _sd35()
    return tiny_adapters.control_sd35(True, kind, tiny.config["depth"], tiny.config["adm_in_channels"])


def stand_in(folder: str, name: str) -> File | None:
    """What stands in for a model file, or None."""
    file = os.path.basename(name).lower()
    table = _STAND_INS.get(folder, ())
    fits = (made for patterns, made in table for pattern in patterns.split("|") if fnmatch.fnmatchcase(file, pattern))
    return next(fits, None)


def lacking(files: Mapping[str, Iterable[str]]) -> list[str]:
    """The `folder/name` of a template's files that have no stand-in."""
    return sorted(f"{folder}/{name}" for folder, names in files.items() for name in names if not stand_in(folder, name))


def write_models(files: Mapping[str, Iterable[str]], models: str) -> None:
    """Write stand-ins for {folder: names} below the folder `models`; one file on disk for names that share one."""
    tiny_parts.write_vocabularies(models)
    written: dict[int, str] = {}
    for folder, names in sorted(files.items()):
        for name in sorted(set(names)):
            made = stand_in(folder, name)
            path = os.path.join(models, folder, name)
            if made is None or os.path.exists(path):
                continue
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if id(made) in written:
                os.link(written[id(made)], path)
            else:
                save_file({key: value.contiguous() for key, value in made.make().items()}, path, made.metadata)
                written[id(made)] = path


# --- what templates load as input ------------------------------------------------------------------------------------


def _pixels(seed: int, frames: int = 1) -> Any:
    """Smooth coloured pictures [frames, height, width, 3] that move to the right, 0..255."""
    width, height = PICTURE
    coarse = torch.rand((1, 3, 5, 7), generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width + frames), mode="bicubic").clamp(0, 1)[0]
    moved = torch.stack([smooth[:, :, i : i + width] for i in range(frames)])
    return (moved * 255).round().to(torch.uint8).movedim(1, -1).numpy()


def _write_picture(path: str, seed: int) -> None:
    from PIL import Image

    picture = Image.fromarray(_pixels(seed)[0])
    if path.endswith(".png"):  # with a hole, which is the mask of templates that use one
        hole = Image.new("L", PICTURE, 255)
        hole.paste(0, (30, 20, 60, 50))
        picture.putalpha(hole)
    picture.save(path)


def _write_video(path: str, seed: int) -> None:
    import av

    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = *PICTURE, "yuv420p"
        for picture in _pixels(seed, FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_sound(path: str, seed: int) -> None:
    samples = (torch.rand(16000, generator=torch.Generator().manual_seed(seed)) * 2000).to(torch.int16)
    with wave.open(path, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.numpy().tobytes())


_INPUTS: dict[tuple[str, ...], Callable[[str, int], None]] = {
    (".png", ".jpg", ".jpeg", ".webp"): _write_picture,
    (".mp4", ".webm", ".mov"): _write_video,
    (".wav", ".mp3", ".flac"): _write_sound,
}


def write_inputs(names: Iterable[str], folder: str) -> list[str]:
    """Write pictures, videos and sounds by name into an input folder; returns the names of a kind that is not known."""
    unknown = []
    for seed, name in enumerate(sorted(set(names))):
        write = next((write for endings, write in _INPUTS.items() if name.lower().endswith(endings)), None)
        if write is None:
            unknown.append(name)
            continue
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write(path, seed)
    return unknown
