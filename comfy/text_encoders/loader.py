"""Text encoder files: which encoders they hold, and the `CLIP` object that a model family makes of them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch

import comfy.utils
from comfy import supported_models_base
from comfy.clip import CLIP
from comfy.text_encoders.long_clipl import model_options_long_clip
from comfy.text_encoders.openclip import from_openclip
from comfy.text_encoders.t5_family import t5_xxl_detect

StateDict = dict[str, torch.Tensor]


class CLIPType(enum.Enum):
    """The model family whose text encoders are loaded."""

    STABLE_DIFFUSION = 1
    STABLE_CASCADE = 2
    SD3 = 3
    STABLE_AUDIO = 4
    HUNYUAN_DIT = 5
    FLUX = 6
    MOCHI = 7
    LTXV = 8
    HUNYUAN_VIDEO = 9
    PIXART = 10
    COSMOS = 11
    LUMINA2 = 12
    WAN = 13
    HIDREAM = 14
    CHROMA = 15
    ACE = 16
    OMNIGEN2 = 17
    QWEN_IMAGE = 18
    HUNYUAN_IMAGE = 19


class TEModel(enum.Enum):
    """Kinds of text encoders, told by their weights."""

    CLIP_L = 1
    CLIP_H = 2
    CLIP_G = 3
    T5_XXL = 4
    T5_XL = 5
    T5_BASE = 6
    LLAMA3_8 = 7
    T5_XXL_OLD = 8
    GEMMA_2_2B = 9
    QWEN25_3B = 10
    QWEN25_7B = 11
    BYT5_SMALL_GLYPH = 12
    GEMMA_3_4B = 13
    MT5_XL = 14
    BERT = 15


def detect_te_model(sd: StateDict) -> TEModel | None:
    """The kind of one encoder's weights, or None."""
    for layer, kind in ((30, TEModel.CLIP_G), (22, TEModel.CLIP_H), (0, TEModel.CLIP_L)):
        if f"text_model.encoder.layers.{layer}.mlp.fc1.weight" in sd:
            return kind
    if "bert.embeddings.word_embeddings.weight" in sd:
        return TEModel.BERT
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in sd:
        return _detect_t5(sd)
    return _detect_language_model(sd)


def _detect_t5(sd: StateDict) -> TEModel:
    gate = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
    if gate in sd and sd[gate].shape[-1] == 2048:
        is_mt5 = "shared.weight" in sd and sd["shared.weight"].shape[0] > 200000
        return TEModel.MT5_XL if is_mt5 else TEModel.T5_XL
    if "encoder.block.23.layer.1.DenseReluDense.wi.weight" in sd:
        return TEModel.T5_XXL_OLD
    if gate not in sd and sd["encoder.block.0.layer.0.SelfAttention.k.weight"].shape[0] == 384:
        return TEModel.BYT5_SMALL_GLYPH
    if "encoder.block.0.layer.1.DenseReluDense.wi.weight" in sd:
        return TEModel.T5_BASE
    return TEModel.T5_XXL


def t5xxl_detect(clip_data: list[StateDict]) -> dict[str, Any]:
    """What `flux_clip` and `sd3_clip` want to know of the T5-XXL among some encoders' weights; {} without one."""
    last = "encoder.block.23.layer.1.DenseReluDense."
    for sd in clip_data:
        if f"{last}wi_1.weight" in sd or f"{last}wi.weight" in sd:
            return t5_xxl_detect(sd)
    return {}


def _detect_language_model(sd: StateDict) -> TEModel | None:
    first = "model.layers.0."
    if first + "post_feedforward_layernorm.weight" in sd:
        return TEModel.GEMMA_3_4B if first + "self_attn.q_norm.weight" in sd else TEModel.GEMMA_2_2B
    bias = sd.get(first + "self_attn.k_proj.bias")
    if bias is not None:
        return {256: TEModel.QWEN25_3B, 512: TEModel.QWEN25_7B}.get(bias.shape[0])
    if first + "post_attention_layernorm.weight" in sd:
        return TEModel.LLAMA3_8
    return None


