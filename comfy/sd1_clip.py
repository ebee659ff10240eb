"""Text encoders by ComfyUI's names: prompt tokenizer, one encoder with its settings, and the pair as SD 1 has it."""

from __future__ import annotations

import logging
import numbers
from typing import Any

import torch

import comfy.model_management
import comfy.ops
from comfy.clip_model import CLIPTextModel
from comfy.text_encoders.embeddings import expand_directory_list, load_embed
from comfy.text_encoders.prompt_tokenizer import SD1Tokenizer, SDTokenizer
from comfy.text_encoders.prompts import escape_important, parse_parentheses, token_weights, unescape_important

__all__ = [
    "ClipTokenWeightEncoder", "SD1CheckpointClipModel", "SD1ClipModel", "SD1Tokenizer", "SDClipModel", "SDTokenizer",
    "escape_important", "expand_directory_list", "gen_empty_tokens", "load_embed", "parse_parentheses",
    "token_weights", "unescape_important",
]  # fmt: skip

CLIP_L_CONFIG = {
    "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407, "vocab_size": 49408,
}  # fmt: skip


def gen_empty_tokens(special_tokens: dict[str, int], length: int) -> list[int]:
    """The row of an empty prompt: start and end tokens where the encoder has them, then padding."""
    row = [special_tokens[name] for name in ("start", "end") if special_tokens.get(name) is not None]
    return row + [special_tokens.get("pad", 0)] * (length - len(row))


class ClipTokenWeightEncoder:
    """Prompt weights on top of `encode`: each position moves away from the empty prompt by its weight."""

    special_tokens: dict[str, int]

    def encode(self, tokens: Any) -> Any:
        """Subclasses encode rows of tokens."""
        raise NotImplementedError

    def encode_token_weights(self, token_weight_pairs: list[list[Any]]) -> tuple[Any, ...]:
        """(hidden [1, sum of lengths, C], pooled [1, P] or None[, extra]) of rows of (token, weight).

        out = (z - z_empty) * weight + z_empty. Sections are concatenated; pooled is that of the first.
        """
        rows = [[pair[0] for pair in row] for row in token_weight_pairs]
        weighted = any(pair[1] != 1.0 for row in token_weight_pairs for pair in row)
        sections = len(rows)
        if weighted or not sections:
            make_empty = getattr(self, "gen_empty_tokens", gen_empty_tokens)
            rows.append(make_empty(self.special_tokens, max(map(len, rows), default=0)))
        hidden, pooled, *more = self.encode(rows)
        device = comfy.model_management.intermediate_device()
        first_pooled = None if pooled is None else pooled[0:1].to(device)
        parts = []
        for k, row in enumerate(token_weight_pairs):
            part = hidden[k : k + 1]
            if weighted:
                weights = torch.ones(part.shape[1], dtype=part.dtype)
                given = torch.tensor([float(pair[1]) for pair in row])[: part.shape[1]]
                weights[: len(given)] = given
                weights = weights.to(part.device).view(1, -1, 1)
                moved = (part - hidden[-1:]) * weights + hidden[-1:]
                part = torch.where(weights == 1.0, part, moved)
            parts.append(part)
        out = torch.cat(parts, dim=-2) if parts else hidden[-1:]
        result: tuple[Any, ...] = (out.to(device), first_pooled)
        if more:
            extra = dict(more[0])
            if "attention_mask" in extra:
                extra["attention_mask"] = extra["attention_mask"][:sections].flatten().unsqueeze(0).to(device)
            result = (*result, extra)
        return result


