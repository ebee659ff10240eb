"""Workflows in API form on the tiny models: node id -> {"class_type", "inputs"}."""

from __future__ import annotations

import copy
from typing import Any

Prompt = dict[str, dict[str, Any]]

DEV, SCHNELL = "tiny_flux_dev.safetensors", "tiny_flux_schnell.safetensors"
# 72x104 and 112x80 have 35 picture tokens: neither 2, 3 nor 4 ranks divide them.
TEXT = "a (red:1.2) fox jumps over seven lazy dogs while it snows"


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node."""
    return {"class_type": class_type, "inputs": inputs}


def flux(
    checkpoint: str = DEV,
    text: str = TEXT,
    negative: str = "blurry",
    width: int = 72,
    height: int = 104,
    batch: int = 1,
    seed: int = 1,
    steps: int = 2,
    cfg: float = 1.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    denoise: float = 1.0,
) -> Prompt:
    """Text to picture with a whole checkpoint; "model" can be re-routed with `through`."""
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "positive": node("CLIPTextEncode", clip=["load", 1], text=text),
        "negative": node("CLIPTextEncode", clip=["load", 1], text=negative),
        "latent": node("EmptyLatentImage", width=width, height=height, batch_size=batch),
        "sample": node(
            "KSampler", model=["load", 0], positive=["positive", 0], negative=["negative", 0],
            latent_image=["latent", 0], seed=seed, steps=steps, cfg=cfg, sampler_name=sampler, scheduler=scheduler,
            denoise=denoise,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="e2e"),
    }  # fmt: skip


def controlled(**more: Any) -> Prompt:
    """A chain of two ControlNets, Redux and USO on both prompts, from one picture."""
    prompt = flux(**more)
    image = {"image": ["picture", 0]}
    prompt |= {
        "picture": node("LoadImage", image="start.png"),
        "vision": node("CLIPVisionLoader", clip_name="tiny_sigclip.safetensors"),
        "seen": node("CLIPVisionEncode", clip_vision=["vision", 0], crop="center", **image),
        "redux": node("StyleModelLoader", style_model_name="tiny_redux.safetensors"),
        "styled": node(
            "StyleModelApply", conditioning=["positive", 0], style_model=["redux", 0], clip_vision_output=["seen", 0],
            strength=0.7, strength_type="multiply",
        ),
        "uso": node("ModelPatchLoader", name="tiny_uso.safetensors"),
        "reference": node(
            "USOStyleReference", model=["load", 0], model_patch=["uso", 0], clip_vision_output=["seen", 0]
        ),
        "union": node("ControlNetLoader", control_net_name="tiny_flux_union.safetensors"),
        "kind": node("SetUnionControlNetType", control_net=["union", 0], type="depth"),
        "first": node(
            "ControlNetApplyAdvanced", positive=["styled", 0], negative=["negative", 0], control_net=["kind", 0],
            strength=0.8, start_percent=0.0, end_percent=1.0, vae=["load", 2], **image,
        ),
        "xlabs": node("ControlNetLoader", control_net_name="tiny_flux_xlabs.safetensors"),
        "second": node(
            "ControlNetApplyAdvanced", positive=["first", 0], negative=["first", 1], control_net=["xlabs", 0],
            strength=0.5, start_percent=0.2, end_percent=1.0, **image,
        ),
    }  # fmt: skip
    prompt["sample"]["inputs"] |= {"model": ["reference", 0], "positive": ["second", 0], "negative": ["second", 1]}
    return prompt


def parts(diffusion: str, weight_dtype: str = "default", **more: Any) -> Prompt:
    """Like `flux`, with the parts from files of their own."""
    prompt = flux(**more)
    prompt["load"] = node("UNETLoader", unet_name=diffusion, weight_dtype=weight_dtype)
    prompt["clip"] = node(
        "DualCLIPLoader", clip_name1="tiny_clip_l.safetensors", clip_name2="tiny_t5xxl.safetensors", type="flux"
    )
    prompt["vae"] = node("VAELoader", vae_name="tiny_ae.safetensors")
    for name in ("positive", "negative"):
        prompt[name]["inputs"]["clip"] = ["clip", 0]
    prompt["decode"]["inputs"]["vae"] = ["vae", 0]
    return prompt


def sd3(**more: Any) -> Prompt:
    """SD3 with a text for each encoder, skip-layer guidance and a latent of 16 channels."""
    prompt = flux("tiny_sd3.safetensors", **{"cfg": 4.5, "steps": 3, **more})
    texts = {"clip_l": "a red fox", "clip_g": TEXT, "t5xxl": "", "empty_padding": "none"}
    prompt["positive"] = node("CLIPTextEncodeSD3", clip=["load", 1], **texts)
    prompt["latent"]["class_type"] = "EmptySD3LatentImage"
    prompt["skip"] = node(
        "SkipLayerGuidanceSD3", model=["load", 0], layers="0", scale=3.0, start_percent=0.0, end_percent=0.9
    )
    prompt["sample"]["inputs"]["model"] = ["skip", 0]
    return prompt


def custom_sampling(**more: Any) -> Prompt:
    """SamplerCustomAdvanced with BasicGuider, FluxGuidance and ModelSamplingFlux, as Flux workflows have it."""
    prompt = flux(**more)
    old = prompt.pop("sample")["inputs"]
    del prompt["negative"]
    size = {k: prompt["latent"]["inputs"][k] for k in ("width", "height")}
    prompt |= {
        "shift": node("ModelSamplingFlux", model=["load", 0], max_shift=1.15, base_shift=0.5, **size),
        "guidance": node("FluxGuidance", conditioning=["positive", 0], guidance=2.5),
        "guider": node("BasicGuider", model=["shift", 0], conditioning=["guidance", 0]),
        "noise": node("RandomNoise", noise_seed=old["seed"]),
        "sigmas": node("BasicScheduler", model=["shift", 0], scheduler="simple", steps=old["steps"], denoise=1.0),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sample": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0],
            sigmas=["sigmas", 0], latent_image=["latent", 0],
        ),
    }  # fmt: skip
    return prompt


def picture_to_picture(image: str, **more: Any) -> Prompt:
    """Start from an uploaded picture."""
    prompt = flux(**{"denoise": 0.6, "steps": 3, **more})
    prompt["image"] = node("LoadImage", image=image)
    prompt["latent"] = node("VAEEncode", pixels=["image", 0], vae=["load", 2])
    return prompt


def with_lora(strength: float | None, **more: Any) -> Prompt:
    """With the tiny LoRA at a strength, or without."""
    prompt = flux(**more)
    if strength is not None:
        insert(prompt, "lora", "LoraLoaderModelOnly", lora_name="tiny_flux_kohya.safetensors", strength_model=strength)
    return prompt


def with_areas(**more: Any) -> Prompt:
    """Text to picture whose left and right halves have prompts of their own beside the whole picture's."""
    prompt = flux(**more)
    for name, x in (("left", 0.0), ("right", 0.45)):
        prompt[name] = node("CLIPTextEncode", clip=["load", 1], text=f"on the {name} a tree")
        prompt[f"{name}_area"] = node(
            "ConditioningSetAreaPercentage", conditioning=[name, 0], width=0.55, height=1.0, x=x, y=0.0, strength=1.0
        )
    prompt["halves"] = node("ConditioningCombine", conditioning_1=["left_area", 0], conditioning_2=["right_area", 0])
    prompt["all"] = node("ConditioningCombine", conditioning_1=["positive", 0], conditioning_2=["halves", 0])
    prompt["sample"]["inputs"]["positive"] = ["all", 0]
    return prompt


def insert(
    prompt: Prompt, name: str, class_type: str, before: str = "sample", slot: str = "model", **inputs: Any
) -> Prompt:
    """Put a node into the link that feeds input `slot` of node `before`; changes and returns the prompt."""
    prompt[name] = node(class_type, **{slot: prompt[before]["inputs"][slot]}, **inputs)
    prompt[before]["inputs"][slot] = [name, 0]
    return prompt


def changed(prompt: Prompt, name: str, **inputs: Any) -> Prompt:
    """A copy with other inputs of one node."""
    prompt = copy.deepcopy(prompt)
    prompt[name]["inputs"].update(inputs)
    return prompt
