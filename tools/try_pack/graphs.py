"""A small workflow around a node, from what `/object_info` says of it.

Values are the declared defaults, or the first choice; sizes and numbers of steps are small. What is linked comes from a
producer of its type: from the table below, else from the node of the pack, or of the program, that returns the type and
needs the least.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.e2e.workflows import DEV, Prompt, node

PROBE = "TryPackProbe"
MOST_DEPTH = 5
SOUND = "start.wav"
PICTURE = "start.png"
# values for inputs of these names, where the node allows them
SMALL = {"width": 64, "height": 64, "steps": 2, "batch_size": 1, "length": 5, "frames": 5, "num_frames": 5}
# a picture of four pixels, for texts that should be one
BASE64 = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFUlEQVR4nAXBAQEAAACAEP9PF0JQGR7vBPykAXTzAAAAAElFTkSuQmCC"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

# family -> the checkpoint whose network, encoder and autoencoder are used, and the node whose latents they take
FAMILIES = {
    "flux": (DEV, "EmptySD3LatentImage"),
    "sd15": ("tiny_sd15.safetensors", "EmptyLatentImage"),
    "sdxl": ("tiny_sdxl.safetensors", "EmptyLatentImage"),
}
_CHECKPOINT, _LATENT = FAMILIES["flux"]  # in the table; a graph has its family's instead

# type -> (node, its inputs, slot); an input ("TYPE",) is linked to the producer of that type
_PRODUCERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "IMAGE": ("LoadImage", {"image": PICTURE}, 0),
    "MASK": ("LoadImage", {"image": PICTURE}, 1),
    "LATENT": (_LATENT, {"width": 64, "height": 64, "batch_size": 1}, 0),
    "MODEL": ("CheckpointLoaderSimple", {"ckpt_name": _CHECKPOINT}, 0),
    "CLIP": ("CheckpointLoaderSimple", {"ckpt_name": _CHECKPOINT}, 1),
    "VAE": ("CheckpointLoaderSimple", {"ckpt_name": _CHECKPOINT}, 2),
    "CONDITIONING": ("CLIPTextEncode", {"clip": ("CLIP",), "text": "a red fox in the snow"}, 0),
    "SIGMAS": ("BasicScheduler", {"model": ("MODEL",), "scheduler": "simple", "steps": 2, "denoise": 1.0}, 0),
    "SAMPLER": ("KSamplerSelect", {"sampler_name": "euler"}, 0),
    "GUIDER": ("BasicGuider", {"model": ("MODEL",), "conditioning": ("CONDITIONING",)}, 0),
    "NOISE": ("RandomNoise", {"noise_seed": 7}, 0),
    "AUDIO": ("LoadAudio", {"audio": SOUND}, 0),
    "VIDEO": ("CreateVideo", {"images": ("IMAGE",), "fps": 8.0}, 0),
    "CONTROL_NET": ("ControlNetLoader", {"control_net_name": "tiny_flux_xlabs.safetensors"}, 0),
    "CLIP_VISION": ("CLIPVisionLoader", {"clip_name": "tiny_sigclip.safetensors"}, 0),
    "CLIP_VISION_OUTPUT": (
        "CLIPVisionEncode", {"clip_vision": ("CLIP_VISION",), "image": ("IMAGE",), "crop": "center"}, 0,
    ),
    "STYLE_MODEL": ("StyleModelLoader", {"style_model_name": "tiny_redux.safetensors"}, 0),
    "*": ("PrimitiveString", {"value": "something"}, 0),
    "STRING": ("PrimitiveString", {"value": "a text"}, 0),
    "INT": ("PrimitiveInt", {"value": 3}, 0),
    "FLOAT": ("PrimitiveFloat", {"value": 0.5}, 0),
    "BOOLEAN": ("PrimitiveBoolean", {"value": True}, 0),
}  # fmt: skip


class NoGraph(Exception):
    """Why no workflow can be built around a node."""


def declared(info: Mapping[str, Any], group: str) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """(type, options) of the inputs of a group in a node's description."""
    found = {}
    for name, entry in (info["input"].get(group) or {}).items():
        entry = entry if isinstance(entry, list) and entry else [entry]
        options = entry[1] if len(entry) > 1 and isinstance(entry[1], Mapping) else {}
        found[name] = entry[0], options
    return found


