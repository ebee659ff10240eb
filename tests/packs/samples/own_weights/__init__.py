"""A V1 pack with a format of weights of its own, as packs for quantised files have: eight-bit rows, each with a scale.

It brings a tensor class that knows its real shape, layers that unpack weights and apply their patches when they compute,
and a patcher that hands patches to such tensors instead of patching them.
"""

import torch

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths

SCALE_BYTES = 4


class Packed(torch.Tensor):
    """uint8 [rows, columns + SCALE_BYTES]; `shape` is that of the weight. `patches`: [(patches, key)]."""

    @staticmethod
    def __new__(cls, data, *, real_shape, patches=()):
        return super().__new__(cls, data)

    def __init__(self, data, *, real_shape, patches=()):
        super().__init__()
        self.real_shape = torch.Size(real_shape)
        self.patches = list(patches)

    def to(self, *args, **kwargs):
        kwargs.pop("dtype", None)
        device = next((arg for arg in args if isinstance(arg, str | torch.device)), kwargs.pop("device", None))
        moved = self.as_subclass(torch.Tensor).to(device=device or self.device, **kwargs)
        return Packed(moved, real_shape=self.real_shape, patches=self.patches)

    def detach(self):
        return self

    @property
    def shape(self):
        return getattr(self, "real_shape", None) or self.size()


def pack(weight):
    """[rows, columns] as eight bits a number."""
    scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
    numbers = (weight.float() / scale).round().to(torch.int8).view(torch.uint8)
    return Packed(torch.cat([numbers, scale.contiguous().view(torch.uint8)], dim=1), real_shape=weight.shape)


def unpack(packed, dtype):
    """The weight, with the patches that its tensor carries."""
    data = packed.as_subclass(torch.Tensor)
    scale = data[:, -SCALE_BYTES:].contiguous().view(torch.float32)
    weight = data[:, :-SCALE_BYTES].contiguous().view(torch.int8).float() * scale
    for patches, key in packed.patches:
        weight = comfy.lora.calculate_weight(patches, weight, key)
    return weight.to(dtype)


class Layer(torch.nn.Module):
    """Takes weights from a file as they are, and computes with what they stand for."""

    comfy_cast_weights = True

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        weight = state_dict.get(f"{prefix}weight")
        if not isinstance(weight, Packed) and not isinstance(self, torch.nn.Linear):
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        for name in ("weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is not None:
                setattr(self, name, torch.nn.Parameter(value, requires_grad=False))

    def weight_and_bias(self, device, dtype):
        weight, bias = self.weight.to(device), self.bias
        weight = unpack(weight, dtype) if isinstance(weight, Packed) else comfy.ops.cast_to(weight, dtype, device)
        return weight, None if bias is None else comfy.ops.cast_to(bias, dtype, device)

    def forward_comfy_cast_weights(self, input, *args, **kwargs):
        if isinstance(self.weight, Packed):
            return self.forward_packed(input, *args, **kwargs)
        return super().forward_comfy_cast_weights(input, *args, **kwargs)


class PackedOps(comfy.ops.manual_cast):
    class Linear(Layer, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)  # no memory for weights: they come from the file
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def forward_packed(self, input):
            return torch.nn.functional.linear(input, *self.weight_and_bias(input.device, input.dtype))

    class Embedding(Layer, comfy.ops.manual_cast.Embedding):
        def forward_packed(self, input, out_dtype=None):
            weight, _ = self.weight_and_bias(input.device, out_dtype or torch.float32)
            return torch.nn.functional.embedding(input, weight)


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """Gives patches to packed weights; all others are patched as ever. `calls`: what it was asked to do."""

    calls = []

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        weight = comfy.utils.get_attr(self.model, key)
        if isinstance(weight, Packed):
            packed = weight.to(device_to or weight.device)
            packed.patches = [(self.patches[key], key)]
            comfy.utils.set_attr_param(self.model, key, packed)
        else:
            super().patch_weight_to_device(key, device_to, inplace_update)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        self.calls.append("unpatch_model")
        if unpatch_weights:
            for weight in self.model.parameters():
                if isinstance(weight, Packed):
                    weight.patches = []
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        self.calls.append("load")
        super().load(*args, force_patch_weights=True, **kwargs)

    def clone(self, *args, **kwargs):
        kind = self.__class__
        self.__class__ = PackedPatcher  # `PackedPatcher.clone` is also called with patchers that are none
        try:
            other = super().clone(*args, **kwargs)
        finally:
            self.__class__ = kind
        other.__class__ = PackedPatcher
        return other


def packed_file(path):
    """A file's tensors with all large matrices packed, as a file in this format would have them."""
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    return {key: pack(value) if value.ndim == 2 and min(value.shape) > 8 else value for key, value in weights.items()}


class SampleLoadPacked:
    CATEGORY = "samples"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (folder_paths.get_filename_list("diffusion_models"),)}}

    def load(self, name):
        weights = packed_file(folder_paths.get_full_path_or_raise("diffusion_models", name))
        model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"custom_operations": PackedOps()})
        return (PackedPatcher.clone(model),)


class SampleLoadPackedText:
    CATEGORY = "samples"
    FUNCTION = "load"
    RETURN_TYPES = ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        names = folder_paths.get_filename_list("text_encoders")
        return {"required": {"clip_name1": (names,), "clip_name2": (names,)}}

    def load(self, **names):
        parts = [packed_file(folder_paths.get_full_path_or_raise("text_encoders", name)) for name in names.values()]
        for part in parts:
            part.pop("text_projection.weight", None)  # such files have none
        options = {
            "custom_operations": PackedOps,
            "initial_device": comfy.model_management.text_encoder_offload_device(),
        }
        clip = comfy.sd.load_text_encoder_state_dicts(
            parts, clip_type=comfy.sd.CLIPType.FLUX, model_options=options,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
        )  # fmt: skip
        clip.patcher = PackedPatcher.clone(clip.patcher)
        return (clip,)


NODE_CLASS_MAPPINGS = {"SampleLoadPacked": SampleLoadPacked, "SampleLoadPackedText": SampleLoadPackedText}
