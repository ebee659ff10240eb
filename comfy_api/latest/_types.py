"""Types of inputs and outputs of V3 nodes: `io.Int.Input("steps", default=20)`, `io.Image.Output()`.

Every type is a class with `io_type` (what the page and the executor compare), `Type` (for annotations), `Input` and
`Output`. An input's options are those of V1 nodes under Python names; those left None are not sent.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar


class FolderType(str, Enum):  # noqa: UP042 - ComfyUI's packs rely on str() of both
    input = "input"
    output = "output"
    temp = "temp"


class UploadType(str, Enum):  # noqa: UP042 - ComfyUI's packs rely on str() of both
    image = "image_upload"
    audio = "audio_upload"
    video = "video_upload"
    model = "file_upload"


class NumberDisplay(str, Enum):  # noqa: UP042 - ComfyUI's packs rely on str() of both
    number = "number"
    slider = "slider"


class RemoteOptions:
    """A choice whose options the page asks a route for."""

    def __init__(
        self,
        route: str,
        refresh_button: bool,
        control_after_refresh: str = "first",
        timeout: int | None = None,
        max_retries: int | None = None,
        refresh: int | None = None,
    ) -> None:
        self.route = route
        self.refresh_button = refresh_button
        self.control_after_refresh = control_after_refresh
        self.timeout = timeout
        self.max_retries = max_retries
        self.refresh = refresh

    def as_dict(self) -> dict[str, Any]:
        return without_none(vars(self))


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


class Input:
    """An input of any type: a link from another node, or a value set on the node.

    `lazy` inputs are computed only when check_lazy_status asks for them; `raw_link` ones receive the link itself.
    """

    io_type: str = "*"

    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        extra_dict: dict[str, Any] | None = None,
        raw_link: bool | None = None,
        advanced: bool | None = None,
    ) -> None:
        self.id = id
        self.display_name = display_name
        self.optional = optional
        self.tooltip = tooltip
        self.lazy = lazy
        self.extra_dict = extra_dict or {}
        self.raw_link = raw_link
        self.advanced = advanced

    def get_io_type(self) -> str:
        return self.io_type

    def as_dict(self) -> dict[str, Any]:
        """Options in the form INPUT_TYPES has them."""
        shared = {
            "display_name": self.display_name,
            "tooltip": self.tooltip,
            "lazy": self.lazy,
            "rawLink": self.raw_link,
            "advanced": self.advanced,
        }
        return {**without_none(shared), **self.extra_dict}


class WidgetInput(Input):
    """An input with a widget: it has a value on the node, `default` at first.

    `force_input` shows it as a socket only, `socketless` as a widget only.
    """

    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        default: Any = None,
        socketless: bool | None = None,
        widget_type: str | None = None,
        force_input: bool | None = None,
        extra_dict: dict[str, Any] | None = None,
        raw_link: bool | None = None,
        advanced: bool | None = None,
    ) -> None:
        super().__init__(id, display_name, optional, tooltip, lazy, extra_dict, raw_link, advanced)
        self.default = default.value if isinstance(default, Enum) else default
        self.socketless = socketless
        self.widget_type = widget_type
        self.force_input = force_input

    def as_dict(self) -> dict[str, Any]:
        shared = {
            "default": self.default,
            "socketless": self.socketless,
            "widgetType": self.widget_type,
            "forceInput": self.force_input,
        }
        return {**super().as_dict(), **without_none(shared)}


class Output:
    """An output; `is_output_list` ones return a list whose items go on one by one."""

    io_type: str = "*"

    def __init__(
        self,
        id: str | None = None,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
    ) -> None:
        self.id = id
        self.display_name = display_name or id
        self.tooltip = tooltip
        self.is_output_list = is_output_list

    def get_io_type(self) -> str:
        return self.io_type


class ComfyTypeIO:
    """Base of all types."""

    io_type: ClassVar[str] = "*"
    Type: ClassVar[Any] = Any
    Input: ClassVar[type] = Input
    Output: ClassVar[type] = Output


def comfytype(io_type: str) -> Any:
    """Class decorator: names a type and gives its `Input` and `Output` that name."""

    def name(cls: type) -> type:
        bases = {"Input": getattr(cls, "Input", Input), "Output": getattr(cls, "Output", Output)}
        cls.io_type = io_type  # type: ignore[attr-defined]
        for part, base in bases.items():
            members = {"io_type": io_type, "__doc__": base.__doc__, "Parent": cls}
            setattr(cls, part, type(part, (base,), members))
        if not hasattr(cls, "Type"):
            cls.Type = Any  # type: ignore[attr-defined]
        return cls

    return name


def Custom(io_type: str) -> Any:  # noqa: N802 - used like a class
    """A type of a pack's own, compared by name."""
    return comfytype(io_type)(type(io_type, (ComfyTypeIO,), {}))


