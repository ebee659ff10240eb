"""Tiny random text encoders with vocabularies of their own, video VAEs and an upscaler, in the real file layouts.

    python -m tests.tiny_models --family parts --out models/

writes text_encoders/ (umT5, Qwen2.5-VL, Gemma 2, LLaVA's Llama 3, vocabularies that are not part of the program) vae/
(Wan 2.1 and 2.2, HunyuanVideo) and upscale_models/. Their widths are those of `tests.tiny_families`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence

import torch

from tests.tiny_models import T5_WIDTH, Shapes, StateDict, random_weights, t5_shapes

LANGUAGE_WIDTH = 40
UNIGRAM = 1


# --- sentence pieces (the fields of sentencepiece_model.proto) ------------------------------------------------------


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: float | int | bytes) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def sentence_pieces(kind: int = UNIGRAM, pieces: Sequence[tuple[str, float]] = ()) -> bytes:
    """A sentence-piece model with pad, end, unknown and the given (text, score) pieces."""
    table = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), *[(text, score, 1) for text, score in pieces]]
    body = b"".join(
        _field(1, _field(1, text.encode()) + _field(2, score) + _field(3, kind_)) for text, score, kind_ in table
    )
    return body + _field(2, _field(3, kind)) + _field(3, _field(3, 1) + _field(4, 1))


def letters() -> torch.Tensor:
    """A sentence-piece model of single ASCII characters, as files of weights carry it: uint8."""
    pieces = [("\u2581", -2.0), *((chr(code), -3.0) for code in range(33, 127))]
    return torch.frombuffer(bytearray(sentence_pieces(UNIGRAM, pieces)), dtype=torch.uint8)


# --- byte pairs ------------------------------------------------------------------------------------------------------


def byte_characters() -> list[str]:
    """The characters that stand for bytes in byte-level vocabularies, in the order of their ids (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, plain), *(chr(256 + i) for i in range(256 - len(plain)))]


def byte_pairs(words: dict[str, int], special: dict[str, int]) -> str:
    """`tokenizer.json` of a byte-level vocabulary: bytes, and words (of byte characters) and special tokens with ids."""
    vocabulary = {character: i for i, character in enumerate(byte_characters())}
    merges, free = [], 300
    for word, number in words.items():
        whole = word[0]
        for letter in word[1:]:
            merges.append([whole, letter])
            whole += letter
            if whole not in vocabulary:
                vocabulary[whole], free = free, free + 1
        vocabulary[word] = number
    settings = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": number, "content": text, **flags} for text, number in special.items()],
            "pre_tokenizer": {"type": "ByteLevel", **settings},
            "decoder": {"type": "ByteLevel", **settings},
            "model": {"type": "BPE", "vocab": {**vocabulary, **special}, "merges": merges},
        }
    )


VOCABULARIES: dict[str, Callable[[], str]] = {
    "text_encoders/qwen25/tokenizer.json": lambda: byte_pairs(
        {"user": 872},
        {
            "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
            "<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655,
        },
    ),
    "text_encoders/llama3/tokenizer.json": lambda: byte_pairs(
        {"user": 882, "\u010a\u010a": 271},
        {
            "<|begin_of_text|>": 128000, "<|start_header_id|>": 128006, "<|end_header_id|>": 128007,
            "<|eot_id|>": 128009,
        },
    ),
}  # fmt: skip


# --- encoders --------------------------------------------------------------------------------------------------------


def umt5() -> StateDict:
    """umT5-XXL: told by its vocabulary of more than 200,000 pieces, tables of positions in every block."""
    shapes = t5_shapes(T5_WIDTH)
    table = "SelfAttention.relative_attention_bias.weight"
    shapes[f"encoder.block.1.layer.0.{table}"] = shapes[f"encoder.block.0.layer.0.{table}"]
    shapes["shared.weight"] = (200192, T5_WIDTH)
    return {**random_weights(shapes, 71, torch.float16), "spiece_model": letters()}


def language_model(
    vocabulary: int, heads: int, kv_heads: int, head_dim: int, layers: int, bias: bool = False, gemma: bool = False,
    seed: int = 72, width: int = LANGUAGE_WIDTH,
) -> StateDict:  # fmt: skip
    """A causal language model with transformers' names."""
    out: Shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if gemma else []
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            out[f"{layer}.self_attn.{name}_proj.weight"] = (rows * head_dim, width)
            if bias:
                out[f"{layer}.self_attn.{name}_proj.bias"] = (rows * head_dim,)
        out[f"{layer}.self_attn.o_proj.weight"] = (width, heads * head_dim)
        out[f"{layer}.mlp.gate_proj.weight"] = out[f"{layer}.mlp.up_proj.weight"] = (2 * width, width)
        out[f"{layer}.mlp.down_proj.weight"] = (width, 2 * width)
        for name in norms:
            out[f"{layer}.{name}.weight"] = (width,)
    return random_weights(out, seed, torch.float16)