class SDClipModel(torch.nn.Module, ClipTokenWeightEncoder):
    """One text encoder with its settings.

    layer: "last" hidden states, "hidden" with `layer_idx` (negative counts from the end), or "all".
    layer_norm_hidden_state: apply the final norm to hidden states of an inner layer.
    special_tokens: ids of start, end and pad tokens, as far as the encoder has them.
    enable_attention_masks: let padding be ignored; zero_out_masked: set its output to 0; return_attention_masks: give
        the masks to the caller; return_projected_pooled: pooled output after or before the projection.
    model_class and textmodel_json_config (a dict): the network. `model_options` may override the configuration
        ("<model_name>_model_config"), name custom operations, or mark scaled fp8 weights ("<model_name>_scaled_fp8").
    device: "meta" for weights that `load_sd` will assign.
    """

    LAYERS = ("last", "pooled", "hidden", "all")

    def __init__(
        self,
        device: Any = "cpu",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        textmodel_json_config: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        model_class: Any = CLIPTextModel,
        special_tokens: dict[str, int] | None = None,
        layer_norm_hidden_state: bool = True,
        enable_attention_masks: bool = False,
        zero_out_masked: bool = False,
        return_projected_pooled: bool = True,
        return_attention_masks: bool = False,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if layer not in self.LAYERS:
            raise ValueError(f"unknown layer {layer!r}; choose one of {', '.join(self.LAYERS)}")
        if layer == "hidden" and layer_idx is None:
            raise ValueError("layer='hidden' needs layer_idx")
        options = model_options or {}
        name = options.get("model_name", "clip_l")
        config = options.get(f"{name}_model_config", textmodel_json_config or CLIP_L_CONFIG)
        self.operations = options.get("custom_operations") or self._operations(options.get(f"{name}_scaled_fp8"))
        self.transformer = model_class(config, dtype, device, self.operations)
        self.num_layers = self.transformer.num_layers
        self.dtypes = {dtype}
        self.max_length = max_length
        self.special_tokens = special_tokens or {"start": 49406, "end": 49407, "pad": 49407}
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.6055), requires_grad=False)
        self.enable_attention_masks = enable_attention_masks
        self.zero_out_masked = zero_out_masked
        self.return_attention_masks = return_attention_masks
        self.layer_norm_hidden_state = layer_norm_hidden_state
        self.return_projected_pooled = return_projected_pooled
        self.layer = layer
        self.layer_idx = layer_idx
        self.execution_device: Any = None
        self.options_default = (layer, layer_idx, return_projected_pooled, None)
        if freeze:
            self.freeze()

    @staticmethod
    def _operations(scaled_fp8: torch.dtype | None) -> Any:
        # Text is encoded in float32: weights of any dtype are cast layer by layer when they are used.
        if scaled_fp8 is not None:
            return comfy.ops.scaled_fp8_ops(fp8_matrix_mult=False, override_dtype=scaled_fp8)
        return comfy.ops.manual_cast

    def freeze(self) -> None:
        """Evaluation only."""
        self.transformer.eval()
        for parameter in self.parameters():
            parameter.requires_grad = False

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Change the output for the next encodings: "layer" (an index), "projected_pooled", "execution_device"."""
        index = options.get("layer", self.layer_idx)
        self.return_projected_pooled = options.get("projected_pooled", self.return_projected_pooled)
        self.execution_device = options.get("execution_device", self.execution_device)
        if self.layer == "all":
            return
        if index is None or abs(index) > self.num_layers:
            self.layer = "last"
        else:
            self.layer, self.layer_idx = "hidden", index

    def reset_clip_options(self) -> None:
        """Back to what the encoder was made with."""
        self.layer, self.layer_idx, self.return_projected_pooled, self.execution_device = self.options_default

    def _vectors(self, token: Any, device: Any) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """(vectors [n, C] or None, what the network is told of them) of a token that is no id.

        Such a token is a tensor, {"type": "embedding", "data": tensor}, or of another type that the network embeds itself.
        """
        told: dict[str, Any] = {"type": "embedding", "extra": None}
        vectors = token
        if isinstance(token, dict):
            told["type"] = token.get("type", "embedding")
            vectors = token.get("data")
            if told["type"] != "embedding" and hasattr(self.transformer, "preprocess_embed"):
                vectors, told["extra"] = self.transformer.preprocess_embed(token, device=device)
        width = self.transformer.get_input_embeddings().weight.shape[1]
        if not isinstance(vectors, torch.Tensor) or vectors.shape[-1] != width:
            size = vectors.shape[-1] if isinstance(vectors, torch.Tensor) else type(vectors).__name__
            logging.warning("an embedding of width %s does not fit an encoder of width %s; left out", size, width)
            return None, told
        return vectors.reshape(-1, width), told

    def _row(self, tokens: list[Any], device: Any) -> tuple[list[int], list[int], list[tuple[Any, dict[str, Any]]]]:
        """(ids, attention mask, vectors that take places of padding and what is told of them) of one row.

        Attention ends after the first end token; an encoder without one stops before its first padding.
        """
        end, pad = self.special_tokens.get("end"), self.special_tokens.get("pad", 0)
        stop = self.special_tokens.get("pad", -1) if end is None else end
        ids: list[int] = []
        mask: list[int] = []
        inserted: list[tuple[Any, dict[str, Any]]] = []
        ended = False
        for token in tokens:
            if isinstance(token, numbers.Integral):
                stops_here = int(token) == stop and not ended
                ids.append(int(token))
                mask.append(0 if ended or (stops_here and end is None) else 1)
                ended = ended or stops_here
                continue
            vectors, told = self._vectors(token, device)
            if vectors is not None:
                inserted.append((vectors, {**told, "index": len(ids), "size": len(vectors)}))
                ids += [pad] * len(vectors)
                mask += [0 if ended else 1] * len(vectors)
        return ids, mask, inserted

    def process_tokens(
        self, tokens: list[list[Any]], device: Any
    ) -> tuple[torch.Tensor, torch.Tensor, list[int], list[dict[str, Any]]]:
        """Rows of ids and vectors -> (embeddings [B, L, C] float32, attention mask [B, L], attended tokens per row, and
        {"type", "index", "size", "extra"} of each run of vectors).
        """
        rows, masks, inserted = zip(*(self._row(row, device) for row in tokens))
        length, pad = max(map(len, rows)), self.special_tokens.get("pad", 0)
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], dtype=torch.long, device=device)
        embeds = self.transformer.get_input_embeddings()(ids, out_dtype=torch.float32)
        for b, pieces in enumerate(inserted):
            for vectors, told in pieces:
                embeds[b, told["index"] : told["index"] + told["size"]] = vectors.to(embeds)
        filled = [mask + [0] * (length - len(mask)) for mask in masks]
        attention_mask = torch.tensor(filled, dtype=torch.long, device=device)
        return embeds, attention_mask, [sum(mask) for mask in masks], [told for row in inserted for _, told in row]

    def forward(self, tokens: list[list[Any]]) -> tuple[Any, ...]:
        """(hidden, pooled or None[, {"attention_mask": [B, L]}]), float32.

        hidden is [B, L, C], or [B, layers, L, C] for layer "all"; pooled [B, P] where the network has one.
        """
        device = self.execution_device
        if device is None:
            device = self.transformer.get_input_embeddings().weight.device
        embeds, attention_mask, counts, infos = self.process_tokens(tokens, device)
        wanted = {"all": "all", "hidden": self.layer_idx}.get(self.layer)
        outputs = self.transformer(
            None,
            attention_mask if self.enable_attention_masks else None,
            embeds=embeds,
            num_tokens=counts,
            intermediate_output=wanted,
            final_layer_norm_intermediate=self.layer_norm_hidden_state,
            dtype=torch.float32,
            embeds_info=infos,
        )
        hidden = (outputs[0] if wanted is None else outputs[1]).float()
        if self.zero_out_masked:
            hidden = hidden * attention_mask.unsqueeze(-1).float()
        pooled = None
        if len(outputs) > 2:
            pooled = outputs[2] if self.return_projected_pooled or len(outputs) < 4 else outputs[3]
            pooled = None if pooled is None else pooled.float()
        if self.return_attention_masks:
            return hidden, pooled, {"attention_mask": attention_mask}
        return hidden, pooled

    def encode(self, tokens: list[list[Any]]) -> tuple[Any, ...]:
        """`forward`."""
        return self(tokens)

    def load_sd(self, sd: dict[str, torch.Tensor]) -> Any:
        """Take the network's weights as they are stored; returns missing and unexpected keys.

        A file without `text_projection.weight` gets the identity. Raises ValueError when other weights are missing
        from a network that has none yet.
        """
        projection = getattr(self.transformer, "text_projection", None)
        key = "text_projection.weight"
        if projection is not None and key not in sd and projection.weight.is_meta:
            dtype = next((value.dtype for value in sd.values() if value.is_floating_point()), torch.float32)
            sd = {**sd, key: torch.eye(*projection.weight.shape).to(dtype)}
        result = self.transformer.load_state_dict(sd, strict=False, assign=True)
        lacking = [name for name, parameter in self.transformer.named_parameters() if parameter.is_meta]
        if lacking:
            raise ValueError(
                f"the text encoder file lacks {len(lacking)} weights, the first is {lacking[0]}; "
                f"it belongs to another encoder or is incomplete"
            )
        return result


class SD1ClipModel(torch.nn.Module):
    """A text encoder under its name, as checkpoints and nodes know it."""

    def __init__(
        self,
        device: Any = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
        clip_name: str = "l",
        clip_model: Any = SDClipModel,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        options = model_options or {}
        self.clip_name = clip_name if name is None else name
        self.clip = f"clip_{clip_name}" if name is None else name
        make = options.get(f"{self.clip}_class", clip_model)
        setattr(self, self.clip, make(
            device=device, dtype=dtype, model_options={"model_name": self.clip, **options}, **kwargs
        ))  # fmt: skip
        self.dtypes = {dtype}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """See `SDClipModel.set_clip_options`."""
        getattr(self, self.clip).set_clip_options(options)

    def reset_clip_options(self) -> None:
        """See `SDClipModel.reset_clip_options`."""
        getattr(self, self.clip).reset_clip_options()

    def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> tuple[Any, ...]:
        """(hidden, pooled[, extra]) of {name: rows}."""
        return getattr(self, self.clip).encode_token_weights(token_weight_pairs[self.clip_name])

    def load_sd(self, sd: dict[str, torch.Tensor]) -> Any:
        """Take the encoder's weights."""
        return getattr(self, self.clip).load_sd(sd)


class SD1CheckpointClipModel(SDClipModel):
    """CLIP-L as SD 1 checkpoints carry it: pooled output before the projection."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        super().__init__(device=device, return_projected_pooled=False, dtype=dtype, model_options=model_options)
