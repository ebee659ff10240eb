"""The nodes there are, under the names node packs import: the classes, the mappings and how packs are loaded."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy_nodes import conditioning, controlnet, files, image, latent, loaders, sampling, vae, vision
from comfy_nodes.conditioning import (
    CLIPSetLastLayer,
    CLIPTextEncode,
    ConditioningAverage,
    ConditioningCombine,
    ConditioningConcat,
    ConditioningSetArea,
    ConditioningSetAreaPercentage,
    ConditioningSetAreaStrength,
    ConditioningSetMask,
    ConditioningSetTimestepRange,
    ConditioningZeroOut,
)
from comfy_nodes.controlnet import ControlNetApply, ControlNetApplyAdvanced, ControlNetLoader, DiffControlNetLoader
from comfy_nodes.fields import MAX_RESOLUTION
from comfy_nodes.files import (
    LoadImage,
    LoadImageMask,
    LoadImageOutput,
    LoadLatent,
    PreviewImage,
    SaveImage,
    SaveLatent,
)
from comfy_nodes.image import EmptyImage, ImageBatch, ImageInvert, ImagePadForOutpaint, ImageScale, ImageScaleBy
from comfy_nodes.latent import (
    EmptyLatentImage,
    LatentBlend,
    LatentComposite,
    LatentCrop,
    LatentFlip,
    LatentFromBatch,
    LatentRotate,
    LatentUpscale,
    LatentUpscaleBy,
    RepeatLatentBatch,
    SetLatentNoiseMask,
)
from comfy_nodes.loaders import (
    CheckpointLoader,
    CheckpointLoaderSimple,
    CLIPLoader,
    DiffusersLoader,
    DualCLIPLoader,
    LoraLoader,
    LoraLoaderModelOnly,
    UNETLoader,
    VAELoader,
)
from comfy_nodes.packs import (
    EXTENSION_WEB_DIRS,
    LOADED_MODULE_DIRS,
    get_module_name,
    init_builtin_extra_nodes,
    init_external_custom_nodes,
    init_extra_nodes,
    load_custom_node,
)
from comfy_nodes.sampling import KSampler, KSamplerAdvanced, common_ksampler
from comfy_nodes.vae import (
    InpaintModelConditioning,
    VAEDecode,
    VAEDecodeTiled,
    VAEEncode,
    VAEEncodeForInpaint,
    VAEEncodeTiled,
)
from comfy_nodes.vision import (
    CLIPVisionEncode,
    CLIPVisionLoader,
    GLIGENLoader,
    GLIGENTextBoxApply,
    StyleModelApply,
    StyleModelLoader,
    unCLIPCheckpointLoader,
    unCLIPConditioning,
)

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
for _topic in (sampling, loaders, conditioning, vae, latent, files, image, controlnet, vision):
    NODE_CLASS_MAPPINGS.update(_topic.NODE_CLASS_MAPPINGS)
    NODE_DISPLAY_NAME_MAPPINGS.update(_topic.NODE_DISPLAY_NAME_MAPPINGS)


def before_node_execution() -> None:
    """Raises InterruptProcessingException when the prompt was cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def interrupt_processing(value: bool = True) -> None:
    """Ask the running prompt to stop, or take that back."""
    comfy.model_management.interrupt_current_processing(value)


__all__ = [
    "ControlNetApply",
    "ControlNetApplyAdvanced",
    "ControlNetLoader",
    "DiffControlNetLoader",
    "CLIPVisionEncode",
    "CLIPVisionLoader",
    "GLIGENLoader",
    "GLIGENTextBoxApply",
    "StyleModelApply",
    "StyleModelLoader",
    "unCLIPCheckpointLoader",
    "unCLIPConditioning",
    "CLIPLoader",
    "CLIPSetLastLayer",
    "CLIPTextEncode",
    "CheckpointLoader",
    "CheckpointLoaderSimple",
    "ConditioningAverage",
    "ConditioningCombine",
    "ConditioningConcat",
    "ConditioningSetArea",
    "ConditioningSetAreaPercentage",
    "ConditioningSetAreaStrength",
    "ConditioningSetMask",
    "ConditioningSetTimestepRange",
    "ConditioningZeroOut",
    "DiffusersLoader",
    "DualCLIPLoader",
    "EXTENSION_WEB_DIRS",
    "EmptyImage",
    "EmptyLatentImage",
    "ImageBatch",
    "ImageInvert",
    "ImagePadForOutpaint",
    "ImageScale",
    "ImageScaleBy",
    "InpaintModelConditioning",
    "KSampler",
    "KSamplerAdvanced",
    "LOADED_MODULE_DIRS",
    "LatentBlend",
    "LatentComposite",
    "LatentCrop",
    "LatentFlip",
    "LatentFromBatch",
    "LatentRotate",
    "LatentUpscale",
    "LatentUpscaleBy",
    "LoadImage",
    "LoadImageMask",
    "LoadImageOutput",
    "LoadLatent",
    "LoraLoader",
    "LoraLoaderModelOnly",
    "MAX_RESOLUTION",
    "NODE_CLASS_MAPPINGS",
    "NODE_DISPLAY_NAME_MAPPINGS",
    "PreviewImage",
    "RepeatLatentBatch",
    "SaveImage",
    "SaveLatent",
    "SetLatentNoiseMask",
    "UNETLoader",
    "VAEDecode",
    "VAEDecodeTiled",
    "VAEEncode",
    "VAEEncodeForInpaint",
    "VAEEncodeTiled",
    "VAELoader",
    "before_node_execution",
    "common_ksampler",
    "get_module_name",
    "init_builtin_extra_nodes",
    "init_external_custom_nodes",
    "init_extra_nodes",
    "interrupt_processing",
    "load_custom_node",
]