def _normalise(sd: StateDict) -> StateDict:
    """Keys relative to the encoder's network, whatever wrapped it when it was saved."""
    for prefix in ("transformer.", "text_encoder.", "text_encoders."):
        if sd and all(key.startswith(prefix) for key in sd):
            sd = {key.removeprefix(prefix): value for key, value in sd.items()}
    if "transformer.resblocks.0.ln_1.weight" in sd:
        return from_openclip(sd)
    sd = comfy.utils.state_dict_prefix_replace(sd, {"encoder.embed_tokens.": "shared."})
    if "text_model.encoder.layers.0.mlp.fc1.weight" in sd and "text_projection" in sd:
        # OpenCLIP stores the transpose.
        sd["text_projection.weight"] = sd.pop("text_projection").transpose(0, 1)
    return sd


def _target(clip_type: CLIPType, kinds: dict[TEModel, StateDict]) -> tuple[Any, Any]:
    """(tokenizer class, encoder class) of a family for the encoders that are there."""
    t5 = next((sd for kind, sd in kinds.items() if kind in (TEModel.T5_XXL, TEModel.T5_XXL_OLD)), None)
    if set(kinds) == {TEModel.BERT, TEModel.MT5_XL}:
        from comfy.text_encoders import hydit

        return hydit.HyditTokenizer, hydit.HyditModel
    if clip_type in (CLIPType.FLUX,):
        return _flux(kinds, t5)
    if clip_type == CLIPType.SD3 or (len(kinds) > 1 and t5 is not None and TEModel.CLIP_G in kinds):
        return _sd3(kinds, t5)
    if len(kinds) == 2 and {TEModel.CLIP_L, TEModel.CLIP_G} == set(kinds):
        from comfy import sdxl_clip

        return sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel
    if set(kinds) == {TEModel.CLIP_L, TEModel.LLAMA3_8}:
        from comfy.text_encoders import hunyuan_video

        return hunyuan_video.HunyuanVideoTokenizer, hunyuan_video.HunyuanVideoClipModel
    if set(kinds) == {TEModel.QWEN25_7B, TEModel.BYT5_SMALL_GLYPH}:
        from comfy.text_encoders import hunyuan_image

        return hunyuan_image.HunyuanImageTokenizer, hunyuan_image.te(byt5=True)
    if len(kinds) > 1:
        names = " and ".join(kind.name for kind in kinds)
        raise ValueError(f"no text encoder of type {clip_type.name} is made of {names}; check the files and the type")
    return _single(clip_type, next(iter(kinds)))


def _flux(kinds: dict[TEModel, StateDict], t5: StateDict | None) -> tuple[Any, Any]:
    from comfy.text_encoders import flux

    lacking = [name for name, there in (("CLIP-L", TEModel.CLIP_L in kinds), ("T5-XXL", t5 is not None)) if not there]
    if lacking:
        raise ValueError(
            f"Flux needs CLIP-L and T5-XXL, the files have no {' and no '.join(lacking)}; choose clip_l and t5xxl files"
        )
    assert t5 is not None
    return flux.FluxTokenizer, flux.flux_clip(**flux.t5_xxl_detect(t5))


def _sd3(kinds: dict[TEModel, StateDict], t5: StateDict | None) -> tuple[Any, Any]:
    from comfy.text_encoders import sd3_clip

    found = sd3_clip.t5_xxl_detect(t5) if t5 is not None else {}
    model = sd3_clip.sd3_clip(
        clip_l=TEModel.CLIP_L in kinds, clip_g=TEModel.CLIP_G in kinds, t5=t5 is not None, **found
    )
    return sd3_clip.SD3Tokenizer, model


