"""T5's encoder (Raffel et al. 2020, arXiv 1910.10683) and its relatives: T5 1.1, mT5, umT5, Pile-T5."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from comfy.clip_model import ACTIVATIONS, LayerCollector, merge_heads, padding_bias, split_heads
from comfy.families.base import Sizes, Split


class T5LayerNorm(torch.nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-6, dtype: Any = None, device: Any = None, operations: Any = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x), self.eps)


class T5Attention(torch.nn.Module):
    """Unscaled self-attention with a learned bias by relative distance.

    T5 has one table of biases, in its first block; umT5 one in every block.
    """

    q: torch.nn.Module
    k: torch.nn.Module
    v: torch.nn.Module
    o: torch.nn.Module

    def __init__(self, config: dict[str, Any], has_bias: bool, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.heads, self.head_size = config["num_heads"], config["d_kv"]
        width, inner = config["d_model"], config["d_kv"] * config["num_heads"]
        for name, sizes in (("q", (width, inner)), ("k", (width, inner)), ("v", (width, inner)), ("o", (inner, width))):
            setattr(self, name, operations.Linear(*sizes, bias=False, dtype=dtype, device=device))
        self.buckets = config.get("relative_attention_num_buckets", 32)
        self.max_distance = config.get("relative_attention_max_distance", 128)
        self.relative_attention_bias = None
        if has_bias:
            self.relative_attention_bias = operations.Embedding(self.buckets, self.heads, dtype=dtype, device=device)

    def _bucket(self, distance: torch.Tensor) -> torch.Tensor:
        """Bucket of each signed distance: half of the buckets per direction, exact when near, logarithmic beyond."""
        per_side = self.buckets // 2
        exact = per_side // 2
        size = distance.abs()
        growth = torch.log(size.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (growth * (per_side - exact)).long()).clamp(max=per_side - 1)
        return torch.where(size < exact, size, far) + per_side * (distance > 0)

    def bias(self, length: int, device: Any, dtype: torch.dtype) -> torch.Tensor:
        """[1, H, L, L], for those heads whose biases are here."""
        assert self.relative_attention_bias is not None
        positions = torch.arange(length, device=device)
        buckets = self._bucket(positions[None, :] - positions[:, None])
        return self.relative_attention_bias(buckets, out_dtype=dtype).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """x [B, L, C]; bias broadcasts to [B, H, L, L]. H heads are as many as the linears return."""
        q, k, v = (layer(x) for layer in (self.q, self.k, self.v))
        heads = q.shape[-1] // self.head_size
        if heads == 0:  # fewer heads than ranks that share them
            return self.o(q)
        q, k, v = (split_heads(t, heads) for t in (q, k, v))
        return self.o(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)))


class T5FeedForward(torch.nn.Module):
    """One hidden layer, gated (T5 1.1) or not (T5 1.0)."""

    wi: torch.nn.Module  # without a gate
    wi_0: torch.nn.Module  # the gate
    wi_1: torch.nn.Module

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        width, inner = config["d_model"], config["d_ff"]
        for name in ("wi_0", "wi_1") if config["is_gated_act"] else ("wi",):
            setattr(self, name, operations.Linear(width, inner, bias=False, dtype=dtype, device=device))
        self.wo = operations.Linear(inner, width, bias=False, dtype=dtype, device=device)
        self.gated = config["is_gated_act"]
        self.activation = ACTIVATIONS[config["dense_act_fn"]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]."""
        if self.gated:
            return self.wo(self.activation(self.wi_0(x)) * self.wi_1(x))
        return self.wo(self.activation(self.wi(x)))


class _Sublayer(torch.nn.Module):
    """A norm and the function after it, under the name the weights have."""

    def __init__(self, name: str, function: torch.nn.Module, width: int, dtype: Any, device: Any) -> None:
        super().__init__()
        setattr(self, name, function)
        self.layer_norm = T5LayerNorm(width, dtype=dtype, device=device)


