"""What a workflow template needs that this program does not have, told from the template alone, before any download.

    missing_of(template, object_info_names) -> [{"kind": "family" | "format" | "node", "name": str, "text": str}, ...]
    missing_of(workflow, object_info_names, official=False)       the same for a workflow of a person's own

template: the workflow as the page saves it (`nodes`, `definitions.subgraphs`). object_info_names: the names of all node
types, the keys of /object_info. An empty list means that all is here; families come first, then formats, then nodes.
`kind` node: a node type that does not exist, `name` is the type. `kind` family: a model (or text encoder, VAE, ...) that
is not in this version, `name` is what people call it ("Z-Image"), or the file's name where the table does not know it.
`kind` format: the family is here, but its file is quantised in a way that is not read, `name` is the format. `text` is a
sentence for people. Each (kind, name) comes once.

Official templates name the files that model authors publish, so a name that is not in the table is that of a new model. A
person's own files may have any name, and are not judged by one that is not known (`official=False`).

A family is recognised by the names of the files that the nodes load (`part_of_file`). Whether a network is here is asked of
the records of `comfy.families`, so a new record needs no change here when its file names are in the table.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# nodes that live in the page only
FRONT_END_TYPES = frozenset({"MarkdownNote", "Note", "PrimitiveNode", "Reroute", "GroupNode"})
NEVER, BYPASSED = 2, 4  # node modes: such nodes do not run
MODEL_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")

# folder of the files that a node's widgets name
_FOLDERS = {
    "CheckpointLoader": "checkpoints",
    "CheckpointLoaderSimple": "checkpoints",
    "ImageOnlyCheckpointLoader": "checkpoints",
    "unCLIPCheckpointLoader": "checkpoints",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "DualCLIPLoader": "text_encoders",
    "TripleCLIPLoader": "text_encoders",
    "QuadrupleCLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "CLIPVisionLoader": "clip_vision",
    "ControlNetLoader": "controlnet",
    "DiffControlNetLoader": "controlnet",
    "ModelPatchLoader": "model_patches",
    "StyleModelLoader": "style_models",
    "LoraLoader": "loras",
    "LoraLoaderModelOnly": "loras",
    "UpscaleModelLoader": "upscale_models",
    "AudioEncoderLoader": "audio_encoders",
}


@dataclass(frozen=True)
class Part:
    """What a file holds. name: for people. here: whether this version has it; of a network, its public name in
    `comfy.model_base`, where it is looked up."""

    name: str
    here: bool | str = False

    @property
    def available(self) -> bool:
        """Whether this version has it."""
        if isinstance(self.here, bool):
            return self.here
        import comfy.families

        return any(self.here in family.models for family in comfy.families.records())


# Patterns of lower-case file names in checkpoints and diffusion_models, the first that fits counts.
_NETWORKS: tuple[tuple[str, Part], ...] = (
    ("*flux-2*|*flux2*|*flux_2*", Part("Flux.2")),
    ("*flux3*|*flux-3*", Part("Flux.3")),
    ("pid_flux*", Part("PiD")),
    ("*flux1*|flux.1*|flux-1*", Part("Flux.1", "Flux")),
    ("sd_xl_refiner*", Part("SDXL refiner", "SDXLRefiner")),
    ("sd_xl*|*sdxl*|*pony*|*illustrious*", Part("SDXL", "SDXL")),
    ("sd3*|stable-diffusion-3*", Part("Stable Diffusion 3", "SD3")),
    ("v1-5*|sd1*|*sd15*|*dreamshaper*|512-inpainting*", Part("Stable Diffusion 1.5", "BaseModel")),
    ("*chroma*radiance*", Part("Chroma Radiance", "ChromaRadiance")),
    ("chroma*", Part("Chroma", "Chroma")),
    ("netayume*|lumina*", Part("Lumina-Image 2.0", "Lumina2")),
    ("newbie*", Part("NewBie-Image")),
    ("z_image*|z-image*", Part("Z-Image")),
    ("auraflow*", Part("AuraFlow", "AuraFlow")),
    ("pixart*", Part("PixArt", "PixArt")),
    ("hunyuan_dit*", Part("HunyuanDiT", "HunyuanDiT")),
    ("hunyuanvideo1.5*|capybara*", Part("HunyuanVideo 1.5")),
    ("hunyuan_video*|hunyuanvideo*", Part("HunyuanVideo", "HunyuanVideo")),
    ("hunyuanimage*|hunyuan_image*", Part("HunyuanImage 2.1", "HunyuanImage21")),
    ("hunyuan3d*|hunyuan_3d*", Part("Hunyuan3D", "Hunyuan3Dv2")),
    ("qwen_image_2.1*|qwen-image-2.1*", Part("Qwen-Image 2.1")),
    ("qwen_image_layered*|qwen-image-layered*", Part("Qwen-Image-Layered")),
    ("qwen_image*|qwen-image*|firered-image-edit*", Part("Qwen-Image", "QwenImage")),
    ("*animate_2*|*animate2*", Part("Wan Animate 2")),
    ("wan*animate*", Part("Wan Animate", "WAN22_Animate")),
    ("wan*s2v*", Part("Wan 2.2 S2V", "WAN22_S2V")),
    ("humo*", Part("HuMo", "WAN21_HuMo")),
    ("*scail*", Part("SCAIL")),
    ("wan*ti2v*|wan2.2*5b*", Part("Wan 2.2 5B", "WAN22")),
    ("wan*vace*", Part("Wan VACE", "WAN21_Vace")),
    ("wan*camera*", Part("Wan Fun camera", "WAN21_Camera")),
    ("wan*|causal_forcing*|chrono_edit*", Part("Wan 2.1 and 2.2", "WAN21")),
    ("ltx-2*|ltx2*|ltx_2*", Part("LTX-2")),
    ("ltx-video*|ltxv*", Part("LTX-Video", "LTXV")),
    ("hidream_o1*", Part("HiDream-O1")),
    ("hidream*", Part("HiDream", "HiDream")),
    ("omnigen2*", Part("OmniGen2", "Omnigen2")),
    ("cosmos*", Part("Cosmos", "CosmosVideo")),
    ("mochi*", Part("Mochi", "GenmoMochi")),
    ("stable_cascade*", Part("Stable Cascade", "StableCascade_C")),
    ("svd*", Part("Stable Video Diffusion", "SVD_img2vid")),
    ("lotus*", Part("Lotus", "Lotus")),
    ("stable_audio_3*", Part("Stable Audio 3")),
    ("stable-audio*|stable_audio*", Part("Stable Audio", "StableAudio1")),
    ("acestep_v1.5*|ace_step_1.5*", Part("ACE-Step 1.5")),
    ("ace_step*", Part("ACE-Step", "ACEStep")),
    ("anima*", Part("Anima")),
    ("boogu*", Part("Boogu-Image")),
    ("ernie-image*", Part("ERNIE-Image")),
    ("fastvideo*|fasth3*|minimax_h3*", Part("MiniMax H3")),
    ("minimax_music*", Part("MiniMax Music 3")),
    ("fibo2*", Part("Fibo 2.0")),
    ("ideogram4*", Part("Ideogram 4")),
    ("joyai*", Part("JoyAI Image Edit")),
    ("kandinsky5*", Part("Kandinsky 5")),
    ("krea2*", Part("Krea 2")),
    ("lens*", Part("Lens")),
    ("longcat_image*", Part("LongCat-Image")),
    ("mage_flow*", Part("Mage-Flow")),
    ("ming_image*", Part("Ming-Image")),
    ("moss_image*", Part("MOSS-Image")),
    ("ovis_image*", Part("Ovis-Image")),
    ("pixal3d*", Part("Pixal3D")),
    ("pixeldit*", Part("PixelDiT")),
    ("rt_detr*", Part("RT-DETR")),
    ("sam3*", Part("SAM 3")),
    ("sdpose*", Part("SDPose")),
    ("seedvr2*", Part("SeedVR2")),
    ("trellis*", Part("TRELLIS.2")),
    ("triposplat*", Part("TripoSplat")),
    ("void_pass*", Part("VOID")),
    ("yue2*", Part("YuE2")),
)  # fmt: skip

# The same for what goes with a network.
_BESIDE: dict[str, tuple[tuple[str, Part], ...]] = {
    "text_encoders": (
        ("clip_l*|clip_g*|*sd*clip*", Part("CLIP", True)),
        ("umt5*", Part("umT5-XXL", True)),
        ("t5xxl*", Part("T5-XXL", True)),
        ("t5-base*", Part("T5-base", True)),
        ("byt5*", Part("ByT5", True)),
        ("llava_llama3*", Part("LLaVA Llama 3", True)),
        ("qwen_2.5_vl_7b*", Part("Qwen2.5-VL 7B", True)),
        ("gemma_2_2b.*|gemma_2_2b_fp*|gemma_2_2b_bf*", Part("Gemma 2 2B", True)),
        ("qwen_2.5_vl_fp16*", Part("Qwen2.5-VL 3B")),
        ("llama_3.1*", Part("Llama 3.1 8B")),
        ("gemma_2_2b_it_elm*", Part("Gemma 2 2B for PixelDiT")),
        ("gemma_3*|gemma-3*", Part("Gemma 3")),
        ("gemma4*", Part("Gemma 4")),
        ("t5gemma*", Part("T5Gemma")),
        ("jina_clip*", Part("Jina CLIP")),
        ("gpt_oss*", Part("GPT-OSS")),
        ("ernie-image*|ministral*|mistral*", Part("Mistral 3")),
        ("ovis*", Part("Ovis 2.5")),
        ("qwen3vl*", Part("Qwen3-VL")),
        ("qwen3.*", Part("Qwen3.5")),
        ("qwen_3*|qwen_*ace15*", Part("Qwen3")),
        ("ming_image*", Part("Ling mini 2.0")),
        ("minimax_music3*", Part("MiniMax Music 3's text encoder")),
    ),
    "vae": (
        ("ae.*|ae_*|flux*_ae*", Part("Flux.1's VAE", True)),
        ("vae-ft-mse*|sdxl_vae*", Part("Stable Diffusion's VAE", True)),
        ("wan_2.1*|wan2_1*|wan_alpha*|qwen_image_vae*", Part("Wan 2.1's VAE", True)),
        ("wan2.2*", Part("Wan 2.2's VAE", True)),
        ("hunyuan_video_vae*", Part("HunyuanVideo's VAE", True)),
        ("hunyuanvideo15*", Part("HunyuanVideo 1.5's VAE")),
        ("flux2-vae*|full_encoder_small_decoder*", Part("Flux.2's VAE")),
        ("marigold_v2*", Part("Marigold 2's VAE")),
        ("qwen_image_layered*", Part("Qwen-Image-Layered's VAE")),
        ("qwen_image_2.1*", Part("Qwen-Image 2.1's VAE")),
        ("ltx-2*", Part("LTX-2's VAE")),
        ("ace_1.5*", Part("ACE-Step 1.5's VAE")),
        ("minimax_h3*", Part("MiniMax H3's VAE")),
        ("minimax_music3*", Part("MiniMax Music 3's VAE")),
        ("mage_flow*", Part("Mage-Flow's VAE")),
        ("ming_image*", Part("Ming-Image's VAE")),
        ("seedvr2*", Part("SeedVR2's VAE")),
        ("cogvideox*", Part("CogVideoX's VAE")),
        ("trellis*", Part("TRELLIS.2's VAE")),
        ("triposplat*", Part("TripoSplat's VAE")),
    ),
    "clip_vision": (
        ("clip_vision*|sigclip*|llava*", Part("CLIP vision", True)),
        ("dino*", Part("DINOv3")),
    ),
    "controlnet": (
        ("sd3.5_large*", Part("ControlNet of Stable Diffusion 3.5", True)),
        ("qwen-image-instantx*", Part("ControlNet of Qwen-Image", True)),
        ("qwen-image-*fun*", Part("Fun ControlNet of Qwen-Image")),
    ),
    "model_patches": (
        ("uso*", Part("USO", True)),
        ("qwen_image_*diffsynth*", Part("DiffSynth ControlNet of Qwen-Image", True)),
        ("z-image*", Part("ControlNet of Z-Image")),
        ("anima*", Part("LLLite of Anima")),
        ("*infinitetalk*", Part("InfiniteTalk")),
        ("minimax_h3*", Part("ControlNet of MiniMax H3")),
    ),
}  # fmt: skip

# Quantised formats that files say in their names and that are not read.
_FORMATS = (
    ("*int8*", "int8"),
    ("*nvfp4*|*fp4*", "fp4"),
    ("*w4a8*", "w4a8"),
    ("*fp8mixed*|*fp8_mixed*", "mixed fp8"),
)


def _subgraphs(graph: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for subgraph in graph.get("definitions", {}).get("subgraphs", []):
        yield subgraph
        yield from _subgraphs(subgraph)


def active_nodes(graph: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The nodes of a workflow that are not switched off, those of used sub-graphs in place of their boxes."""
    own = {str(subgraph["id"]): subgraph for subgraph in _subgraphs(graph)}
    waiting: list[tuple[Mapping[str, Any], frozenset[str]]] = [(graph, frozenset())]
    seen: set[str] = set()
    while waiting:
        level, inside = waiting.pop()
        for node in level.get("nodes", []):
            kind = str(node["type"])
            if node.get("mode") in (NEVER, BYPASSED):
                continue
            if kind not in own:
                yield node
            elif kind not in inside | seen:
                seen.add(kind)
                waiting.append((own[kind], inside | {kind}))


