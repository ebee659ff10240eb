"""What the page begins with: a workflow that can run with the files that are here.

For a person with models of their own: text to picture with the first of their files whose family is here and that is
complete (a checkpoint with text encoders and VAE in it, or a diffusion model whose text encoders and VAE are here too).
Files are told by the headers of safetensors, so nothing is read but a few kilobytes each. Else the demo's workflow.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from dataclasses import dataclass
from typing import Any

import folder_paths
from app import demo

_MOST_FILES = 40  # that are looked at
_PROMPT = "a lighthouse on a cliff in the evening, waves below, photograph"


@dataclass(frozen=True)
class _Style:
    """How pictures are made with a family. encoders: patterns of file names, one for each that a loader of `clip_type`
    takes; empty where the family's files are checkpoints."""

    side: int
    steps: int
    cfg: float
    scheduler: str
    latent: str = "EmptySD3LatentImage"
    clip_type: str = ""
    encoders: tuple[str, ...] = ()
    vae: str = ""


_FLUX = ("EmptySD3LatentImage", "flux", ("*clip_l*", "*t5xxl*"), "*ae.*")
# configuration's name -> style, by the authors' model cards
_STYLES = {
    "SD15": _Style(512, 20, 7.0, "normal", "EmptyLatentImage"),
    "SDXL": _Style(1024, 25, 7.0, "normal", "EmptyLatentImage"),
    "SD3": _Style(1024, 28, 4.5, "sgm_uniform"),
    "Flux": _Style(1024, 20, 1.0, "simple", *_FLUX),
    "FluxSchnell": _Style(1024, 4, 1.0, "simple", *_FLUX),
    "AuraFlow": _Style(1024, 25, 3.5, "simple"),
    "Lumina2": _Style(1024, 30, 4.0, "simple", "EmptySD3LatentImage", "lumina2", ("*gemma_2_2b*",), "*ae.*"),
    "Chroma": _Style(1024, 26, 4.0, "beta", "EmptySD3LatentImage", "chroma", ("*t5xxl*",), "*ae.*"),
    "QwenImage": _Style(
        1328, 20, 2.5, "simple", "EmptySD3LatentImage", "qwen_image", ("*qwen_2.5_vl_7b*",), "*qwen_image_vae*"
    ),
}


def first_graph() -> dict[str, Any] | None:
    """The workflow to begin with, in the page's form; None where nothing here can run, and the page begins as always."""
    for kind in ("checkpoints", "diffusion_models"):
        for name in folder_paths.own_files(kind)[:_MOST_FILES]:
            graph = _graph_of(kind, name)
            if graph is not None:
                return graph
    return demo.first_graph()


def _graph_of(kind: str, name: str) -> dict[str, Any] | None:
    path = folder_paths.get_full_path(kind, name)
    found = None if path is None else _configuration(path)
    if found is None:
        return None
    style, complete = found
    if kind == "checkpoints":
        return _checkpoint_graph(style, name) if complete else None
    encoders = [_file_like("text_encoders", pattern) for pattern in style.encoders]
    vae = _file_like("vae", style.vae)
    if not encoders or vae is None or None in encoders:
        return None
    return _parts_graph(style, name, [str(file) for file in encoders], vae)


def _file_like(kind: str, pattern: str) -> str | None:
    names = folder_paths.get_filename_list(kind)
    return next((name for name in names if fnmatch.fnmatch(os.path.basename(name).lower(), pattern)), None)


def _configuration(path: str) -> tuple[_Style, bool] | None:
    """(style, whether text encoders and VAE are in the file too) of a file whose family makes pictures from text."""
    from comfy import model_detection

    try:
        weights, metadata = model_detection.shapes_of_file(path)
        prefixes = (model_detection.unet_prefix_from_state_dict(weights), "")
        found = (model_detection.detected(weights, prefix, metadata) for prefix in prefixes)
        config = next((config for config in found if config is not None), None)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a file, the page must open
        logging.debug("%s is not looked at for the first workflow: %s", path, error)
        return None
    style = None if config is None else _STYLES.get(type(config).__name__)
    if style is None or config is None:
        return None
    parts = (config.text_encoder_key_prefix, config.vae_key_prefix)
    return style, all(any(key.startswith(tuple(prefixes)) for key in weights) for prefixes in parts)


