"""Causal language models as text encoders: Llama 3, Qwen 2.5 and Gemma 2 share this network.

`config_dict` has transformers' field names; `transformer_type` is "llama" or "gemma2". Gemma scales its embeddings by
sqrt(hidden_size), adds 1 to norm weights (`rms_norm_add`) and normalises the outputs of sublayers too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from comfy.clip_model import ACTIVATIONS, LayerCollector, merge_heads, padding_bias, split_heads


class RMSNorm(torch.nn.Module):
    """Root-mean-square normalisation; with `add_one` the stored weight is the difference from 1."""

    def __init__(self, width: int, eps: float, add_one: bool, dtype: Any, device: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, dtype=dtype, device=device), requires_grad=False)
        self.eps, self.add_one = eps, add_one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        weight = self.weight.to(x)
        return F.rms_norm(x, weight.shape, weight + 1.0 if self.add_one else weight, self.eps)


def rotary_angles(positions: torch.Tensor, width: int, theta: float) -> torch.Tensor:
    """Angles [..., L, width / 2] of tokens at `positions` [..., L] (Su et al. 2021, arXiv 2104.09864)."""
    frequencies = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    return positions.to(torch.float32)[..., None] * frequencies


def rotary_tables(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [..., width] of angles [..., width / 2], the same for both halves (GPT-NeoX' layout)."""
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, heads, L, D] turned by the tables' angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _Attention(torch.nn.Module):
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        width, self.head_dim = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        make = {"dtype": dtype, "device": device}
        bias = config["qkv_bias"]
        self.q_proj = operations.Linear(width, self.heads * self.head_dim, bias=bias, **make)
        self.k_proj = operations.Linear(width, self.kv_heads * self.head_dim, bias=bias, **make)
        self.v_proj = operations.Linear(width, self.kv_heads * self.head_dim, bias=bias, **make)
        self.o_proj = operations.Linear(self.heads * self.head_dim, width, bias=False, **make)
        self.q_norm = self.k_norm = None
        add_one = config["rms_norm_add"]
        if config.get("q_norm"):
            self.q_norm = RMSNorm(self.head_dim, config["rms_norm_eps"], add_one, dtype, device)
        if config.get("k_norm"):
            self.k_norm = RMSNorm(self.head_dim, config["rms_norm_eps"], add_one, dtype, device)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        q = split_heads(self.q_proj(x), self.heads)
        k = split_heads(self.k_proj(x), self.kv_heads)
        v = split_heads(self.v_proj(x), self.kv_heads)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        q, k = rotate(q, *tables), rotate(k, *tables)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return self.o_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