def files_of(graph: Mapping[str, Any]) -> dict[str, set[str]]:
    """{folder below models: names of files} that a workflow's active nodes load."""
    found: dict[str, set[str]] = {}
    for node in active_nodes(graph):
        listed = node.get("properties", {}).get("models") or []
        folders = {entry["name"]: entry.get("directory") for entry in listed if "name" in entry}
        values = node.get("widgets_values") or []
        named = [v for v in (values.values() if isinstance(values, dict) else values) if isinstance(v, str)]
        files = [value for value in named if value.lower().endswith(MODEL_FILES)] or list(folders)
        for file in files:
            folder = _FOLDERS.get(str(node["type"])) or folders.get(file)
            if folder:
                found.setdefault(str(folder), set()).add(file)
    return found


def _first(table: tuple[tuple[str, Any], ...], file: str) -> Any:
    name = os.path.basename(file.replace("\\", "/")).lower()
    fits = (found for patterns, found in table for pattern in patterns.split("|") if fnmatch.fnmatchcase(name, pattern))
    return next(fits, None)


def part_of_file(folder: str, file: str) -> Part | None:
    """What a file of this name in this folder below models holds; None for names that are not known."""
    if folder in ("checkpoints", "diffusion_models"):
        return _first(_NETWORKS, file)
    return _first(_BESIDE.get(folder, ()), file)