def flat(name: str, kind: Any, options: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(name in the prompt, type, options) of the inputs that an input of V3 nodes stands for; most are one themselves."""
    template = options.get("template") or {}
    if kind == "COMFY_AUTOGROW_V3":
        inner = {**(template["input"].get("required") or {}), **(template["input"].get("optional") or {})}
        entry = next(iter(inner.values()))
        names = template.get("names") or [f"{template['prefix']}{number}" for number in range(template["max"])]
        for part in names[: max(1, template["min"])]:
            yield f"{name}.{part}", entry[0], entry[1] if len(entry) > 1 else {}
    elif kind == "COMFY_DYNAMICCOMBO_V3":
        chosen = options["options"][0]
        yield name, [chosen["key"]], {}
        for part, (inner_kind, more) in declared({"input": chosen["inputs"]}, "required").items():
            yield from flat(f"{name}.{part}", inner_kind, more)
    elif kind == "COMFY_MATCHTYPE_V3":
        yield name, template["allowed_types"], options
    else:
        yield name, kind, options


def choices(kind: Any, options: Mapping[str, Any]) -> list[Any] | None:
    """The choices of an input; None where it is something else."""
    if isinstance(kind, list):
        return kind
    return list(options.get("options") or ()) if kind == "COMBO" else None


def _is_known(kind: Any) -> bool:
    return isinstance(kind, str) and kind in _PRODUCERS


def empty_lists(info: Mapping[str, Any]) -> list[str]:
    """Names of a node's required inputs whose list of choices is empty."""
    return [name for name, (kind, options) in declared(info, "required").items() if choices(kind, options) == []]


def _number(name: str, kind: str, options: Mapping[str, Any]) -> Any:
    least = options.get("min", 0)
    value = options.get("default", max(least, 0) if isinstance(least, int | float) else 0)
    small = SMALL.get(name)
    if small is not None and isinstance(value, int | float) and value > small:
        value = max(small, least)
    return float(value) if kind == "FLOAT" else int(value)


def constant(name: str, kind: Any, options: Mapping[str, Any]) -> Any:
    """A value for an input that is no link. Raises NoGraph."""
    listed = choices(kind, options)
    if listed is not None:
        if not listed:
            raise NoGraph(f"the choices of {name!r} are empty")
        default = options.get("default")
        return default if default in listed else listed[0]
    if kind in ("INT", "FLOAT"):
        return _number(name, kind, options)
    if kind == "BOOLEAN":
        return bool(options.get("default", False))
    return str(options.get("default") or "")


class Graph:
    """A prompt that grows: producers are added once for each type."""

    def __init__(self, infos: Mapping[str, Any], pack: set[str], family: str) -> None:
        checkpoint, latent = FAMILIES[family]
        self._replaced = {_CHECKPOINT: checkpoint, _LATENT: latent}
        self._infos = infos
        self._pack = pack
        self._made: dict[str, list[Any]] = {}
        self.prompt: Prompt = {}

    def _add(self, class_type: str, inputs: dict[str, Any]) -> str:
        name = f"{len(self.prompt)}"
        self.prompt[name] = node(class_type, **inputs)
        return name

    def producer(self, kind: str, busy: tuple[str, ...] = ()) -> list[Any]:
        """The (node id, slot) that gives a type, or the first one of a union that anything gives. Raises NoGraph."""
        problem = NoGraph(f"nothing gives {kind}")
        for part in [part.strip() for part in kind.split(",")]:
            try:
                if part not in self._made:
                    self._made[part] = self._produce(part, busy)
                return self._made[part]
            except NoGraph as error:
                problem = error
        raise problem

    def _produce(self, kind: str, busy: tuple[str, ...]) -> list[Any]:
        if kind in _PRODUCERS:
            class_type, inputs, slot = _PRODUCERS[kind]
            class_type = self._replaced.get(class_type, class_type)
            linked: dict[str, Any] = {
                name: self.producer(value[0], busy) if isinstance(value, tuple) else self._replaced.get(value, value)
                for name, value in inputs.items()
            }
            same = [name for name, made in self.prompt.items() if made == node(class_type, **linked)]
            return [same[0] if same else self._add(class_type, linked), slot]
        if len(busy) >= MOST_DEPTH:
            raise NoGraph(f"nothing simple gives {kind}")
        problem = NoGraph(f"nothing gives {kind}")
        for class_type in self._candidates(kind, busy):
            before = dict(self.prompt), dict(self._made)
            try:
                name = self.add_node(class_type, busy)
                return [name, self._infos[class_type]["output"].index(kind)]
            except NoGraph as error:
                self.prompt, self._made = before
                problem = error
        raise problem

    def _candidates(self, kind: str, busy: tuple[str, ...]) -> list[str]:
        giving = [name for name, info in self._infos.items() if kind in info["output"] and name not in busy]

        def cost(name: str) -> tuple[bool, int, str]:
            links = [part for part, _ in declared(self._infos[name], "required").values() if part not in WIDGETS]
            return name not in self._pack, sum(not isinstance(part, list) for part in links), name

        return sorted(giving, key=cost)

    def add_node(self, class_type: str, busy: tuple[str, ...] = ()) -> str:
        """Add a node with all that it requires; its id. Raises NoGraph."""
        info = self._infos[class_type]
        required, optional = declared(info, "required"), declared(info, "optional")
        wanted = dict(required)
        if not required:  # a node that works on whatever is linked to it
            wanted = {name: entry for name, entry in optional.items() if _is_known(entry[0])}
        inputs: dict[str, Any] = {}
        entries = [part for name, (kind, options) in wanted.items() for part in flat(name, kind, options)]
        for name, kind, options in entries:
            is_link = not isinstance(kind, list) and kind not in WIDGETS
            if is_link or (options.get("forceInput") and _is_known(kind)):
                inputs[name] = self.producer(str(kind), (*busy, class_type))
            elif kind == "STRING" and not options.get("default") and "base64" in (class_type + name).lower():
                inputs[name] = BASE64
            else:
                inputs[name] = constant(name, kind, options)
        return self._add(class_type, inputs)


def around(class_type: str, infos: Mapping[str, Any], pack: set[str], family: str = "flux") -> Prompt:
    """A prompt with a node and a probe at each of its outputs, which is named by the slot. Raises NoGraph."""
    graph = Graph(infos, pack, family)
    name = graph.add_node(class_type)
    info = infos[class_type]
    for slot in range(len(info["output"])):
        graph.prompt[f"probe{slot}"] = node(PROBE, value=[name, slot], name=str(slot))
    if not info["output"] and not info["output_node"]:
        raise NoGraph("it has no outputs and is no output node, so it never runs")
    return graph.prompt