def _qwen_tower(width: int, layers: int, inner: int) -> Shapes:
    """Keys and shapes of Qwen2.5-VL's vision tower; the eighth layer attends to the whole picture."""
    out: Shapes = {"visual.patch_embed.proj.weight": (width, 3, 2, 14, 14), "visual.merger.ln_q.weight": (width,)}
    linears = {"merger.mlp.0": (4 * width, 4 * width), "merger.mlp.2": (LANGUAGE_WIDTH, 4 * width)}
    for i in range(layers):
        block = f"blocks.{i}"
        linears |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        linears |= {f"{block}.mlp.gate_proj": (inner, width), f"{block}.mlp.up_proj": (inner, width)}
        linears |= {f"{block}.mlp.down_proj": (width, inner)}
        out[f"visual.{block}.norm1.weight"] = out[f"visual.{block}.norm2.weight"] = (width,)
    for name, shape in linears.items():
        out[f"visual.{name}.weight"], out[f"visual.{name}.bias"] = shape, shape[:1]
    return out


def qwen25() -> StateDict:
    """Qwen2.5-VL 7B: told by its four key heads of 128; its tower has heads of 80."""
    tower = random_weights(_qwen_tower(80, 8, 40), 73, torch.float16)
    return {**language_model(152064, 4, 4, 128, 2, bias=True), **tower}


def llama3() -> StateDict:
    """LLaVA's Llama 3; three layers, of which the first is used."""
    return language_model(128320, 2, 1, 128, 4)


def gemma2() -> StateDict:
    """Gemma 2 2B with its vocabulary."""
    return {**language_model(256000, 2, 1, 256, 3, gemma=True), "spiece_model": letters()}


# --- video VAEs ------------------------------------------------------------------------------------------------------


def _weights_of(make: Callable[[], torch.nn.Module], seed: int) -> StateDict:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in make().state_dict().items()}
    return random_weights(shapes, seed)


def vae_wan21(channels: int = 3) -> StateDict:
    """Wan 2.1's, which Qwen-Image has too."""
    from comfy.ldm.wan.vae import WanVAE

    return _weights_of(lambda: WanVAE(dim=8, z_dim=16, image_channels=channels, conv_out_channels=channels), 81)


def vae_wan22() -> StateDict:
    """Wan 2.2's, of the 5B model."""
    from comfy.ldm.wan.vae import WanVAE

    return _weights_of(lambda: WanVAE(dim=8, decoder_dim=8, z_dim=48, residual=True), 82)


def vae_hunyuan_video() -> StateDict:
    """HunyuanVideo's."""
    from comfy.ldm.hunyuan_video.vae import HunyuanVideoVAE

    config = {
        "ch": 32, "in_channels": 3, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 16, "out_ch": 3,
        "time_compress": 4,
    }  # fmt: skip
    return _weights_of(lambda: HunyuanVideoVAE(config, 16), 83)


def upscaler(scale: int = 2, features: int = 8, seed: int = 0) -> StateDict:
    """A compact upscaler (SRVGGNet), which spandrel knows."""
    generator = torch.Generator().manual_seed(seed)

    def conv(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, 3, 3, generator=generator) * 0.05

    layers = {"body.0.weight": conv(features, 3), "body.0.bias": torch.zeros(features)}
    for number in range(1, 4, 2):
        layers[f"body.{number}.weight"] = torch.full((features,), 0.1)
        rows = features if number < 3 else 3 * scale**2
        layers[f"body.{number + 1}.weight"], layers[f"body.{number + 1}.bias"] = conv(rows, features), torch.zeros(rows)
    return layers


FILES: dict[str, Callable[[], StateDict]] = {
    "text_encoders/tiny_umt5.safetensors": umt5,
    "text_encoders/tiny_qwen25.safetensors": qwen25,
    "text_encoders/tiny_llama3.safetensors": llama3,
    "text_encoders/tiny_gemma2.safetensors": gemma2,
    "vae/tiny_wan21.safetensors": vae_wan21,
    "vae/tiny_wan22.safetensors": vae_wan22,
    "vae/tiny_hunyuan_video.safetensors": vae_hunyuan_video,
    "upscale_models/tiny_upscaler.safetensors": upscaler,
}


def write_vocabularies(out: str) -> list[str]:
    """Write the vocabularies that are not part of the program below `out`, a models folder; returns their paths."""
    written = []
    for name, make in VOCABULARIES.items():
        path = os.path.join(out, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(make())
        written.append(path)
    return written
