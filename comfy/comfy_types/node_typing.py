"""Types for V1 node classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import Any, ClassVar, TypedDict


class _TypeName(str, Enum):  # noqa: UP042 - nodes rely on its members being strings
    """A type's name, which other names fit: its own parts, and every name for `*`."""

    def _parts(self, text: str) -> set[str]:
        return {part.strip() for part in text.split(",")}

    def __ne__(self, value: object) -> bool:
        if "*" in (self.value, value):
            return False
        return not isinstance(value, str) or not self._parts(value) <= self._parts(self.value)

    __eq__ = str.__eq__
    __hash__ = str.__hash__


_NAMES = [
    "AUDIO",
    "BBOX",
    "BOOLEAN",
    "CLIP",
    "CLIP_VISION",
    "CLIP_VISION_OUTPUT",
    "COMBO",
    "CONDITIONING",
    "CONTROL_NET",
    "FACE_ANALYSIS",
    "FLOAT",
    "GLIGEN",
    "GUIDER",
    "IMAGE",
    "INT",
    "LATENT",
    "LORA_MODEL",
    "LOSS_MAP",
    "MASK",
    "MODEL",
    "NOISE",
    "POINT",
    "SAMPLER",
    "SEGS",
    "SIGMAS",
    "STRING",
    "STYLE_MODEL",
    "UPSCALE_MODEL",
    "VAE",
    "VIDEO",
    "WEBCAM",
]
_GROUPS = {"ANY": "*", "NUMBER": "FLOAT,INT", "PRIMITIVE": "STRING,FLOAT,INT,BOOLEAN"}

# names of input and output types: IO.STRING is "STRING"
IO: Any = _TypeName("IO", {**{name: name for name in _NAMES}, **_GROUPS})  # type: ignore[call-overload]


class InputTypeDict(TypedDict, total=False):
    """What INPUT_TYPES returns."""

    required: dict[str, Any]
    optional: dict[str, Any]
    hidden: dict[str, Any]


class FileLocator(TypedDict):
    """A file in one of the program's folders."""

    filename: str
    subfolder: str
    type: str


class ComfyNodeABC(ABC):
    """Optional base of V1 nodes: the attributes a node may have."""

    DESCRIPTION: str
    CATEGORY: str
    EXPERIMENTAL: bool
    DEPRECATED: bool
    API_NODE: bool | None
    INPUT_IS_LIST: bool
    OUTPUT_NODE: bool
    OUTPUT_IS_LIST: tuple[bool, ...]
    OUTPUT_TOOLTIPS: tuple[str, ...]
    RETURN_TYPES: ClassVar[tuple[Any, ...]]
    RETURN_NAMES: tuple[str, ...]
    FUNCTION: str

    @classmethod
    @abstractmethod
    def INPUT_TYPES(cls) -> InputTypeDict:  # noqa: N802 - ComfyUI's name
        """The node's inputs."""
        return {"required": {}}


class CheckLazyMixin:
    """Computes every lazy input that is linked."""

    def check_lazy_status(self, **kwargs: Any) -> list[str]:
        return [name for name, value in kwargs.items() if value is None]
