"""Tiny random adapters in the real file layouts: image encoders, style models, patch networks, ControlNets.

    python -m tests.tiny_models --family adapters --out models/

writes clip_vision/, style_models/, model_patches/ and controlnet/ for the tiny Flux models of `tests.tiny_models`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.tiny_models import (
    CLIP_WIDTH,
    HIDDEN,
    T5_WIDTH,
    Shapes,
    StateDict,
    _linear,
    flux_shapes,
    random_weights,
    renamed,
    to_diffusers,
)  # fmt: skip

VISION_WIDTH = 32


def vision_shapes(
    layers: int, grid: int, patch: int, width: int = VISION_WIDTH, siglip: bool = False, llava: int | None = None
) -> Shapes:
    """Keys and shapes of an image encoder for pictures of `grid` x `grid` patches, with transformers' names."""
    embeddings = "vision_model.embeddings"
    out: Shapes = {
        f"{embeddings}.patch_embedding.weight": (width, 3, patch, patch),
        f"{embeddings}.position_embedding.weight": (grid * grid + (0 if siglip else 1), width),
    }
    norms = ["vision_model.post_layernorm"]
    if siglip:
        out[f"{embeddings}.patch_embedding.bias"] = (width,)
    else:
        out[f"{embeddings}.class_embedding"] = (width,)
        norms.append("vision_model.pre_layrnorm")
        out["visual_projection.weight"] = (CLIP_WIDTH, width)
    for i in range(layers):
        layer = f"vision_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _linear(out, f"{layer}.self_attn.{name}", width, width)
        _linear(out, f"{layer}.mlp.fc1", 2 * width, width)
        _linear(out, f"{layer}.mlp.fc2", width, 2 * width)
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
    for norm in norms:
        out[f"{norm}.weight"] = out[f"{norm}.bias"] = (width,)
    if llava is not None:
        _linear(out, "multi_modal_projector.linear_1", llava, width)
        _linear(out, "multi_modal_projector.linear_2", llava, llava)
    return out


def vision_l() -> StateDict:
    """Like CLIP ViT-L/14, 224 pixels: 24 layers."""
    return random_weights(vision_shapes(24, 4, 8), 31)


def vision_llava() -> StateDict:
    """Like LLaVA's CLIP ViT-L/14, with the projector."""
    return random_weights(vision_shapes(24, 3, 8, llava=48), 32)


def vision_h() -> StateDict:
    """Like OpenCLIP ViT-H/14: 32 layers."""
    return random_weights(vision_shapes(32, 3, 8), 33)


def vision_g() -> StateDict:
    """Like OpenCLIP ViT-bigG/14: 48 layers."""
    return random_weights(vision_shapes(48, 2, 8), 34)


def vision_siglip() -> StateDict:
    """Like SigLIP so400m: 27 layers, no class token."""
    return random_weights(vision_shapes(27, 4, 8, siglip=True), 35)