def _with_type(io_type: str, python_type: Any = Any) -> Any:
    cls = Custom(io_type)
    cls.Type = python_type
    return cls


# ---- values with widgets -------------------------------------------------------------------------------------------


class _NumberInput(WidgetInput):
    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        default: Any = None,
        min: Any = None,
        max: Any = None,
        step: Any = None,
        control_after_generate: bool | None = None,
        display_mode: NumberDisplay | None = None,
        socketless: bool | None = None,
        force_input: bool | None = None,
        round: Any = None,
        **more: Any,
    ) -> None:
        super().__init__(id, display_name, optional, tooltip, lazy, default, socketless, None, force_input, **more)
        self.min = min
        self.max = max
        self.step = step
        self.round = round
        self.control_after_generate = control_after_generate
        self.display_mode = display_mode

    def as_dict(self) -> dict[str, Any]:
        mode = self.display_mode.value if isinstance(self.display_mode, Enum) else self.display_mode
        shared = {
            "min": self.min,
            "max": self.max,
            "step": self.step,
            "round": self.round,
            "control_after_generate": self.control_after_generate,
            "display": mode,
        }
        return {**super().as_dict(), **without_none(shared)}


class _StringInput(WidgetInput):
    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        multiline: bool = False,
        placeholder: str | None = None,
        default: str | None = None,
        dynamic_prompts: bool | None = None,
        socketless: bool | None = None,
        force_input: bool | None = None,
        **more: Any,
    ) -> None:
        super().__init__(id, display_name, optional, tooltip, lazy, default, socketless, None, force_input, **more)
        self.multiline = multiline
        self.placeholder = placeholder
        self.dynamic_prompts = dynamic_prompts

    def as_dict(self) -> dict[str, Any]:
        shared = {
            "multiline": self.multiline,
            "placeholder": self.placeholder,
            "dynamicPrompts": self.dynamic_prompts,
        }
        return {**super().as_dict(), **without_none(shared)}


class _BooleanInput(WidgetInput):
    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        default: bool | None = None,
        label_on: str | None = None,
        label_off: str | None = None,
        socketless: bool | None = None,
        force_input: bool | None = None,
        **more: Any,
    ) -> None:
        super().__init__(id, display_name, optional, tooltip, lazy, default, socketless, None, force_input, **more)
        self.label_on = label_on
        self.label_off = label_off

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), **without_none({"label_on": self.label_on, "label_off": self.label_off})}


class _ComboInput(WidgetInput):
    """A choice; `options` is a list or an Enum of strings."""

    multiselect = False

    def __init__(
        self,
        id: str,
        options: Any = None,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        default: Any = None,
        control_after_generate: bool | None = None,
        upload: UploadType | None = None,
        image_folder: FolderType | None = None,
        remote: RemoteOptions | None = None,
        socketless: bool | None = None,
        **more: Any,
    ) -> None:
        super().__init__(id, display_name, optional, tooltip, lazy, default, socketless, **more)
        is_enum = isinstance(options, type) and issubclass(options, Enum)
        self.options = [member.value for member in options] if is_enum else options
        self.control_after_generate = control_after_generate
        self.upload = upload
        self.image_folder = image_folder
        self.remote = remote

    def as_dict(self) -> dict[str, Any]:
        folder = self.image_folder.value if isinstance(self.image_folder, Enum) else self.image_folder
        shared = {
            "multiselect": self.multiselect,
            "options": self.options,
            "control_after_generate": self.control_after_generate,
            "image_folder": folder,
            "remote": self.remote.as_dict() if self.remote else None,
        }
        if self.upload is not None:
            shared[self.upload.value] = True
        return {**super().as_dict(), **without_none(shared)}


class _MultiComboInput(_ComboInput):
    """A choice of several."""

    multiselect = True

    def __init__(
        self, id: str, options: Any, *args: Any, placeholder: str | None = None, chip: bool | None = None, **more: Any
    ) -> None:
        super().__init__(id, options, *args, **more)
        self.placeholder = placeholder
        self.chip = chip

    def as_dict(self) -> dict[str, Any]:
        select = without_none({"placeholder": self.placeholder, "chip": self.chip})
        return {**super().as_dict(), **({"multi_select": select} if select else {})}


class _ComboOutput(Output):
    def __init__(
        self,
        id: str | None = None,
        display_name: str | None = None,
        options: Any = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
    ) -> None:
        super().__init__(id, display_name, tooltip, is_output_list)
        self.options = options or []


@comfytype("BOOLEAN")
class Boolean(ComfyTypeIO):
    Type = bool
    Input = _BooleanInput


@comfytype("INT")
class Int(ComfyTypeIO):
    Type = int
    Input = _NumberInput


