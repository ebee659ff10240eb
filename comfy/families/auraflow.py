"""AuraFlow 0.1 to 0.3 (fal, 2024), and Pony V7, which has its layout."""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
from comfy import supported_models_base
from comfy.families import key_maps
from comfy.families.base import Family, Sizes, Split, StateDict
from comfy.model_detection import count_blocks

HEAD = 256  # channels of a head in every published model


class AuraFlowModel(comfy.model_base.BaseModel):
    """AuraFlow: text."""

    def __init__(
        self,
        model_config: Any,
        model_type: Any = comfy.model_base.ModelType.FLOW,
        device: Any = None,
        unet_model: Any = None,
    ) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=unet_model or FAMILY.network_class())

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        cross = kwargs.get("cross_attn")
        if cross is not None:
            out["c_crossattn"] = comfy.conds.CONDRegular(cross)
        return out


class AuraFlow(supported_models_base.BASE):
    """AuraFlow."""

    unet_config = {"cond_seq_dim": 2048}
    sampling_settings = {"multiplier": 1.0, "shift": 1.73}
    latent_format = comfy.latent_formats.SDXL
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def model_type(self, state_dict: StateDict, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLOW

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        self.unet_config |= _sizes_of_file(state_dict, prefix)
        return AuraFlowModel(self, model_type=self.model_type(state_dict, prefix), device=device)

    def clip_target(self, state_dict: StateDict | None = None) -> supported_models_base.ClipTarget:
        from comfy.text_encoders.aura_t5 import AuraT5Model, AuraT5Tokenizer

        return supported_models_base.ClipTarget(AuraT5Tokenizer, AuraT5Model)


def _sizes_of_file(sd: StateDict, prefix: str) -> dict[str, int]:
    """Sizes that a file has and that recognition takes for granted."""
    patches, time = sd.get(f"{prefix}init_x_linear.weight"), sd.get(f"{prefix}t_embedder.mlp.2.weight")
    last = sd.get(f"{prefix}final_linear.weight")
    if patches is None or time is None or last is None:
        return {}
    dim = patches.shape[0]
    if dim % HEAD:
        raise ValueError(f"AuraFlow's width must be a multiple of {HEAD} channels (one head), the file has {dim}")
    sizes = {"dim": dim, "n_heads": dim // HEAD, "global_conddim": time.shape[0]}
    return {**sizes, "in_channels": patches.shape[1] // 4, "out_channels": last.shape[0] // 4}


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    if f"{prefix}double_layers.0.attn.w1q.weight" not in sd:
        return None
    double = count_blocks(sd, prefix + "double_layers.{}.")
    return {
        "max_seq": sd[f"{prefix}positional_encoding"].shape[1],
        "cond_seq_dim": sd[f"{prefix}cond_seq_linear.weight"].shape[1],
        "n_double_layers": double,
        "n_layers": double + count_blocks(sd, prefix + "single_layers.{}."),
    }


_TOP = {
    "context_embedder": "cond_seq_linear",
    "pos_embed.proj": "init_x_linear",
    "proj_out": "final_linear",
    "time_step_proj.linear_1": "t_embedder.mlp.0",
    "time_step_proj.linear_2": "t_embedder.mlp.2",
}
_MLP = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}
_DOUBLE = {
    **{f"attn.add_{name}_proj": f"attn.w1{name}" for name in "qkv"},
    **{f"attn.to_{name}": f"attn.w2{name}" for name in "qkv"},
    "attn.to_add_out": "attn.w1o",
    "attn.to_out.0": "attn.w2o",
    "norm1.linear": "modX.1",
    "norm1_context.linear": "modC.1",
    **{f"ff.{a}": f"mlpX.{b}" for a, b in _MLP.items()},
    **{f"ff_context.{a}": f"mlpC.{b}" for a, b in _MLP.items()},
}
_SINGLE = {
    **{f"attn.to_{name}": f"attn.w1{name}" for name in "qkv"},
    "attn.to_out.0": "attn.w1o",
    "norm1.linear": "modCX.1",
    **{f"ff.{a}": f"mlp.{b}" for a, b in _MLP.items()},
}


def diffusers_targets(n_double_layers: int, n_layers: int) -> key_maps.Targets:
    """Diffusers' names of all weights of a network."""
    out = key_maps.linears(_TOP)
    out |= {"pos_embed.pos_embed": "positional_encoding", "register_tokens": "register_tokens"}
    out |= key_maps.changed("norm_out.linear", "modF.1", key_maps.scale_before_shift)
    for i in range(n_double_layers):
        out |= key_maps.linears(_DOUBLE, f"joint_transformer_blocks.{i}.", f"double_layers.{i}.", ("weight",))
    for i in range(n_layers - n_double_layers):
        out |= key_maps.linears(_SINGLE, f"single_transformer_blocks.{i}.", f"single_layers.{i}.", ("weight",))
    return out


def from_diffusers(state_dict: StateDict) -> StateDict | None:
    """A transformer of this family with diffusers' keys under ours, or None."""
    if "joint_transformer_blocks.0.attn.add_k_proj.weight" not in state_dict:
        return None
    double = count_blocks(state_dict, "joint_transformer_blocks.{}.")
    single = count_blocks(state_dict, "single_transformer_blocks.{}.")
    return key_maps.assembled(state_dict, diffusers_targets(double, double + single))


def _lora_keys(network: Any) -> dict[str, Any]:
    double = len(network.double_layers)
    targets = diffusers_targets(double, double + len(network.single_layers))
    return key_maps.adapter_keys(key_maps.with_prefix(targets, "diffusion_model."), ("transformer.",))


def _sizes(network: Any) -> Sizes:
    blocks = (*network.double_layers, *network.single_layers)
    mlp = next(b.mlpX if hasattr(b, "mlpX") else b.mlp for b in blocks).c_fc1.out_features
    return {"heads": (network.hidden_size, network.hidden_size // network.num_heads), "mlp": (mlp, 1)}


def _splits() -> dict[str, Split]:
    out = {"*_layers.*.mod*.1": Split("gathered")}
    double, single = "double_layers.*", "single_layers.*"
    kinds = ((double, "w1", "mlpC", ("txt",)), (double, "w2", "mlpX", ("img",)), (single, "w1", "mlp", None))
    for block, weights, mlp, tokens in kinds:
        out |= {f"{block}.attn.{weights}{name}": Split("column", ("heads",), tokens) for name in "qkv"}
        out[f"{block}.attn.{weights}o"] = Split("row", ("heads",), tokens)
        out |= {f"{block}.{mlp}.{name}": Split("column", ("mlp",), tokens) for name in ("c_fc1", "c_fc2")}
        out[f"{block}.{mlp}.c_proj"] = Split("row", ("mlp",), tokens)
    return out


FAMILY = Family(
    name="auraflow",
    network="comfy.ldm.aura.mmdit:MMDiT",
    detect=detect,
    configurations={"AuraFlow": AuraFlow},
    models={"AuraFlow": AuraFlowModel},
    from_diffusers=from_diffusers,
    lora_keys=_lora_keys,
    splits=_splits(),
    sizes=_sizes,
    sizes_from_tensors=True,
    full_precision=("*_layers.*.mod*.1",),
)
