"""Loading checkpoints, diffusion models, text encoders, VAEs and LoRAs from files."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

import comfy.families
import comfy.lora
import comfy.lora_convert
import comfy.model_base
import comfy.model_detection as model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
from comfy import weight_files
from comfy.clip import CLIP
from comfy.missing import FeatureMissingError
from comfy.style_models import StyleModel, load_style_model
from comfy.text_encoders.loader import CLIPType, load_clip, load_text_encoder_state_dicts, t5xxl_detect
from comfy.vae import VAE
from comfy.weights.store import store_of

__all__ = [
    "CLIP", "CLIPType", "StyleModel", "VAE", "load_checkpoint", "load_checkpoint_guess_config", "load_clip",
    "load_diffusion_model", "load_diffusion_model_state_dict", "load_gligen", "load_lora_for_models",
    "load_state_dict_guess_config", "load_style_model", "load_text_encoder_state_dicts", "load_unet",
    "load_unet_state_dict", "model_detection", "save_checkpoint", "t5xxl_detect",
]  # fmt: skip

StateDict = dict[str, torch.Tensor]


def load_gligen(ckpt_path: str) -> Any:
    """A patcher around the GLIGEN network in a file. Raises ValueError when it holds none."""
    from comfy.gligen import load_gligen as from_state_dict

    sd = comfy.utils.load_torch_file(ckpt_path, safe_load=True)
    management = comfy.model_management
    patcher = comfy.model_patcher.ModelPatcher(
        from_state_dict(sd), management.get_torch_device(), management.unet_offload_device()
    )
    patcher.weight_store.loaded_from |= weight_files.files_in(sd)
    return patcher


def _patcher_class() -> type[comfy.model_patcher.ModelPatcher]:
    """Diffusion models get the patcher that spreads denoising over the ranks."""
    from comfy.taco_dit.core.model_wrapper import TACODiTModelPatcher

    return TACODiTModelPatcher


def load_lora_for_models(
    model: Any, clip: Any, lora: StateDict, strength_model: float, strength_clip: float
) -> tuple[Any, Any]:
    """Clones of `model` and `clip` with an adapter's patches; either may be None."""
    key_map: dict[str, Any] = {}
    if model is not None:
        key_map = comfy.lora.model_lora_keys_unet(model.model, key_map)
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    lora = comfy.lora_convert.convert_lora(lora)
    patches = comfy.lora.load_lora(lora, key_map)
    taken: set[Any] = set()
    new_model, new_clip = None, None
    if model is not None:
        new_model = model.clone()
        taken |= set(new_model.add_patches(patches, strength_model))
    if clip is not None:
        new_clip = clip.clone()
        taken |= set(new_clip.add_patches(patches, strength_clip))
    for target in patches:
        if target not in taken:
            logging.warning("NOT LOADED %s", target)
    return new_model, new_clip


def model_detection_error_hint(path: str, state_dict: StateDict) -> str:
    """What to say of a file that holds no known model, when it is something else that is known."""
    is_lora = any(key.endswith((".lora_down.weight", ".lora_A.weight", ".lora_up.weight")) for key in state_dict)
    return f"{path} looks like a LoRA; load it with Load LoRA" if is_lora else ""


def unknown_model(path: str, state_dict: StateDict | None = None) -> RuntimeError:
    """What to raise for a file of no family that is here; it names the family where that is known by the file's keys."""
    known = ", ".join(name for family in comfy.families.records() for name in family.models)
    absent = comfy.model_detection.name_absent_family(state_dict or {})
    if absent is not None:
        return RuntimeError(f"{path} is a model of {absent}, which is not in this version; this version runs {known}")
    hint = model_detection_error_hint(path, state_dict or {})
    return RuntimeError(
        f"{path} holds no diffusion model this version knows (families: {known}); "
        + (hint or "use another file, or the loader of the part it contains (Load VAE, Load CLIP, Load LoRA)")
    )


