"""Training of adapters: pictures and texts of a folder, training, adapters in use and on disk, how it went."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

import numpy as np
import torch

import comfy.lora_convert
import comfy.sd
import comfy.utils
import folder_paths
from comfy import media
from comfy.lora_training import LOSSES, OPTIMIZERS, TrainingSettings, train
from comfy.taco_dit import runtime
from comfy.weight_adapter import adapter_maps
from comfy_api.latest import ui
from comfy_nodes.conditioning import need_clip
from comfy_nodes.fields import MAX_SEED, number, whole
from comfy_nodes.files import metadata_texts
from comfy_nodes.model_files import watches_files
from comfy_nodes.sampling import check_latent

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
RESIZES = ["None", "Stretch", "Crop", "Pad"]
GRAPH_SIZE, GRAPH_MARGIN = (800, 480), 40


def input_folders() -> list[str]:
    """Folders in the input folder."""
    root = folder_paths.get_input_directory()
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if os.path.isdir(root) else []


def _repeats(folder: str) -> int:
    """Folders called `10_name` count ten times, as kohya's trainer has it."""
    number, _, _ = os.path.basename(folder).partition("_")
    return int(number) if number.isdigit() else 1


def picture_paths(folder: str) -> list[str]:
    """Pictures of a folder and of the folders in it, with repeats; links that lead out of it are left out.

    Raises ValueError when there is none.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                inside = [file for file in sorted(os.listdir(entry.path)) if file.lower().endswith(PICTURES)]
                found += [os.path.join(entry.path, file) for file in inside] * _repeats(entry.path)
            elif entry.name.lower().endswith(PICTURES):
                found.append(entry.path)
    kept = [path for path in found if _stays_below(path, folder)]
    if len(kept) < len(found):
        logging.warning("%s: %d symbolic links out of it are left out", folder, len(found) - len(kept))
    if not kept:
        raise ValueError(
            f"{folder} holds no picture ({', '.join(PICTURES)}); put some there, not links to other folders"
        )
    return kept


def _stays_below(path: str, folder: str) -> bool:
    """Whether no symbolic link leads from `path` out of `folder`."""
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


def caption_of(picture: str, folder: str) -> str:
    """The text beside a picture, "" when there is none or it is a link out of `folder`."""
    path = os.path.splitext(picture)[0] + ".txt"
    if not os.path.isfile(path) or not _stays_below(path, folder):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def _fitted(picture: Any, size: tuple[int, int], method: str) -> Any:
    from PIL import Image, ImageOps

    if method == "Crop":
        return ImageOps.fit(picture, size, Image.Resampling.BILINEAR)
    if method == "Pad":
        return ImageOps.pad(picture, size, Image.Resampling.BILINEAR)
    return picture.resize(size, Image.Resampling.BILINEAR)


def load_pictures(paths: list[str], method: str, size: tuple[int, int] | None = None) -> torch.Tensor:
    """[B, H, W, 3], all of `size` or else of the first one's. Raises ValueError if sizes differ with method None."""
    from PIL import ImageOps

    pictures = []
    for path in paths:
        with media.open_picture(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
        size = size or picture.size
        if picture.size != size:
            if method == "None":
                raise ValueError(
                    f"{os.path.basename(path)} is {picture.width} x {picture.height}, not {size[0]} x {size[1]}; set "
                    "resize_method to Stretch, Crop or Pad"
                )
            picture = _fitted(picture, size, method)
        pictures.append(torch.from_numpy(np.array(picture).astype(np.float32) / 255.0))
    return torch.stack(pictures)


class LoadImageSetFromFolderNode:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"folder": (input_folders(), {"tooltip": "A folder in the input folder."})},
            "optional": {"resize_method": (RESIZES, {"default": "None"})},
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "load_images"
    CATEGORY = "loaders"
    EXPERIMENTAL = True
    DESCRIPTION = "Loads a batch of images from a directory for training."

    def load_images(self, folder: str, resize_method: str = "None"):
        return (load_pictures(picture_paths(folder_paths.get_annotated_filepath(folder)), resize_method),)


