"""Small text encoders with random weights, under the keys that files have."""

import re

import torch

WIDTH_L, WIDTH_T5 = 128, 64


def _random(shapes, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)).to(dtype)
        for key, shape in shapes.items()
    }


def clip_l(seed=1, dtype=torch.float32, projection=True):
    """A CLIP text tower of three layers and two heads."""
    w, inner = WIDTH_L, 96
    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, w),
        "text_model.embeddings.position_embedding.weight": (77, w),
        "text_model.final_layer_norm.weight": (w,),
        "text_model.final_layer_norm.bias": (w,),
    }
    for i in range(3):
        layer = f"text_model.encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}self_attn.{name}.weight"] = (w, w)
            shapes[f"{layer}self_attn.{name}.bias"] = (w,)
        for name, (out, into) in {"fc1": (inner, w), "fc2": (w, inner)}.items():
            shapes[f"{layer}mlp.{name}.weight"] = (out, into)
            shapes[f"{layer}mlp.{name}.bias"] = (out,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (w,)
    if projection:
        shapes["text_projection.weight"] = (w, w)
    return _random(shapes, seed, dtype)


def t5(seed=2, dtype=torch.float32, vocabulary=32128):
    """A gated T5 encoder of two blocks and four heads."""
    w, inner, heads, width = WIDTH_T5, 80, 4, 16
    shapes = {"shared.weight": (vocabulary, w), "encoder.final_layer_norm.weight": (w,)}
    for i in range(2):
        block = f"encoder.block.{i}.layer."
        for name in "qkv":
            shapes[f"{block}0.SelfAttention.{name}.weight"] = (heads * width, w)
        shapes[f"{block}0.SelfAttention.o.weight"] = (w, heads * width)
        shapes[f"{block}0.layer_norm.weight"] = shapes[f"{block}1.layer_norm.weight"] = (w,)
        for name in ("wi_0", "wi_1"):
            shapes[f"{block}1.DenseReluDense.{name}.weight"] = (inner, w)
        shapes[f"{block}1.DenseReluDense.wo.weight"] = (w, inner)
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, heads)
    return _random(shapes, seed, dtype)


def qwen_vl(seed=3, width=64, vision=True, dtype=torch.float32):
    """Qwen2.5-VL of one layer, whose tower has eight (the last attends to the whole picture) and two heads."""
    inner, seen, inner_seen = 48, 160, 40
    shapes = {"model.embed_tokens.weight": (152064, width), "model.norm.weight": (width,)}
    layer = "model.layers.0."
    for name, rows in (("q", 512), ("k", 512), ("v", 512)):
        shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, width)
        shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
    shapes[f"{layer}self_attn.o_proj.weight"] = (width, 512)
    shapes |= {f"{layer}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
    shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    if vision:
        shapes["visual.patch_embed.proj.weight"] = (seen, 3, 2, 14, 14)
        sizes = {"attn.qkv": (3 * seen, seen), "attn.proj": (seen, seen), "mlp.gate_proj": (inner_seen, seen),
                 "mlp.up_proj": (inner_seen, seen), "mlp.down_proj": (seen, inner_seen)}  # fmt: skip
        linears = {f"blocks.{i}.{name}": size for i in range(8) for name, size in sizes.items()}
        linears |= {"merger.mlp.0": (4 * seen, 4 * seen), "merger.mlp.2": (width, 4 * seen)}
        for name, size in linears.items():
            shapes |= {f"visual.{name}.weight": size, f"visual.{name}.bias": size[:1]}
        norms = [f"blocks.{i}.norm{n}" for i in range(8) for n in (1, 2)] + ["merger.ln_q"]
        shapes |= {f"visual.{name}.weight": (seen,) for name in norms}
    out = _random(shapes, seed)
    out |= {key: value + 1 for key, value in out.items() if value.ndim == 1 and "norm" in key or "ln_q" in key}
    return {key: value.to(dtype) for key, value in out.items()}


class Words:
    """Stands in for Qwen's vocabulary: its special tokens, and a byte for each other token."""

    special = {
        "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652, "<|vision_end|>": 151653,
        "<|image_pad|>": 151655, "user": 872,
    }  # fmt: skip

    def __call__(self, text):
        pieces = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text)
        bytes_of = {"\n": 198}
        ids = [[self.special[p]] if p in self.special else [bytes_of.get(c, ord(c) % 256) for c in p] for p in pieces]
        return {"input_ids": sum(ids, [])}
