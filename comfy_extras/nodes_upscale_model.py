"""Pictures enlarged by a network (ESRGAN and its relatives), which spandrel recognises and builds."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io
from comfy_nodes.model_files import watches_files
from comfy_nodes.v3 import extension

TILE, SMALLEST_TILE, OVERLAP = 512, 128, 32
# activations of these networks, in bytes per input byte
MEMORY_FACTOR = 384.0


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    """Empty modules in its place where torchvision is missing or does not fit torch.

    spandrel imports it for face restoration and for LaMa's random rotations, which no upscaler uses.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        yield
        return
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.InterpolationMode = types.SimpleNamespace(BILINEAR="bilinear")  # type: ignore[attr-defined]
    for name in ("rotate", "normalize"):
        setattr(functional, name, _torchvision_needed)
    transforms, whole = types.ModuleType("torchvision.transforms"), types.ModuleType("torchvision")
    transforms.functional, whole.transforms = functional, transforms  # type: ignore[attr-defined]
    modules = {module.__name__: module for module in (whole, transforms, functional)}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def _torchvision_needed(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("this network needs torchvision, which is missing or does not fit torch; install its version")


def load_upscaler(path: str) -> Any:
    """spandrel's descriptor of a file's network. Raises ValueError when it makes no pictures of pictures."""
    with _without_torchvision():
        import spandrel

    weights = comfy.utils.load_torch_file(path, safe_load=True)
    if "module.layers.0.residual_group.blocks.0.norm1.weight" in weights:
        weights = comfy.utils.state_dict_prefix_replace(weights, {"module.": ""})
    try:
        model = spandrel.ModelLoader().load_from_state_dict(weights).eval()
    except spandrel.UnsupportedModelError as error:
        raise ValueError(f"{path} holds no upscale model that spandrel knows; choose an ESRGAN-like file") from error
    if not isinstance(model, spandrel.ImageModelDescriptor):
        raise ValueError(f"{path} holds a model for {model.purpose}, not one that takes a single picture")
    return model


@watches_files(model_name="upscale_models")
class UpscaleModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = folder_paths.get_filename_list("upscale_models")
        return io.Schema(
            node_id="UpscaleModelLoader",
            display_name="Load Upscale Model",
            category="loaders",
            inputs=[io.Combo.Input("model_name", options=names)],
            outputs=[io.UpscaleModel.Output()],
        )

    @classmethod
    def execute(cls, model_name: str):
        return io.NodeOutput(load_upscaler(folder_paths.get_full_path_or_raise("upscale_models", model_name)))

    load_model = execute


def upscale(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] through the network, in tiles; smaller ones when memory runs out."""
    tile = TILE
    while True:
        steps = pixels.shape[0] * comfy.utils.get_tiled_scale_steps(
            pixels.shape[3], pixels.shape[2], tile_x=tile, tile_y=tile, overlap=OVERLAP
        )
        try:
            return comfy.utils.tiled_scale(
                pixels,
                model,
                tile_x=tile,
                tile_y=tile,
                overlap=OVERLAP,
                upscale_amount=model.scale,
                pbar=comfy.utils.ProgressBar(steps),
            )
        except comfy.model_management.OOM_EXCEPTION:
            tile //= 2
            if tile < SMALLEST_TILE:
                raise


class ImageUpscaleWithModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ImageUpscaleWithModel",
            display_name="Upscale Image (using Model)",
            category="image/upscaling",
            inputs=[io.UpscaleModel.Input("upscale_model"), io.Image.Input("image")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, upscale_model: Any, image: torch.Tensor):
        management = comfy.model_management
        device = management.get_torch_device()
        needed = management.module_size(upscale_model.model) + image.nelement() * image.element_size()
        needed += TILE * TILE * 3 * image.element_size() * max(upscale_model.scale, 1.0) * MEMORY_FACTOR
        management.free_memory(needed, device)
        upscale_model.to(device)
        try:
            large = upscale(upscale_model, image.to(device).movedim(-1, -3))
        finally:
            upscale_model.to("cpu")
        return io.NodeOutput(large.clamp(0, 1).movedim(-3, -1).to(management.intermediate_device()))

    upscale = execute


comfy_entrypoint = extension(UpscaleModelLoader, ImageUpscaleWithModel)
