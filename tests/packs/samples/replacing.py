"""A V1 pack in one file that changes what is there already: a node of the program, and a function of `comfy`."""

import comfy.samplers
import comfy.utils
import nodes

_upscale = comfy.utils.common_upscale
_sigmas = comfy.samplers.calculate_sigmas
COUNTS = {"upscale": 0, "sigmas": 0}


class BetterEmptyImage(nodes.NODE_CLASS_MAPPINGS["EmptyImage"]):
    def generate(self, *args, **kwargs):
        (image,) = super().generate(*args, **kwargs)
        image[:, 0, 0] = 1.0  # a white corner
        return (image,)


def upscale(samples, *args, **kwargs):
    COUNTS["upscale"] += 1
    return 1 - _upscale(samples, *args, **kwargs)


def sigmas(*args, **kwargs):
    COUNTS["sigmas"] += 1
    return _sigmas(*args, **kwargs) * 0.5


class SampleCounts:
    CATEGORY = "samples"
    FUNCTION = "tell"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def tell(self, after):
        return (f"{COUNTS['upscale']} {COUNTS['sigmas']}",)


nodes.NODE_CLASS_MAPPINGS["EmptyImage"] = BetterEmptyImage
comfy.utils.common_upscale = upscale
comfy.samplers.calculate_sigmas = sigmas
NODE_CLASS_MAPPINGS = {"SampleCounts": SampleCounts}