class LoadImageTextSetFromFolderNode:
    @classmethod
    def INPUT_TYPES(cls):
        side = {"tooltip": "-1 for that of the first picture."}
        return {
            "required": {
                "folder": (input_folders(), {"tooltip": "A folder in the input folder."}),
                "clip": ("CLIP", {"tooltip": "Encodes the texts."}),
            },
            "optional": {
                "resize_method": (RESIZES, {"default": "None"}),
                "width": whole(-1, -1, 10000, 1, **side),
                "height": whole(-1, -1, 10000, 1, **side),
            },
        }

    RETURN_TYPES = ("IMAGE", "CONDITIONING")
    FUNCTION = "load_images"
    CATEGORY = "loaders"
    EXPERIMENTAL = True
    DESCRIPTION = "Loads a batch of images and caption from a directory for training."

    def load_images(self, folder: str, clip: Any, resize_method: str = "None", width: int = -1, height: int = -1):
        """A text beside each picture, in a file of the same name ending in .txt, else none."""
        need_clip(clip)
        top = folder_paths.get_annotated_filepath(folder)
        paths = picture_paths(top)
        size = (width, height) if width > 0 and height > 0 else None
        images = load_pictures(paths, resize_method, size)
        conditionings = []
        for path in paths:
            conditionings += clip.encode_from_tokens_scheduled(clip.tokenize(caption_of(path, top)))
        return (images, conditionings)


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NO_LORA = "[None]"


def steps_in_name(file: str) -> int:
    """How many steps an adapter was trained for, from a name that SaveLoRA gave it; 0 when it does not say."""
    found = re.search(r"(\d+)_steps_", os.path.basename(file))
    return int(found[1]) if found else 0


@watches_files(existing_lora="loras")
class TrainLoraNode:
    @classmethod
    def INPUT_TYPES(cls):
        def choice(options: Any, default: str, tooltip: str) -> tuple[Any, Any]:
            return (list(options), {"default": default, "tooltip": tooltip})

        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model the adapter is trained for."}),
                "latents": ("LATENT", {"tooltip": "The pictures."}),
                "positive": ("CONDITIONING", {"tooltip": "One for all pictures, or one for each."}),
                "batch_size": whole(1, 1, 10000, 1, tooltip="Pictures in a batch."),
                "grad_accumulation_steps": whole(1, 1, 1024, 1, tooltip="Batches before the adapter is changed."),
                "steps": whole(16, 1, 100000, tooltip="How many times the adapter is changed."),
                "learning_rate": number(0.0005, 0.0000001, 1.0, 0.000001, tooltip="The size of a change."),
                "rank": whole(8, 1, 128, tooltip="The rank of the adapter's matrices."),
                "optimizer": choice(OPTIMIZERS, "AdamW", "How gradients become changes."),
                "loss_function": choice(LOSSES, "MSE", "How prediction and picture are compared."),
                "seed": whole(0, 0, MAX_SEED, tooltip="For the adapter's start, noise, levels and order."),
                "training_dtype": choice(DTYPES, "bf16", "What the network computes in."),
                "lora_dtype": choice(DTYPES, "bf16", "What the adapter is kept in."),
                "algorithm": choice(adapter_maps, "LoRA", "The kind of adapter."),
                "gradient_checkpointing": ("BOOLEAN", {"default": True, "tooltip": "Slower, with far less memory."}),
                "existing_lora": choice(
                    [*folder_paths.get_filename_list("loras"), NO_LORA], NO_LORA, "An adapter to go on with."
                ),
            }
        }

    RETURN_TYPES = ("MODEL", "LORA_MODEL", "LOSS_MAP", "INT")
    RETURN_NAMES = ("model_with_lora", "lora", "loss", "steps")
    FUNCTION = "train"
    CATEGORY = "training"
    EXPERIMENTAL = True

    def train(
        self, model: Any, latents: dict[str, Any], positive: Any, training_dtype: str, lora_dtype: str,
        existing_lora: str = NO_LORA, **settings: Any,
    ):  # fmt: skip
        """On several ranks the first one trains, so that all have the same adapter, and the others wait for it."""
        chosen = TrainingSettings(training_dtype=DTYPES[training_dtype], lora_dtype=DTYPES[lora_dtype], **settings)
        samples = check_latent(model, latents)
        existing: dict[str, torch.Tensor] = {}
        if existing_lora != NO_LORA:
            path = folder_paths.get_full_path_or_raise("loras", existing_lora)
            existing = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(path, safe_load=True))
        lora, losses = runtime.current().lockstep.share(
            "trained adapter", lambda: train(model, samples, positive, chosen, existing)
        )
        trained = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]
        return (trained, lora, {"loss": losses}, chosen.steps + steps_in_name(existing_lora))


class LoraModelLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model the adapter changes."}),
                "lora": ("LORA_MODEL", {"tooltip": "The adapter."}),
                "strength_model": number(1.0, -100.0, 100.0, 0.01),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_lora_model"
    CATEGORY = "loaders"
    DESCRIPTION = "Load Trained LoRA weights from Train LoRA node."
    EXPERIMENTAL = True

    def load_lora_model(self, model: Any, lora: dict[str, torch.Tensor], strength_model: float):
        if strength_model == 0:
            return (model,)
        return (comfy.sd.load_lora_for_models(model, None, lora, strength_model, 0)[0],)


class SaveLoRA:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "lora": ("LORA_MODEL", {"tooltip": "The adapter to save."}),
                "prefix": ("STRING", {"default": "loras/ComfyUI_trained_lora"}),
            },
            "optional": {"steps": ("INT", {"forceInput": True, "tooltip": "Goes into the file's name."})},
        }

    RETURN_TYPES = ()
    FUNCTION = "save"
    CATEGORY = "loaders"
    EXPERIMENTAL = True
    OUTPUT_NODE = True

    def save(self, lora: dict[str, torch.Tensor], prefix: str, steps: int | None = None):
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
        done = "" if steps is None else f"{steps}_steps_"
        comfy.utils.save_torch_file(lora, os.path.join(folder, f"{name}_{done}{counter:05}_.safetensors"))
        return {}


def loss_graph(losses: list[float]) -> torch.Tensor:
    """A curve of the losses, [1, H, W, 3]."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", GRAPH_SIZE, "white")
    pen = ImageDraw.Draw(picture)
    width, height = (side - 2 * GRAPH_MARGIN for side in GRAPH_SIZE)
    low, high = min(losses), max(losses)
    span = high - low or 1.0
    points = [
        (GRAPH_MARGIN + width * step / max(1, len(losses) - 1), GRAPH_MARGIN + height * (high - loss) / span)
        for step, loss in enumerate(losses)
    ]
    left, bottom = GRAPH_MARGIN, GRAPH_MARGIN + height
    pen.line([(left, GRAPH_MARGIN), (left, bottom), (left + width, bottom)], fill="black", width=2)
    if len(points) > 1:
        pen.line(points, fill="blue", width=2)
    else:
        pen.circle(points[0], 3, fill="blue")
    pen.text((4, GRAPH_MARGIN - 16), f"{high:.4f}", fill="black")
    pen.text((4, bottom + 4), f"{low:.4f}", fill="black")
    pen.text((left + width // 2, bottom + 12), f"{len(losses)} steps", fill="black")
    return torch.from_numpy(np.array(picture).astype(np.float32) / 255.0)[None]


class LossGraphNode:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "loss": ("LOSS_MAP", {"default": {}}),
                "filename_prefix": ("STRING", {"default": "loss_graph"}),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    RETURN_TYPES = ()
    FUNCTION = "plot_loss"
    OUTPUT_NODE = True
    CATEGORY = "training"
    EXPERIMENTAL = True
    DESCRIPTION = "Plots the loss graph and saves it to the output directory."

    def plot_loss(self, loss: dict[str, Any], filename_prefix: str, prompt: Any = None, extra_pnginfo: Any = None):
        losses = [float(value) for value in loss.get("loss", ())]
        if not losses:
            raise ValueError("there are no losses to plot; connect the loss output of a training node")
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        info = PngInfo()
        for key, text in metadata_texts(prompt, extra_pnginfo).items():
            info.add_text(key, text)
        file = f"{name}_{counter:05}_.png"
        picture = Image.fromarray((loss_graph(losses)[0].numpy() * 255).astype(np.uint8))
        picture.save(os.path.join(folder, file), pnginfo=info)
        return {"ui": {"images": [ui.SavedResult(file, subfolder, "output")]}}


NODE_CLASS_MAPPINGS = {
    "TrainLoraNode": TrainLoraNode,
    "SaveLoRANode": SaveLoRA,
    "LoraModelLoader": LoraModelLoader,
    "LossGraphNode": LossGraphNode,
    "LoadImageSetFromFolderNode": LoadImageSetFromFolderNode,
    "LoadImageTextSetFromFolderNode": LoadImageTextSetFromFolderNode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TrainLoraNode": "Train LoRA",
    "SaveLoRANode": "Save LoRA Weights",
    "LoraModelLoader": "Load LoRA Model",
    "LossGraphNode": "Plot Loss Graph",
    "LoadImageSetFromFolderNode": "Load Image Dataset from Folder",
    "LoadImageTextSetFromFolderNode": "Load Image and Text Dataset from Folder",
}