@comfytype("FLOAT")
class Float(ComfyTypeIO):
    Type = float
    Input = _NumberInput


@comfytype("STRING")
class String(ComfyTypeIO):
    Type = str
    Input = _StringInput


@comfytype("COMBO")
class Combo(ComfyTypeIO):
    Type = str
    Input = _ComboInput
    Output = _ComboOutput


@comfytype("COMBO")
class MultiCombo(ComfyTypeIO):
    Type = list
    Input = _MultiComboInput


class _WebcamInput(WidgetInput):
    """A picture taken by the page's camera."""


@comfytype("WEBCAM")
class Webcam(ComfyTypeIO):
    Type = str
    Input = _WebcamInput


# ---- linked values -------------------------------------------------------------------------------------------------

Image = _with_type("IMAGE")
Mask = _with_type("MASK")
Latent = _with_type("LATENT", dict)
Conditioning = _with_type("CONDITIONING", list)
Sampler = _with_type("SAMPLER")
Sigmas = _with_type("SIGMAS")
Noise = _with_type("NOISE")
Guider = _with_type("GUIDER")
Clip = _with_type("CLIP")
ControlNet = _with_type("CONTROL_NET")
Vae = _with_type("VAE")
Model = _with_type("MODEL")
ClipVision = _with_type("CLIP_VISION")
ClipVisionOutput = _with_type("CLIP_VISION_OUTPUT")
StyleModel = _with_type("STYLE_MODEL")
Gligen = _with_type("GLIGEN")
UpscaleModel = _with_type("UPSCALE_MODEL")
LatentUpscaleModel = _with_type("LATENT_UPSCALE_MODEL")
ModelPatch = _with_type("MODEL_PATCH")
AudioEncoder = _with_type("AUDIO_ENCODER")
AudioEncoderOutput = _with_type("AUDIO_ENCODER_OUTPUT")
Audio = _with_type("AUDIO", dict)
Video = _with_type("VIDEO")
SVG = _with_type("SVG")
LoraModel = _with_type("LORA_MODEL", dict)
LossMap = _with_type("LOSS_MAP", dict)
Voxel = _with_type("VOXEL")
Mesh = _with_type("MESH")
Hooks = _with_type("HOOKS")
HookKeyframes = _with_type("HOOK_KEYFRAMES")
TimestepsRange = _with_type("TIMESTEPS_RANGE", tuple)
LatentOperation = _with_type("LATENT_OPERATION")
FlowControl = _with_type("FLOW_CONTROL", tuple)
Accumulation = _with_type("ACCUMULATION", dict)
Load3DCamera = _with_type("LOAD3D_CAMERA")
Load3D = _with_type("LOAD_3D")
Load3DAnimation = _with_type("LOAD_3D_ANIMATION")
Photomaker = _with_type("PHOTOMAKER")
Point = _with_type("POINT")
FaceAnalysis = _with_type("FACE_ANALYSIS")
BBOX = _with_type("BBOX")
SEGS = _with_type("SEGS")
WanCameraEmbedding = _with_type("WAN_CAMERA_EMBEDDING")
Tracks = _with_type("TRACKS")
BoundingBox = _with_type("BOUNDING_BOX")
Array = _with_type("ARRAY", list)
ImageCompare = _with_type("IMAGECOMPARE")
File3DAny = _with_type("FILE_3D")
File3DGLB, File3DGLTF = _with_type("FILE_3D_GLB"), _with_type("FILE_3D_GLTF")
File3DFBX, File3DOBJ = _with_type("FILE_3D_FBX"), _with_type("FILE_3D_OBJ")
File3DSTL, File3DUSDZ = _with_type("FILE_3D_STL"), _with_type("FILE_3D_USDZ")
AnyType = _with_type("*")


class _MultiTypeInput(Input):
    """Takes any of `types`. `id` may be an input with a widget, which is then shown when nothing is linked."""

    def __init__(self, id: Any, types: list[Any], **more: Any) -> None:
        self.shown: Input | None = id if isinstance(id, Input) else None
        if self.shown is not None:
            super().__init__(self.shown.id, optional=self.shown.optional, **more)
        else:
            super().__init__(id, **more)
        self.types = types

    def get_io_type(self) -> str:
        names = [kind if isinstance(kind, str) else kind.io_type for kind in self.types]
        if self.shown is not None:
            names.insert(0, self.shown.get_io_type())
        return ",".join(dict.fromkeys(names))

    def as_dict(self) -> dict[str, Any]:
        own = super().as_dict()
        return own if self.shown is None else {**self.shown.as_dict(), "widgetType": self.shown.get_io_type(), **own}


@comfytype("COMFY_MULTITYPED_V3")
class MultiType(ComfyTypeIO):
    Input = _MultiTypeInput