# ---- graphs --------------------------------------------------------------------------------------------------------


class _Graph:
    """A workflow in the page's form, made node by node."""

    def __init__(self) -> None:
        self._nodes: list[dict[str, Any]] = []
        self._links: list[list[Any]] = []

    def add(
        self, kind: str, at: tuple[int, int], size: tuple[int, int], values: list[Any],
        inputs: dict[str, tuple[int, int, str]] | None = None, title: str = "",
    ) -> int:  # fmt: skip
        """A node's id. inputs: name -> (id, output, type) of what is connected."""
        number = len(self._nodes) + 1
        node: dict[str, Any] = {
            "id": number, "type": kind, "pos": list(at), "size": list(size), "flags": {}, "order": number - 1, "mode": 0,
            "inputs": [], "outputs": [], "properties": {"Node name for S&R": kind}, "widgets_values": values,
        }  # fmt: skip
        if title:
            node["title"] = title
        for name, (source, output, data) in (inputs or {}).items():
            link = len(self._links) + 1
            self._links.append([link, source, output, number, len(node["inputs"]), data])
            node["inputs"].append({"name": name, "type": data, "link": link})
            outputs = self._nodes[source - 1]["outputs"]
            while len(outputs) <= output:
                outputs.append({"name": "", "type": "*", "links": []})
            outputs[output] |= {"name": data, "type": data}
            outputs[output]["links"].append(link)
        self._nodes.append(node)
        return number

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": "", "revision": 0, "last_node_id": len(self._nodes), "last_link_id": len(self._links),
            "nodes": self._nodes, "links": self._links, "groups": [], "config": {}, "extra": {}, "version": 0.4,
        }  # fmt: skip


def _checkpoint_graph(style: _Style, name: str) -> dict[str, Any]:
    graph = _Graph()
    loader = graph.add("CheckpointLoaderSimple", (0, 0), (320, 100), [name])
    return _text_to_picture(graph, style, (loader, 0), (loader, 1), (loader, 2))


def _parts_graph(style: _Style, name: str, encoders: list[str], vae: str) -> dict[str, Any]:
    graph = _Graph()
    network = graph.add("UNETLoader", (0, 0), (320, 90), [name, "default"])
    loader = "DualCLIPLoader" if len(encoders) == 2 else "CLIPLoader"
    clip = graph.add(loader, (0, 140), (320, 130), [*encoders, style.clip_type, "default"])
    pixels = graph.add("VAELoader", (0, 320), (320, 60), [vae])
    return _text_to_picture(graph, style, (network, 0), (clip, 0), (pixels, 0))


def _text_to_picture(
    graph: _Graph, style: _Style, model: tuple[int, int], clip: tuple[int, int], vae: tuple[int, int]
) -> dict[str, Any]:
    text = {"clip": (*clip, "CLIP")}
    good = graph.add("CLIPTextEncode", (380, 0), (380, 120), [_PROMPT], text, "Prompt")
    bad = graph.add("CLIPTextEncode", (380, 180), (380, 120), [""], text, "Negative prompt")
    empty = graph.add(style.latent, (380, 360), (300, 110), [style.side, style.side, 1])
    sample = graph.add(
        "KSampler", (810, 0), (310, 270), [1, "randomize", style.steps, style.cfg, "euler", style.scheduler, 1.0],
        {"model": (*model, "MODEL"), "positive": (good, 0, "CONDITIONING"), "negative": (bad, 0, "CONDITIONING"),
         "latent_image": (empty, 0, "LATENT")},
    )  # fmt: skip
    picture = graph.add("VAEDecode", (1170, 0), (210, 50), [], {"samples": (sample, 0, "LATENT"), "vae": (*vae, "VAE")})
    graph.add("SaveImage", (1170, 110), (400, 420), ["ComfyUI"], {"images": (picture, 0, "IMAGE")})
    return graph.as_dict()
