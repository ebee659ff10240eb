"""A V1 pack that changes a loaded model by object patches and by replaced methods of its patcher."""

import types

import torch


class Half(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * 0.5


def _double_bias(self, device_to=None, *args, **kwargs):
    network = type(self).patch_model(self, device_to, *args, **kwargs)
    network.diffusion_model.img_in.sample_scale = 2.0
    return network


def _forget(self, device_to=None, unpatch_weights=True):
    if hasattr(self.model.diffusion_model.img_in, "sample_scale"):
        del self.model.diffusion_model.img_in.sample_scale
    return type(self).unpatch_model(self, device_to, unpatch_weights)


class SamplePatch:
    """`object` replaces a module of the network, `methods` two methods of the patcher; the latter are told by a mark."""

    CATEGORY = "samples"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "how": (["object", "methods"],)}}

    def patch(self, model, how):
        model = model.clone()
        if how == "object":
            layer = model.get_model_object("diffusion_model.final_layer")
            model.add_object_patch("diffusion_model.final_layer", Half(layer))
        else:
            model.patch_model = types.MethodType(_double_bias, model)
            model.unpatch_model = types.MethodType(_forget, model)
        return (model,)


class SampleMarks:
    """Whether the network carries the mark, once something was sampled with it."""

    CATEGORY = "samples"
    FUNCTION = "tell"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "after": ("LATENT",)}}

    def tell(self, model, after):
        return (str(hasattr(model.model.diffusion_model.img_in, "sample_scale")),)


NODE_CLASS_MAPPINGS = {"SamplePatch": SamplePatch, "SampleMarks": SampleMarks}
