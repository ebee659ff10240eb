"""Models in diffusers' layout: a folder with a model_index.json and a folder for each part.

transformer/      diffusion_pytorch_model.safetensors, or several with a .safetensors.index.json
vae/              the same
text_encoder/, text_encoder_2/, text_encoder_3/   model.safetensors, or several
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch

import comfy.families
import comfy.sd
import comfy.utils
from comfy.checkpoint_files import WeightFileError
from comfy.text_encoders.loader import CLIPType, load_text_encoder_state_dicts

StateDict = dict[str, torch.Tensor]

_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
# (end of a weight file's name, end of its index's name), best first
_ENDS = (
    (".safetensors", ".safetensors.index.json"), (".fp16.safetensors", ".safetensors.index.fp16.json"),
    (".bin", ".bin.index.json"),
)  # fmt: skip


def model_folders(root: str) -> list[str]:
    """Folders below `root` that hold a model_index.json, relative to it, sorted; links are followed."""
    found, seen = [], set()
    for at, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if "model_index.json" in names:
            found.append(os.path.relpath(at, root))
    return sorted(found)


def _shards(index: str) -> list[str]:
    """The files that an index names. Raises WeightFileError for an index that is damaged."""
    try:
        with open(index, encoding="utf-8") as file:
            names = set(json.load(file)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightFileError(f"{index} is not an index of weight files ({error}); download it again") from error
    folder = os.path.dirname(index)
    outside = [name for name in names if os.path.basename(name) != name]
    if outside:
        raise WeightFileError(f"{index} names a file in another folder, {outside[0]}; it is not read")
    return [os.path.join(folder, name) for name in sorted(names)]


def part_files(folder: str) -> list[str]:
    """The weight files of one part. Raises WeightFileError when there is none."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for end, index_end in _ENDS:
        for stem in _STEMS:
            if stem + end in names:
                return [os.path.join(folder, stem + end)]
            if stem + index_end in names:
                return _shards(os.path.join(folder, stem + index_end))
    raise WeightFileError(f"{folder} holds no weights ({_STEMS[0]}.safetensors or the like); download the part again")


def pipeline_files(model_path: str) -> list[str]:
    """The files of the parts of a pipeline that are loaded from: weights, indices, configurations; sorted."""
    found = []
    for part in ("transformer", "unet", *_ENCODERS, "vae"):
        folder = os.path.join(model_path, part)
        if os.path.isdir(folder):
            found += [os.path.join(folder, name) for name in os.listdir(folder)]
    return sorted(found)


def load_part(folder: str) -> StateDict:
    """All tensors of one part, memory-mapped as any weight file."""
    weights: StateDict = {}
    for path in part_files(folder):
        weights.update(comfy.utils.load_torch_file(path, safe_load=True))
    return weights


def _config(folder: str) -> dict[str, str] | None:
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return {"config": file.read()}


def _load_model(model_path: str) -> Any:
    folder = os.path.join(model_path, "transformer")
    if not os.path.isdir(folder) and os.path.isdir(os.path.join(model_path, "unet")):
        folder = os.path.join(model_path, "unet")
    weights = load_part(folder)
    model = comfy.sd.load_diffusion_model_state_dict(weights, metadata=_config(folder))
    if model is None:
        raise comfy.sd.unknown_model(folder, weights)
    model.cached_patcher_init = (_load_model, (model_path,))
    return model


def load_diffusers(
    model_path: str, output_vae: bool = True, output_clip: bool = True, embedding_directory: Any = None
) -> tuple[Any, Any, Any]:
    """(model, clip, vae) of a pipeline's folder; parts not asked for are None.

    Raises WeightFileError when a part's weights are missing, RuntimeError when the model is of an unknown family.
    """
    model = _load_model(model_path)
    clip = vae = None
    if output_clip:
        present = [name for name in _ENCODERS if os.path.isdir(os.path.join(model_path, name))]
        encoders = [load_part(os.path.join(model_path, name)) for name in present or ["text_encoder"]]
        family = comfy.families.record_of(model.model.diffusion_model)
        kind = CLIPType.STABLE_DIFFUSION if family is None else CLIPType[family.clip_type]
        clip = load_text_encoder_state_dicts(encoders, embedding_directory=embedding_directory, clip_type=kind)
    if output_vae:
        vae = comfy.sd.VAE(sd=load_part(os.path.join(model_path, "vae")))
    return model, clip, vae
