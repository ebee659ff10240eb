"""CLIP's text network (Radford et al. 2021, arXiv 2103.00020), with the weight names of the transformers library.

Networks of text encoders share one interface: `forward(input_tokens, attention_mask, embeds, num_tokens,
intermediate_output, ...)` returns (last hidden states, chosen hidden states or None[, projected pooled, pooled]).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def split_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, heads * D] -> [B, heads, L, D]."""
    batch, length, width = tensor.shape
    return tensor.view(batch, length, heads, width // heads).transpose(1, 2)


def merge_heads(tensor: torch.Tensor) -> torch.Tensor:
    """[B, heads, L, D] -> [B, L, heads * D]."""
    return tensor.transpose(1, 2).flatten(2)


def padding_bias(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An additive mask [B, 1, 1, L] from a mask [B, L] that is 1 for tokens to attend to."""
    bias = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    bias.masked_fill_(attention_mask == 0, torch.finfo(dtype).min)
    return bias[:, None, None, :]


class LayerCollector:
    """Keeps the hidden states a caller asked for: of one layer (negative counts from the end), of all, or of none."""

    def __init__(self, wanted: int | str | None, count: int) -> None:
        self.all = wanted == "all"
        self.index = None if wanted is None or self.all else int(wanted) + (count if int(wanted) < 0 else 0)
        self.kept: list[torch.Tensor] = []

    def see(self, layer: int, x: torch.Tensor) -> None:
        """Called with the output [B, L, C] of each layer."""
        if self.all or layer == self.index:
            self.kept.append(x)

    def result(self) -> torch.Tensor | None:
        """[B, L, C] for one layer, [B, layers, L, C] for all."""
        if not self.kept:
            return None
        return torch.stack(self.kept, dim=1) if self.all else self.kept[0]


class CLIPAttention(torch.nn.Module):
    """Self-attention; causal by its mask."""

    q_proj: torch.nn.Module
    k_proj: torch.nn.Module
    v_proj: torch.nn.Module
    out_proj: torch.nn.Module

    def __init__(self, width: int, heads: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, operations.Linear(width, width, bias=True, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, L, C]; mask broadcasts to [B, heads, L, L] and is added to the scores."""
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


class CLIPMLP(torch.nn.Module):
    """Two linears with an activation between them."""

    def __init__(self, width: int, inner: int, activation: str, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(width, inner, bias=True, dtype=dtype, device=device)
        self.fc2 = operations.Linear(inner, width, bias=True, dtype=dtype, device=device)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]."""
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(torch.nn.Module):
    """Pre-norm transformer layer."""

    def __init__(
        self, width: int, heads: int, inner: int, activation: str, dtype: Any, device: Any, operations: Any
    ) -> None:
        super().__init__()
        self.layer_norm1 = operations.LayerNorm(width, dtype=dtype, device=device)
        self.self_attn = CLIPAttention(width, heads, dtype, device, operations)
        self.layer_norm2 = operations.LayerNorm(width, dtype=dtype, device=device)
        self.mlp = CLIPMLP(width, inner, activation, dtype, device, operations)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(torch.nn.Module):
    """The stack of layers."""

    def __init__(self, layers: Iterable[CLIPLayer]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, intermediate_output: Any = None) -> Any:
        """(output, hidden states asked for)."""
        collector = LayerCollector(intermediate_output, len(self.layers))
        for i, layer in enumerate(self.layers):
            x = layer(x, mask)
            collector.see(i, x)
        return x, collector.result()


class CLIPEmbeddings(torch.nn.Module):
    """Token embeddings plus learned positions."""

    def __init__(self, vocabulary: int, positions: int, width: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.token_embedding = operations.Embedding(vocabulary, width, dtype=dtype, device=device)
        self.position_embedding = operations.Embedding(positions, width, dtype=dtype, device=device)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """embeds [B, L, C] of tokens -> with positions."""
        positions = torch.arange(embeds.shape[1], device=embeds.device)
        return embeds + self.position_embedding(positions, out_dtype=embeds.dtype)


class CLIPTextModel_(torch.nn.Module):  # noqa: N801 (ComfyUI's name)
    """The network without the projection; `config` as in the transformers library's CLIPTextConfig."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.embeddings = CLIPEmbeddings(
            config.get("vocab_size", 49408), config["max_position_embeddings"], width, dtype, device, operations
        )
        make = (width, config["num_attention_heads"], config["intermediate_size"], config["hidden_act"])
        count = config["num_hidden_layers"]
        self.encoder = CLIPEncoder(CLIPLayer(*make, dtype, device, operations) for _ in range(count))
        self.final_layer_norm = operations.LayerNorm(width, dtype=dtype, device=device)
        self.eos_token_id = config["eos_token_id"]

    def forward(
        self,
        input_tokens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
        num_tokens: list[int] | None = None,
        intermediate_output: Any = None,
        final_layer_norm_intermediate: bool = True,
        dtype: torch.dtype = torch.float32,
        embeds_info: Any = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(last hidden [B, L, C], chosen hidden or None, pooled [B, C]).

        Give `input_tokens` [B, L] or their `embeds`. Pooled is taken at the last of `num_tokens` per row, or at the
        first end token.
        """
        if embeds is None:
            embeds = self.embeddings.token_embedding(input_tokens, out_dtype=dtype)
        x = self.embeddings(embeds)
        length = x.shape[1]
        lowest = torch.finfo(x.dtype).min
        mask = torch.full((length, length), lowest, dtype=x.dtype, device=x.device).triu_(1)
        if attention_mask is not None:
            mask = (mask + padding_bias(attention_mask, x.dtype)).clamp_(min=lowest)
        x, hidden = self.encoder(x, mask, intermediate_output)
        x = self.final_layer_norm(x)
        if hidden is not None and final_layer_norm_intermediate:
            hidden = self.final_layer_norm(hidden)
        if num_tokens is not None:
            ends = torch.tensor([count - 1 for count in num_tokens], device=x.device)
        else:
            assert input_tokens is not None
            ends = (input_tokens.to(x.device) == self.eos_token_id).int().argmax(dim=-1)
        return x, hidden, x[torch.arange(x.shape[0], device=x.device), ends]


class CLIPTextModel(torch.nn.Module):
    """CLIP's text tower with its projection."""

    def __init__(self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.num_layers = config_dict["num_hidden_layers"]
        self.text_model = CLIPTextModel_(config_dict, dtype, device, operations)
        width = config_dict["hidden_size"]
        out = config_dict.get("projection_dim", width)
        self.text_projection = operations.Linear(width, out, bias=False, dtype=dtype, device=device)
        self.dtype = dtype

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token embedding."""
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, embeddings: torch.nn.Module) -> None:
        """Replace the token embedding."""
        self.text_model.embeddings.token_embedding = embeddings

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
        """(last hidden, chosen hidden, projected pooled [B, P], pooled [B, C])."""
        x, hidden, pooled = self.text_model(*args, **kwargs)
        return x, hidden, self.text_projection(pooled), pooled


def clip_config_from_state_dict(sd: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The sizes of a CLIP text tower from its weights (keys begin with `text_model.`).

    What shapes do not tell: heads are 64 wide in every released model; OpenAI's CLIP-L (width 768) uses the quick
    GELU, OpenCLIP's towers the exact one.
    """
    try:
        vocabulary, width = sd["text_model.embeddings.token_embedding.weight"].shape
        inner = sd["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        positions = sd["text_model.embeddings.position_embedding.weight"].shape[0]
    except KeyError as missing:
        raise ValueError(f"not a CLIP text encoder: its weights have no {missing}") from None
    prefix = "text_model.encoder.layers."
    layers = {int(key[len(prefix) :].split(".")[0]) for key in sd if key.startswith(prefix)}
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": max(width // 64, 1),
        "intermediate_size": inner,
        "num_hidden_layers": max(layers) + 1,
        "hidden_act": "quick_gelu" if width == 768 else "gelu",
        "max_position_embeddings": positions,
        "eos_token_id": 49407,
    }
    if "text_projection.weight" in sd:
        config["projection_dim"] = sd["text_projection.weight"].shape[0]
    return config