def load_checkpoint_guess_config(
    ckpt_path: str,
    output_vae: bool = True,
    output_clip: bool = True,
    output_clipvision: bool = False,
    embedding_directory: Any = None,
    output_model: bool = True,
    model_options: dict[str, Any] | None = None,
    te_model_options: dict[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """(model, clip, vae, clip vision) of an all-in-one file; parts not asked for or not in it are None.

    Raises RuntimeError when the file holds no known model.
    """
    sd, metadata = comfy.utils.load_torch_file(ckpt_path, return_metadata=True)
    out = load_state_dict_guess_config(
        sd, output_vae, output_clip, output_clipvision, embedding_directory, output_model, model_options,
        te_model_options=te_model_options, metadata=metadata,
    )  # fmt: skip
    if out is None:
        raise unknown_model(ckpt_path, sd)
    if output_model and out[0] is not None:
        out[0].cached_patcher_init = (load_checkpoint_guess_config, (ckpt_path,))
    return out


def load_state_dict_guess_config(
    sd: StateDict,
    output_vae: bool = True,
    output_clip: bool = True,
    output_clipvision: bool = False,
    embedding_directory: Any = None,
    output_model: bool = True,
    model_options: dict[str, Any] | None = None,
    te_model_options: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> tuple[Any, Any, Any, Any] | None:
    """`load_checkpoint_guess_config` for a state dict; None when it holds no known model."""
    options = model_options or {}
    prefix = model_detection.unet_prefix_from_state_dict(sd)
    config = model_detection.model_config_from_unet(sd, prefix, metadata=metadata)
    if config is None:
        model = load_diffusion_model_state_dict(sd, model_options=options, metadata=metadata)
        return None if model is None else (model, None, None, None)
    patcher = clip = vae = vision = None
    if output_clipvision and config.clip_vision_prefix is not None:
        from comfy.clip_vision import load_clipvision_from_sd

        vision = load_clipvision_from_sd(sd, config.clip_vision_prefix, True)
    if output_model:
        patcher = _build_model(config, sd, prefix, options)
    if output_vae:
        weights = comfy.utils.state_dict_prefix_replace(sd, dict.fromkeys(config.vae_key_prefix, ""), filter_keys=True)
        if weights:
            vae = _build_vae(config.process_vae_state_dict(weights), metadata)
    if output_clip:
        clip = _build_clip(config, sd, embedding_directory, te_model_options or {})
    if sd:
        logging.debug("left over keys: %s", list(sd))
    return patcher, clip, vae, vision


def _build_vae(weights: StateDict, metadata: dict[str, str] | None) -> Any:
    """The VAE of a checkpoint; None, with a warning, if it is of a kind that is not in this version."""
    try:
        return VAE(sd=weights, metadata=metadata)
    except FeatureMissingError as error:
        logging.warning("the checkpoint is loaded without its VAE: %s", error)
        return None


def _build_clip(config: Any, sd: StateDict, embedding_directory: Any, te_model_options: dict[str, Any]) -> Any:
    target = config.clip_target(state_dict=sd)
    if target is None:
        return None
    weights = config.process_clip_state_dict(sd)
    if not weights:
        logging.warning("no CLIP/text encoder weights in checkpoint, the text encoder model will not be loaded.")
        return None
    clip = CLIP(
        target, embedding_directory=embedding_directory, tokenizer_data=weights,
        parameters=comfy.utils.calculate_parameters(weights), model_options=te_model_options,
        state_dict=weights,
    )  # fmt: skip
    missing, unexpected = clip.load_sd(weights, full_model=True)
    if missing:
        logging.warning("clip missing: %s", missing)
    if unexpected:
        logging.debug("clip unexpected: %s", unexpected)
    return clip


def _build_model(config: Any, sd: StateDict, prefix: str, options: dict[str, Any]) -> Any:
    """A patcher around the network of `config` with weights from `sd`."""
    management = comfy.model_management
    files = weight_files.files_in(sd)  # before tensors are cast, which are copies then
    load_device = management.get_torch_device()
    parameters = comfy.utils.calculate_parameters(sd, prefix)
    supported = list(config.supported_inference_dtypes)
    if config.scaled_fp8 is not None:
        stored = None
    else:
        stored = comfy.utils.weight_dtype(sd, prefix)
    dtype = options.get("dtype")
    weight_dtype = management.unet_dtype(load_device, parameters, supported, weight_dtype=stored)
    weight_dtype = dtype or weight_dtype
    cast = management.unet_manual_cast(weight_dtype, load_device, supported)
    if config.scaled_fp8 is not None and cast is None:
        cast = weight_dtype
    config.set_inference_dtype(weight_dtype, cast)
    if options.get("custom_operations") is not None:
        config.custom_operations = options["custom_operations"]
    if options.get("fp8_optimizations"):
        config.optimizations["fp8"] = True
    model = config.get_model(sd, prefix, device=torch.device("meta"))
    if config.scaled_fp8 is None:
        _cast_weights(sd, prefix, weight_dtype, _taken_as_stored(model))
    model.load_model_weights(sd, prefix)
    model.device = torch.device("cpu")
    store_of(model).loaded_from |= files
    offload_device = options.get("offload_device", management.unet_offload_device())
    return _patcher_class()(model, load_device=options.get("load_device", load_device), offload_device=offload_device)


def _taken_as_stored(model: Any) -> set[str]:
    """Paths of the layers of a pack that read their tensors from the file by themselves."""
    usual = (torch.nn.Module._load_from_state_dict, comfy.ops.CastWeightBiasOp._load_from_state_dict)
    layers = model.diffusion_model.named_modules()
    return {path for path, layer in layers if type(layer)._load_from_state_dict not in usual}


def _cast_weights(sd: StateDict, prefix: str, dtype: torch.dtype, as_stored: set[str]) -> None:
    """Cast floating tensors that are not stored in `dtype`; those that are keep their memory-mapped pages.

    Tensors of the layers at `as_stored` stay as they are.
    """
    for key, value in sd.items():
        if key[len(prefix) :].rpartition(".")[0] in as_stored:
            continue
        if key.startswith(prefix) and value.is_floating_point() and value.dtype != dtype:
            # Norm scales and biases of fp8 files stay precise: the layers cast them at use anyway.
            if dtype.itemsize == 1 and (value.ndim < 2 or value.dtype.itemsize == 1):
                continue
            sd[key] = value.to(dtype)


def load_diffusion_model(unet_path: str, model_options: dict[str, Any] | None = None) -> Any:
    """The model of a diffusion-only file, with Black Forest Labs' or diffusers' keys.

    Raises RuntimeError when the file holds no known model.
    """
    sd, metadata = comfy.utils.load_torch_file(unet_path, return_metadata=True)
    metadata = metadata or _neighbour_config(unet_path)
    model = load_diffusion_model_state_dict(sd, model_options=model_options, metadata=metadata)
    if model is None:
        raise unknown_model(unet_path, sd)
    model.cached_patcher_init = (load_diffusion_model, (unet_path, model_options))
    return model


def _neighbour_config(path: str) -> dict[str, str] | None:
    """diffusers keeps the configuration in a config.json beside the weights."""
    config = os.path.join(os.path.dirname(path), "config.json")
    if not os.path.isfile(config):
        return None
    with open(config, encoding="utf-8") as file:
        return {"config": file.read()}


def load_diffusion_model_state_dict(
    sd: StateDict, model_options: dict[str, Any] | None = None, metadata: dict[str, str] | None = None
) -> Any:
    """`load_diffusion_model` for a state dict; None when it holds no known model."""
    prefix = model_detection.unet_prefix_from_state_dict(sd)
    stripped = {key[len(prefix) :]: value for key, value in sd.items() if key.startswith(prefix)}
    if stripped:
        sd = stripped
    config = model_detection.model_config_from_unet(sd, "", metadata=metadata)
    if config is None:
        converted = model_detection.convert_diffusers_mmdit(sd)
        if converted is None:
            return None
        sd = converted
        config = model_detection.model_config_from_unet(sd, "", metadata=metadata)
    return None if config is None else _build_model(config, sd, "", model_options or {})


def load_unet(unet_path: str, dtype: torch.dtype | None = None) -> Any:
    """Older name of `load_diffusion_model`."""
    return load_diffusion_model(unet_path, model_options={"dtype": dtype})


def load_unet_state_dict(sd: StateDict, dtype: torch.dtype | None = None) -> Any:
    """Older name of `load_diffusion_model_state_dict`."""
    return load_diffusion_model_state_dict(sd, model_options={"dtype": dtype})


def load_checkpoint(
    config_path: str | None = None,
    ckpt_path: str | None = None,
    output_vae: bool = True,
    output_clip: bool = True,
    embedding_directory: Any = None,
    state_dict: StateDict | None = None,
    config: Any = None,
) -> tuple[Any, Any, Any]:
    """(model, clip, vae) with a configuration in latent diffusion's form, as a file or as its content.

    The family is told by the weights. Of the configuration two things count: that the network predicts the velocity
    (`parameterization: v`) and the text encoder's layer (`layer_idx`).
    """
    if state_dict is None and ckpt_path is None:
        raise ValueError("load_checkpoint needs ckpt_path or state_dict")
    if config is None and config_path is not None:
        config = _read_config(config_path)
    if state_dict is not None:
        out = load_state_dict_guess_config(state_dict, output_vae, output_clip, False, embedding_directory)
        if out is None:
            raise unknown_model("the state dict", state_dict)
        model, clip, vae = out[:3]
    else:
        assert ckpt_path is not None
        model, clip, vae = load_checkpoint_guess_config(
            ckpt_path, output_vae, output_clip, False, embedding_directory
        )[:3]  # fmt: skip
    told = ((config or {}).get("model") or {}).get("params") or {}
    if told.get("parameterization") == "v" and model is not None:
        kind = comfy.model_base.ModelType.V_PREDICTION
        model.add_object_patch("model_sampling", comfy.model_base.model_sampling(model.model.model_config, kind))
    layer = ((told.get("cond_stage_config") or {}).get("params") or {}).get("layer_idx")
    if layer is not None and clip is not None:
        clip.clip_layer(layer)
    return model, clip, vae


def _read_config(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({error}); choose another configuration") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} has no section `model`; choose another configuration")
    return config


def save_checkpoint(
    output_path: str,
    model: Any,
    clip: Any = None,
    vae: Any = None,
    clip_vision: Any = None,
    metadata: dict[str, str] | None = None,
    extra_keys: StateDict | None = None,
) -> None:
    """Write a model with its patches applied, and what else is given, as one safetensors file."""
    loaded = [model]
    if clip is not None:
        loaded.append(clip.load_model())
    vae_sd = None if vae is None else vae.get_sd()
    vision_sd = None if clip_vision is None else clip_vision.get_sd()
    comfy.model_management.load_models_gpu(loaded, force_patch_weights=True)
    clip_sd = None if clip is None else clip.get_sd()
    sd = model.model.state_dict_for_saving(clip_sd, vae_sd, vision_sd)
    sd.update(extra_keys or {})
    comfy.utils.save_torch_file({k: v.cpu() for k, v in sd.items()}, output_path, metadata=metadata)


def __getattr__(name: str) -> Any:
    if name != "AutoencoderKL":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from comfy.ldm.models.autoencoder import AutoencoderKL  # a network is imported where it is used

    return AutoencoderKL