class _FeedForward(torch.nn.Module):
    """Gated feed-forward."""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        for name, sizes in (("gate_proj", (width, inner)), ("up_proj", (width, inner)), ("down_proj", (inner, width))):
            setattr(self, name, operations.Linear(*sizes, bias=False, dtype=dtype, device=device))
        self.activation = ACTIVATIONS[config["mlp_activation"]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(torch.nn.Module):
    """Attention and feed-forward, each behind a norm; Gemma has one after each as well."""

    input_layernorm: torch.nn.Module
    post_attention_layernorm: torch.nn.Module
    pre_feedforward_layernorm: torch.nn.Module
    post_feedforward_layernorm: torch.nn.Module

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.self_attn = _Attention(config, dtype, device, operations)
        self.mlp = _FeedForward(config, dtype, device, operations)
        self.sandwich = config["transformer_type"].startswith("gemma")
        names = ["input_layernorm", "post_attention_layernorm"]
        if self.sandwich:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in names:
            norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"], config["rms_norm_add"], dtype, device)
            setattr(self, name, norm)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]."""
        attended = self.self_attn(self.input_layernorm(x), mask, tables)
        if not self.sandwich:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class _Stack(torch.nn.Module):
    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.embed_tokens = operations.Embedding(config["vocab_size"], width, dtype=dtype, device=device)
        count = config["num_hidden_layers"]
        self.layers = torch.nn.ModuleList(DecoderLayer(config, dtype, device, operations) for _ in range(count))
        self.norm = RMSNorm(width, config["rms_norm_eps"], config["rms_norm_add"], dtype, device)


class LanguageModel(torch.nn.Module):
    """The network; interface of `comfy.clip_model`, without pooling."""

    def __init__(self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.config = config_dict
        self.num_layers = config_dict["num_hidden_layers"]
        self.model = _Stack(config_dict, dtype, device, operations)
        self.dtype = dtype

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, embeddings: torch.nn.Module) -> None:
        """Replace the token embedding."""
        self.model.embed_tokens = embeddings

    def positions(self, length: int, embeds_info: Any, device: Any) -> torch.Tensor:
        """Places of the tokens for the rotary embedding, [L]; `embeds_info` says which of them are no words."""
        return torch.arange(length, device=device)

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotary angles [L, head_dim / 2] of what `positions` returned."""
        return rotary_angles(positions, self.config["head_dim"], self.config["rope_theta"])

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
        num_tokens: list[int] | None = None,
        intermediate_output: Any = None,
        final_layer_norm_intermediate: bool = True,
        dtype: torch.dtype = torch.float32,
        embeds_info: Any = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(last hidden [B, L, C], chosen hidden or None) of `input_ids` [B, L] or their `embeds`."""
        x = self.model.embed_tokens(input_ids, out_dtype=dtype) if embeds is None else embeds
        if self.config["transformer_type"].startswith("gemma"):
            x = x * math.sqrt(self.config["hidden_size"])
        length = x.shape[1]
        lowest = torch.finfo(x.dtype).min
        mask = torch.full((length, length), lowest, dtype=x.dtype, device=x.device).triu_(1)
        if attention_mask is not None:
            mask = (mask + padding_bias(attention_mask, x.dtype)).clamp_(min=lowest)
        tables = rotary_tables(self.angles(self.positions(length, embeds_info, x.device)))
        collector = LayerCollector(intermediate_output, self.num_layers)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, mask, (tables[0].to(x.dtype), tables[1].to(x.dtype)))
            collector.see(i, x)
        hidden = collector.result()
        if hidden is not None and final_layer_norm_intermediate:
            hidden = self.model.norm(hidden)
        return self.model.norm(x), hidden


# What shapes do not tell: (head width, rotary base, norm epsilon, Gemma's conventions).
_KINDS: dict[str, tuple[int, float, float, bool]] = {
    "llama3_8b": (128, 500000.0, 1e-5, False),
    "qwen25": (128, 1000000.0, 1e-6, False),
    "gemma2_2b": (256, 10000.0, 1e-6, True),
}


def language_model_config(sd: dict[str, torch.Tensor], kind: str) -> dict[str, Any]:
    """The configuration of a language model of a kind from its weights (keys begin with `model.`)."""
    head_dim, theta, eps, gemma = _KINDS[kind]
    first = "model.layers.0."
    try:
        vocabulary, width = sd["model.embed_tokens.weight"].shape
        queries = sd[f"{first}self_attn.q_proj.weight"].shape[0]
        keys = sd[f"{first}self_attn.k_proj.weight"].shape[0]
        inner = sd[f"{first}mlp.gate_proj.weight"].shape[0]
    except KeyError as missing:
        raise ValueError(f"not a language model: its weights have no {missing}") from None
    prefix = "model.layers."
    layers = {int(key[len(prefix) :].split(".")[0]) for key in sd if key.startswith(prefix)}
    return {
        "transformer_type": "gemma2" if gemma else "llama", "vocab_size": vocabulary, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": max(layers) + 1, "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim, "head_dim": head_dim, "rms_norm_eps": eps, "rms_norm_add": gemma,
        "rope_theta": theta, "mlp_activation": "gelu_pytorch_tanh" if gemma else "silu",
        "qkv_bias": f"{first}self_attn.k_proj.bias" in sd,
    }  # fmt: skip