class T5Block(torch.nn.Module):
    """Self-attention and feed-forward, pre-norm."""

    def __init__(self, config: dict[str, Any], has_bias: bool, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        width = config["d_model"]
        attention = T5Attention(config, has_bias, dtype, device, operations)
        feed_forward = T5FeedForward(config, dtype, device, operations)
        self.layer = torch.nn.ModuleList([
            _Sublayer("SelfAttention", attention, width, dtype, device),
            _Sublayer("DenseReluDense", feed_forward, width, dtype, device),
        ])  # fmt: skip

    @property
    def attention(self) -> T5Attention:
        """The block's attention."""
        sublayer: Any = self.layer[0]
        return sublayer.SelfAttention

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]."""
        first: Any
        second: Any
        first, second = self.layer
        x = x + first.SelfAttention(first.layer_norm(x), bias)
        return x + second.DenseReluDense(second.layer_norm(x))


class T5Stack(torch.nn.Module):
    """All blocks and the final norm."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        every = config.get("model_type") == "umt5"
        self.block = torch.nn.ModuleList(
            T5Block(config, every or i == 0, dtype, device, operations) for i in range(config["num_layers"])
        )
        self.final_layer_norm = T5LayerNorm(config["d_model"], dtype=dtype, device=device)

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        intermediate_output: Any = None,
        final_layer_norm_intermediate: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, L, C] -> (last hidden, chosen hidden or None)."""
        padding = None if attention_mask is None else padding_bias(attention_mask, x.dtype)
        collector = LayerCollector(intermediate_output, len(self.block))
        bias: torch.Tensor | None = None
        block: Any
        for i, block in enumerate(self.block):
            if block.attention.relative_attention_bias is not None:
                bias = block.attention.bias(x.shape[1], x.device, x.dtype)
                if padding is not None:
                    bias = (bias + padding).clamp_(min=torch.finfo(x.dtype).min)
            assert bias is not None
            x = block(x, bias)
            collector.see(i, x)
        hidden = collector.result()
        if hidden is not None and final_layer_norm_intermediate:
            hidden = self.final_layer_norm(hidden)
        return self.final_layer_norm(x), hidden


class T5(torch.nn.Module):
    """The encoder with its token embedding; `config_dict` as in the transformers library's T5Config.

    splits: how its linears are cut where ranks share them, as in a family's record; sizes: those that the splits name.
    """

    splits = {
        "encoder.block.*.SelfAttention.[qkv]": Split("column", ("heads",), tokens=()),
        "encoder.block.*.SelfAttention.relative_attention_bias": Split("column", ("biases",), tokens=()),
        "encoder.block.*.SelfAttention.o": Split("row", ("heads",), tokens=()),
        "encoder.block.*.DenseReluDense.wi*": Split("column", ("inner",), tokens=()),
        "encoder.block.*.DenseReluDense.wo": Split("row", ("inner",), tokens=()),
    }

    def sizes(self) -> Sizes:
        """Heads, one bias for each, and hidden channels of the feed-forward layers."""
        config = self._config
        heads, size = config["num_heads"], config["d_kv"]
        return {"heads": (heads * size, size), "biases": (heads, 1), "inner": (config["d_ff"], 1)}

    def __init__(self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self._config = config_dict
        self.num_layers = config_dict["num_layers"]
        width = config_dict["d_model"]
        self.encoder = T5Stack(config_dict, dtype, device, operations)
        self.shared = operations.Embedding(config_dict["vocab_size"], width, dtype=dtype, device=device)
        self.dtype = dtype

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token embedding."""
        return self.shared

    def set_input_embeddings(self, embeddings: torch.nn.Module) -> None:
        """Replace the token embedding."""
        self.shared = embeddings

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
        if embeds is None:
            embeds = self.shared(input_ids, out_dtype=dtype)
        # Some fp8 files hold NaN where an embedding overflowed.
        x = torch.nan_to_num(embeds)
        return self.encoder(x, attention_mask, intermediate_output, final_layer_norm_intermediate)


def t5_config_from_state_dict(sd: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The sizes of a T5-like encoder from its weights (keys begin with `encoder.` or `shared.`)."""
    block = "encoder.block.{}.layer."
    attention = block.format(0) + "0.SelfAttention."
    try:
        buckets, heads = sd[attention + "relative_attention_bias.weight"].shape
        inner = sd[attention + "q.weight"].shape[0]
        vocabulary, width = sd["shared.weight"].shape
    except KeyError as missing:
        raise ValueError(f"not a T5 encoder: its weights have no {missing}") from None
    prefix = "encoder.block."
    layers = {int(key[len(prefix) :].split(".")[0]) for key in sd if key.startswith(prefix)}
    gated = block.format(0) + "1.DenseReluDense.wi_0.weight" in sd
    first = block.format(0) + ("1.DenseReluDense.wi_0.weight" if gated else "1.DenseReluDense.wi.weight")
    every = block.format(1) + "0.SelfAttention.relative_attention_bias.weight" in sd
    return {
        "model_type": "umt5" if every else "t5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "num_heads": heads,
        "d_ff": sd[first].shape[0],
        "num_layers": max(layers) + 1,
        "is_gated_act": gated,
        "dense_act_fn": "gelu_pytorch_tanh" if gated else "relu",
        "relative_attention_num_buckets": buckets,
    }