def to_open_clip(sd: StateDict, prefix: str = "visual.") -> StateDict:
    """A CLIP vision tower under OpenCLIP's names."""
    names = {
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
    }
    out: StateDict = {}
    for old, new in names.items():
        out[prefix + new] = sd[old]
    for kind in ("weight", "bias"):
        out[f"{prefix}ln_pre.{kind}"] = sd[f"vision_model.pre_layrnorm.{kind}"]
        out[f"{prefix}ln_post.{kind}"] = sd[f"vision_model.post_layernorm.{kind}"]
    out[f"{prefix}proj"] = sd["visual_projection.weight"].T.contiguous()
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    layers = {key.split(".")[3] for key in sd if key.startswith("vision_model.encoder.layers.")}
    for i in layers:
        old, new = f"vision_model.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            for a, b in parts.items():
                out[f"{new}.{b}.{kind}"] = sd[f"{old}.{a}.{kind}"]
            fused = [sd[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{new}.attn.in_proj_{kind}"] = torch.cat(fused)
    return out


def redux() -> StateDict:
    """Flux Redux for the tiny SigLIP and the tiny T5's width."""
    out: Shapes = {}
    _linear(out, "redux_up", 3 * T5_WIDTH, VISION_WIDTH)
    _linear(out, "redux_down", T5_WIDTH, 3 * T5_WIDTH)
    return random_weights(out, 41)


def t2i_style(width: int = VISION_WIDTH, tokens: int = 8, context: int = T5_WIDTH) -> StateDict:
    """T2I-Adapter's style adapter, with OpenAI CLIP's names of layers."""
    out: Shapes = {"style_embedding": (1, tokens, width), "proj": (width, context)}
    norms = ["ln_pre", "ln_post"]
    for i in range(3):
        layer = f"transformer_layes.{i}"
        out[f"{layer}.attn.in_proj_weight"], out[f"{layer}.attn.in_proj_bias"] = (3 * width, width), (3 * width,)
        _linear(out, f"{layer}.attn.out_proj", width, width)
        _linear(out, f"{layer}.mlp.c_fc", 4 * width, width)
        _linear(out, f"{layer}.mlp.c_proj", width, 4 * width)
        norms += [f"{layer}.ln_1", f"{layer}.ln_2"]
    for norm in norms:
        out[f"{norm}.weight"] = out[f"{norm}.bias"] = (width,)
    return random_weights(out, 42)


def uso(tokens: int = 16, styles: int = 5) -> StateDict:
    """USO's style projector for the tiny SigLIP (16 tokens) and the tiny Flux."""
    out: Shapes = {}
    for depth in ("high", "mid", "low"):
        name = f"feature_embedder.{depth}"
        _linear(out, f"{name}_embedding_linear.0", styles, tokens)
        out[f"{name}_layer_norm.weight"] = out[f"{name}_layer_norm.bias"] = (VISION_WIDTH,)
        _linear(out, f"{name}_projection", HIDDEN, VISION_WIDTH)
    return random_weights(out, 43)


def _control_blocks(depth: int, single: int, hint_channels: int, hidden: int = HIDDEN) -> Shapes:
    """A Flux network's first blocks and the projections of a ControlNet, under Black Forest Labs' names."""
    out = {key: shape for key, shape in flux_shapes(depth=depth, single=single).items() if "final_layer" not in key}
    _linear(out, "pos_embed_input", hidden, 4 * hint_channels)
    for i in range(depth):
        _linear(out, f"controlnet_blocks.{i}", hidden, hidden)
    for i in range(single):
        _linear(out, f"controlnet_single_blocks.{i}", hidden, hidden)
    return out


def _convolution(out: Shapes, name: str, inner: int, kernel: int) -> None:
    out[f"{name}.weight"], out[f"{name}.bias"] = (16, inner, kernel, kernel), (16,)


def control_xlabs() -> StateDict:
    """XLabs' layout: double blocks only, a picture as hint."""
    out = _control_blocks(2, 0, 16)
    for i in range(8):
        _convolution(out, f"input_hint_block.{2 * i}", 16 if i else 3, 3)
    return random_weights(out, 51)


def control_mistoline() -> StateDict:
    """MistoLine's layout: other convolutions, linears with an activation, another name of the single projections."""
    out = _control_blocks(2, 1, 16)
    for i, kernel in enumerate((3, 1, 3, 3, 3, 3, 3, 3, 1, 3)):
        _convolution(out, f"input_cond_block.encoder.{2 * i}", 16 if i else 3, kernel)
    renamed = {}
    for key, value in random_weights(out, 52).items():
        stem, _, kind = key.rpartition(".")
        if stem.startswith("controlnet"):
            key = f"{stem.replace('controlnet_single_blocks', 'single_controlnet_blocks')}.linear.{kind}"
        renamed[key] = value
    return renamed


def _control_diffusers(seed: int, depth: int, single: int, channels: int = 16, modes: int = 0) -> StateDict:
    sd = random_weights(_control_blocks(depth, single, channels), seed)
    out = to_diffusers(sd)
    out |= {key: value for key, value in sd.items() if key.startswith("controlnet_")}
    if modes:
        out |= random_weights({"controlnet_mode_embedder.weight": (modes, HIDDEN)}, seed)
    return out


def control_instantx() -> StateDict:
    """InstantX's layout (diffusers' names), a latent as hint."""
    return _control_diffusers(53, 2, 2)


def control_union() -> StateDict:
    """As InstantX's union network: the kind of hint is chosen."""
    return _control_diffusers(54, 2, 1, modes=4)


def control_inpaint() -> StateDict:
    """As Alimama's for inpainting: latent and mask as hint, no single blocks (nor has Shakker Labs' union pro 2)."""
    return _control_diffusers(55, 2, 0, channels=17)


SD3_DEPTH = 4


def _shapes_of(network: torch.nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def control_sd3(blocks: int = 2, channels: int = 16) -> StateDict:
    """For an SD3 of four blocks, in diffusers' layout."""
    import comfy.ops
    from comfy.cldm.mmdit import ControlNet
    from comfy.families import sd3

    text = {"params": {"in_features": T5_WIDTH, "out_features": 64 * SD3_DEPTH}}
    network = ControlNet(
        num_blocks=blocks, depth=SD3_DEPTH, control_latent_channels=channels, num_patches=64, pos_embed_max_size=8,
        adm_in_channels=48, context_embedder_config=text, device="meta", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    sd = random_weights(_shapes_of(network), 61)
    out = renamed(sd, sd3.diffusers_targets(SD3_DEPTH, blocks))
    return out | {key: value for key, value in sd.items() if key.startswith(("controlnet_blocks", "pos_embed_input"))}


def control_sd35(double: bool, kind: int = 2, depth: int = SD3_DEPTH, pooled: int = 48) -> StateDict:
    """Stability AI's for an SD3.5 of `depth` blocks, as for its large (`double`) and medium model."""
    import comfy.ops
    from comfy.cldm.dit_embedder import ControlNetEmbedder

    network = ControlNetEmbedder(
        depth, 2, double, adm_in_channels=pooled, device="meta", operations=comfy.ops.disable_weight_init
    )
    sd = random_weights(_shapes_of(network), 62)
    names = {"y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1"}
    out = {}
    for key, value in sd.items():
        stem, _, last = key.rpartition(".")
        if not key.startswith(f"{network.borrows[0]}."):
            out[f"{names.get(stem, stem)}.{last}"] = value
    return out | {"control_type": torch.tensor([float(kind)])}


def control_hunyuan(old: bool = False) -> StateDict:
    """For a HunyuanDiT of which this is the first half: two blocks."""
    import comfy.ops
    from comfy.ldm.hydit.controlnet import HunYuanControlNet

    network = HunYuanControlNet(
        hidden_size=48, depth=2, num_heads=3, mlp_ratio=2.5, text_states_dim=40, text_states_dim_t5=24, text_len_t5=16,
        size_cond=old, use_style_cond=old, device="meta", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    return random_weights(_shapes_of(network), 63)


FILES: dict[str, Callable[[], StateDict]] = {
    "clip_vision/tiny_clip_vision_l.safetensors": vision_l,
    "clip_vision/tiny_clip_vision_h.safetensors": lambda: to_open_clip(vision_h()),
    "clip_vision/tiny_sigclip.safetensors": vision_siglip,
    "style_models/tiny_redux.safetensors": redux,
    "style_models/tiny_t2i_style.safetensors": t2i_style,
    "model_patches/tiny_uso.safetensors": uso,
    "controlnet/tiny_flux_xlabs.safetensors": control_xlabs,
    "controlnet/tiny_flux_mistoline.safetensors": control_mistoline,
    "controlnet/tiny_flux_instantx.safetensors": control_instantx,
    "controlnet/tiny_flux_union.safetensors": control_union,
    "controlnet/tiny_flux_inpaint.safetensors": control_inpaint,
}
