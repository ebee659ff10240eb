"""BERT's encoder (Devlin et al. 2019, arXiv 1810.04805), as HunyuanDiT uses it; transformers' weight names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from comfy.clip_model import ACTIVATIONS, LayerCollector, merge_heads, padding_bias, split_heads


class _Output(torch.nn.Module):
    """A linear, the residual and a norm."""

    def __init__(self, width_in: int, width: int, eps: float, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.dense = operations.Linear(width_in, width, dtype=dtype, device=device)
        self.LayerNorm = operations.LayerNorm(width, eps=eps, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class _SelfAttention(torch.nn.Module):
    query: torch.nn.Module
    key: torch.nn.Module
    value: torch.nn.Module

    def __init__(self, width: int, heads: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.heads = heads
        for name in ("query", "key", "value"):
            setattr(self, name, operations.Linear(width, width, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class _Attention(torch.nn.Module):
    def __init__(self, width: int, heads: int, eps: float, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.self = _SelfAttention(width, heads, dtype, device, operations)
        self.output = _Output(width, width, eps, dtype, device, operations)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.output(self.self(x, mask), x)


class _Intermediate(torch.nn.Module):
    def __init__(self, width: int, inner: int, activation: str, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.dense = operations.Linear(width, inner, dtype=dtype, device=device)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(x))


class BertLayer(torch.nn.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        width, inner, eps = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.attention = _Attention(width, config["num_attention_heads"], eps, dtype, device, operations)
        self.intermediate = _Intermediate(width, inner, config["hidden_act"], dtype, device, operations)
        self.output = _Output(inner, width, eps, dtype, device, operations)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]."""
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class _Layers(torch.nn.Module):
    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        count = config["num_hidden_layers"]
        self.layer = torch.nn.ModuleList(BertLayer(config, dtype, device, operations) for _ in range(count))


class BertEmbeddings(torch.nn.Module):
    """Words, positions and the (single) token type, normalised."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        width = config["hidden_size"]
        make = {"dtype": dtype, "device": device}
        self.word_embeddings = operations.Embedding(config["vocab_size"], width, **make)
        self.position_embeddings = operations.Embedding(config["max_position_embeddings"], width, **make)
        self.token_type_embeddings = operations.Embedding(config["type_vocab_size"], width, **make)
        self.LayerNorm = operations.LayerNorm(width, eps=config["layer_norm_eps"], **make)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """embeds [B, L, C] of words."""
        positions = torch.arange(embeds.shape[1], device=embeds.device)
        kind = torch.zeros_like(positions)
        return self.LayerNorm(
            embeds
            + self.position_embeddings(positions, out_dtype=embeds.dtype)
            + self.token_type_embeddings(kind, out_dtype=embeds.dtype)
        )


class _Network(torch.nn.Module):
    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config, dtype, device, operations)
        self.encoder = _Layers(config, dtype, device, operations)


class BertModel(torch.nn.Module):
    """The encoder; interface of `comfy.clip_model`, without pooling."""

    def __init__(self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.num_layers = config_dict["num_hidden_layers"]
        self.bert = _Network(config_dict, dtype, device, operations)
        self.dtype = dtype

    def get_input_embeddings(self) -> torch.nn.Module:
        """The word embedding."""
        return self.bert.embeddings.word_embeddings

    def set_input_embeddings(self, embeddings: torch.nn.Module) -> None:
        """Replace the word embedding."""
        self.bert.embeddings.word_embeddings = embeddings

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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(last hidden [B, L, C], chosen hidden or None) of `input_tokens` [B, L] or their `embeds`."""
        if embeds is None:
            embeds = self.get_input_embeddings()(input_tokens, out_dtype=dtype)
        x = self.bert.embeddings(embeds)
        mask = None if attention_mask is None else padding_bias(attention_mask, x.dtype)
        collector = LayerCollector(intermediate_output, self.num_layers)
        for i, layer in enumerate(self.bert.encoder.layer):
            x = layer(x, mask)
            collector.see(i, x)
        return x, collector.result()


def bert_config_from_state_dict(sd: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The sizes of a BERT encoder from its weights (keys begin with `bert.`); heads are 64 wide."""
    try:
        vocabulary, width = sd["bert.embeddings.word_embeddings.weight"].shape
        positions = sd["bert.embeddings.position_embeddings.weight"].shape[0]
        kinds = sd["bert.embeddings.token_type_embeddings.weight"].shape[0]
        inner = sd["bert.encoder.layer.0.intermediate.dense.weight"].shape[0]
    except KeyError as missing:
        raise ValueError(f"not a BERT encoder: its weights have no {missing}") from None
    prefix = "bert.encoder.layer."
    layers = {int(key[len(prefix) :].split(".")[0]) for key in sd if key.startswith(prefix)}
    return {
        "vocab_size": vocabulary, "hidden_size": width, "num_attention_heads": max(width // 64, 1),
        "intermediate_size": inner, "num_hidden_layers": max(layers) + 1, "hidden_act": "gelu",
        "max_position_embeddings": positions, "type_vocab_size": kinds, "layer_norm_eps": 1e-12,
    }  # fmt: skip
