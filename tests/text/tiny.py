"""Small text encoders with random weights, under the keys that files have."""

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
