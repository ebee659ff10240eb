"""Control networks with several modes, and for repainting."""

from __future__ import annotations

from typing import Any

import comfy.utils
from comfy_nodes.controlnet import ControlNetApplyAdvanced

# number of a mode in the union network of Xinsir
UNION_TYPES = {
    "openpose": 0,
    "depth": 1,
    "hed/pidi/scribble/ted": 2,
    "canny/lineart/anime_lineart/mlsd": 3,
    "normal": 4,
    "segment": 5,
    "tile": 6,
    "repaint": 7,
}


class SetUnionControlNetType:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"control_net": ("CONTROL_NET",), "type": (["auto", *UNION_TYPES],)}}

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "set_controlnet_type"
    CATEGORY = "conditioning/controlnet"

    def set_controlnet_type(self, control_net: Any, type: str):
        control_net = control_net.copy()
        control_net.set_extra_arg("control_type", [UNION_TYPES[type]] if type in UNION_TYPES else [])
        return (control_net,)


class ControlNetInpaintingAliMamaApply(ControlNetApplyAdvanced):
    @classmethod
    def INPUT_TYPES(cls):
        shared = ControlNetApplyAdvanced.INPUT_TYPES()["required"]
        first = {name: shared[name] for name in ("positive", "negative", "control_net")}
        last = {name: shared[name] for name in ("strength", "start_percent", "end_percent")}
        return {"required": {**first, "vae": ("VAE",), "image": ("IMAGE",), "mask": ("MASK",), **last}}

    FUNCTION = "apply_inpaint_controlnet"

    def apply_inpaint_controlnet(
        self,
        positive: Any,
        negative: Any,
        control_net: Any,
        vae: Any,
        image: Any,
        mask: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
    ):
        """The network sees the picture without its masked part, and, where it takes one, the mask."""
        extra = []
        if control_net.concat_mask:
            keep = 1.0 - mask.reshape((-1, 1, *mask.shape[-2:]))
            shown = comfy.utils.common_upscale(keep, image.shape[2], image.shape[1], "bilinear", "center").round()
            image = image * shown.movedim(1, -1)
            extra = [keep]
        return self.apply_controlnet(
            positive, negative, control_net, image, strength, start_percent, end_percent, vae=vae, extra_concat=extra
        )


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (SetUnionControlNetType, ControlNetInpaintingAliMamaApply)}