def _single(clip_type: CLIPType, kind: TEModel) -> tuple[Any, Any]:
    """The classes for a family with one encoder."""
    from comfy import sd1_clip, sdxl_clip
    from comfy.text_encoders import aura_t5, lumina2, sd2_clip
    from comfy.text_encoders import t5_family as t5

    by_family: dict[CLIPType, tuple[TEModel, tuple[Any, Any]]] = {
        CLIPType.PIXART: (TEModel.T5_XXL, (t5.PixArtTokenizer, t5.PixArtT5XXL)),
        CLIPType.CHROMA: (TEModel.T5_XXL, (t5.PixArtTokenizer, t5.PixArtT5XXL)),
        CLIPType.MOCHI: (TEModel.T5_XXL, (t5.MochiT5Tokenizer, t5.MochiT5XXL)),
        CLIPType.LTXV: (TEModel.T5_XXL, (t5.LTXVT5Tokenizer, t5.LTXVT5XXL)),
        CLIPType.WAN: (TEModel.T5_XXL, (t5.WanT5Tokenizer, t5.WanT5Model)),
        CLIPType.COSMOS: (TEModel.T5_XXL_OLD, (t5.CosmosT5Tokenizer, t5.CosmosT5XXL)),
        CLIPType.STABLE_CASCADE: (
            TEModel.CLIP_G, (sdxl_clip.StableCascadeTokenizer, sdxl_clip.StableCascadeClipModel)
        ),
    }  # fmt: skip
    by_kind: dict[TEModel, Callable[[], tuple[Any, Any]]] = {
        TEModel.CLIP_L: lambda: (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
        TEModel.CLIP_H: lambda: (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
        TEModel.CLIP_G: lambda: (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLRefinerClipModel),
        TEModel.T5_XXL: lambda: (t5.MochiT5Tokenizer, t5.MochiT5XXL),
        TEModel.T5_XXL_OLD: lambda: (t5.CosmosT5Tokenizer, t5.CosmosT5XXL),
        TEModel.T5_XL: lambda: (aura_t5.AuraT5Tokenizer, aura_t5.AuraT5Model),
        TEModel.T5_BASE: lambda: (t5.SAT5Tokenizer, t5.SAT5Model),
        TEModel.GEMMA_2_2B: lambda: (lumina2.LuminaTokenizer, lumina2.LuminaModel),
    }
    if kind == TEModel.QWEN25_7B:
        from comfy.text_encoders import hunyuan_image, qwen_image

        if clip_type == CLIPType.HUNYUAN_IMAGE:
            return hunyuan_image.HunyuanImageTokenizer, hunyuan_image.te(byt5=False)
        return qwen_image.QwenImageTokenizer, qwen_image.QwenImageTEModel
    wanted = by_family.get(clip_type)
    if wanted is not None and wanted[0] == kind:
        return wanted[1]
    if kind in by_kind:
        return by_kind[kind]()
    known = ", ".join(sorted(k.name for k in by_kind))
    raise ValueError(f"text encoders of kind {kind.name} (type {clip_type.name}) are not supported yet; known: {known}")


def load_text_encoder_state_dicts(
    state_dicts: list[StateDict] | None = None,
    embedding_directory: Any = None,
    clip_type: CLIPType = CLIPType.STABLE_DIFFUSION,
    model_options: dict[str, Any] | None = None,
) -> CLIP:
    """The `CLIP` object of a family from the weights of its encoders, one state dict each.

    Raises ValueError when weights belong to no known encoder, or do not make up the family.
    """
    parts = [_normalise(dict(sd)) for sd in state_dicts or ()]
    if not parts:
        raise ValueError("no text encoder files given")
    kinds: dict[TEModel, StateDict] = {}
    for i, sd in enumerate(parts):
        kind = detect_te_model(sd)
        if kind is None:
            some = ", ".join(list(sd)[:3])
            raise ValueError(f"text encoder file {i + 1} holds no encoder this version knows (keys: {some}, ...)")
        if kind in kinds:
            raise ValueError(f"two of the text encoder files are {kind.name}; choose different files")
        kinds[kind] = sd
    tokenizer, model = _target(clip_type, kinds)
    target = supported_models_base.ClipTarget(tokenizer, model)
    tokenizer_data: dict[str, Any] = {
        key: sd[key] for sd in parts for key in ("spiece_model", "tekken_model") if key in sd
    }
    for sd in parts:
        tokenizer_data, _ = model_options_long_clip(sd, tokenizer_data, {})
    clip = CLIP(
        target,
        embedding_directory=embedding_directory,
        tokenizer_data=tokenizer_data,
        parameters=sum(comfy.utils.calculate_parameters(sd) for sd in parts),
        model_options=model_options,
        state_dict=parts,
    )
    for sd in parts:
        clip.load_sd(sd)
    return clip


def load_clip(
    ckpt_paths: list[str],
    embedding_directory: Any = None,
    clip_type: CLIPType = CLIPType.STABLE_DIFFUSION,
    model_options: dict[str, Any] | None = None,
) -> CLIP:
    """`load_text_encoder_state_dicts` for files."""
    state_dicts = [comfy.utils.load_torch_file(path, safe_load=True) for path in ckpt_paths]
    return load_text_encoder_state_dicts(state_dicts, embedding_directory, clip_type, model_options)