def is_network(name: str) -> bool:
    """Whether a family's name is that of a diffusion network, not of what goes with one."""
    return any(part.name == name for _, part in _NETWORKS)


def format_of_file(file: str) -> str | None:
    """The quantised format that a file's name tells and that is not read, or None."""
    return _first(_FORMATS, file)


def _missing_file(folder: str, file: str, official: bool) -> tuple[str, str, str] | None:
    """(kind, name, text) of what lacks for one file, or None."""
    if folder not in _BESIDE and folder not in ("checkpoints", "diffusion_models"):
        return None  # adapters of a network that is looked at itself, and files whose nodes say whether they are here
    part = part_of_file(folder, file)
    if part is None:
        if not official:
            return None
        return "family", file, f"{file} belongs to no model that this version knows"
    if not part.available:
        return "family", part.name, f"{part.name} is not in this version (file {file})"
    found = format_of_file(file)
    if found is not None:
        return (
            "format",
            found,
            f"{part.name} is in this version, but not its {found} format; use another file than {file}",
        )
    return None


def missing_of(
    template: Mapping[str, Any], object_info_names: Collection[str], official: bool = True
) -> list[dict[str, str]]:
    """What a template needs and this version lacks; see the module's description."""
    lacking = {
        found[:2]: found[2]
        for folder, names in sorted(files_of(template).items())
        for file in sorted(names)
        if (found := _missing_file(folder, file, official)) is not None
    }
    known = set(object_info_names) | FRONT_END_TYPES
    for kind in sorted({str(node["type"]) for node in active_nodes(template)} - known):
        lacking["node", kind] = f"the node {kind} is not in this version"
    order = ("family", "format", "node")
    return [
        {"kind": kind, "name": name, "text": text}
        for (kind, name), text in sorted(lacking.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]
