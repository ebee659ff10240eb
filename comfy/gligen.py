"""GLIGEN (Li et al. 2023, arXiv 2301.07093): texts for boxes of a picture, as tokens in gated attentions of a UNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import comfy.ops
import comfy.utils
from comfy.ldm.unet.transformer import CrossAttention, FeedForward

StateDict = dict[str, torch.Tensor]

MAX_BOXES = 30
_FREQUENCIES, _TEMPERATURE, _WIDTH = 8, 100, 512
_PARTS = ("input_blocks", "middle_block", "output_blocks")
# of prompts of Stable Diffusion 1, whose attentions have eight heads; those of later ones have heads of 64
_SD1_TEXT = 768


class GatedSelfAttentionDense(nn.Module):
    """Attention of a block's tokens and the boxes' to each other, then an MLP, each behind a gate that starts closed."""

    def __init__(self, query_dim: int, context_dim: int, n_heads: int, d_head: int, **place: Any) -> None:
        super().__init__()
        operations = place["operations"]
        layer = {name: value for name, value in place.items() if name != "operations"}
        self.linear = operations.Linear(context_dim, query_dim, **layer)
        self.attn = CrossAttention(query_dim, query_dim, n_heads, d_head, **place)
        self.ff = FeedForward(query_dim, glu=True, **place)
        self.norm1, self.norm2 = (operations.LayerNorm(query_dim, **layer) for _ in range(2))
        self.alpha_attn = nn.Parameter(torch.empty((), **layer), requires_grad=False)
        self.alpha_dense = nn.Parameter(torch.empty((), **layer), requires_grad=False)

    def forward(self, x: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L, C] and the boxes' tokens [B, n, D] -> tokens."""
        joint = self.norm1(torch.cat([x, self.linear(boxes)], dim=1))
        x = x + torch.tanh(self.alpha_attn.to(x)) * self.attn(joint)[:, : x.shape[1]]
        return x + torch.tanh(self.alpha_dense.to(x)) * self.ff(self.norm2(x))


class PositionNet(nn.Module):
    """A token of each box: its text and the waves of its corners; learned values stand for boxes that are not there."""

    def __init__(self, in_dim: int, out_dim: int, **place: Any) -> None:
        super().__init__()
        operations = place["operations"]
        layer = {name: value for name, value in place.items() if name != "operations"}
        waves = _FREQUENCIES * 2 * 4
        self.linears = nn.Sequential(
            operations.Linear(in_dim + waves, _WIDTH, **layer), nn.SiLU(),
            operations.Linear(_WIDTH, _WIDTH, **layer), nn.SiLU(),
            operations.Linear(_WIDTH, out_dim, **layer),
        )  # fmt: skip
        self.null_positive_feature = nn.Parameter(torch.empty(in_dim, **layer), requires_grad=False)
        self.null_position_feature = nn.Parameter(torch.empty(waves, **layer), requires_grad=False)

    def forward(self, boxes: torch.Tensor, present: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Corners x, y, x, y in 0..1 [B, n, 4], 1 for boxes that are there [B, n], texts [B, n, D] -> [B, n, out]."""
        present = present.unsqueeze(-1)
        rates = _TEMPERATURE ** (torch.arange(_FREQUENCIES, device=boxes.device) / _FREQUENCIES)
        phases = rates[:, None] * boxes.unsqueeze(-2)
        waves = torch.stack([phases.sin(), phases.cos()], dim=-2).flatten(-3)
        texts = texts * present + (1 - present) * self.null_positive_feature.to(texts)
        waves = waves * present + (1 - present) * self.null_position_feature.to(waves)
        return self.linears(torch.cat([texts, waves], dim=-1))


class _BoxPatch:
    """The patch between the two attentions of each of a UNet's blocks, for every row of a call the same."""

    rows_independent = True

    def __init__(self, modules: nn.ModuleList, tokens: torch.Tensor) -> None:
        self.modules, self.tokens = modules, tokens

    def __call__(self, x: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        tokens = self.tokens.to(x).expand(x.shape[0], -1, -1)
        return self.modules[extra_options["transformer_index"]](x, tokens)


class Gligen(nn.Module):
    """All gated attentions of a UNet, in the order of its blocks, and what makes tokens of boxes."""

    def __init__(self, modules: Sequence[nn.Module], position_net: PositionNet, key_dim: int) -> None:
        super().__init__()
        self.module_list = nn.ModuleList(modules)
        self.position_net = position_net
        self.key_dim = key_dim
        self.max_objs = MAX_BOXES

    def set_position(self, latent_image_shape: Any, position_params: Sequence[Any], device: Any) -> Any:
        """The patch for boxes (text [1, key_dim], height, width, y, x) in cells of a latent [B, C, h, w].

        Raises ValueError for more boxes than the network takes.
        """
        if len(position_params) > self.max_objs:
            raise ValueError(f"GLIGEN takes {self.max_objs} boxes, not {len(position_params)}; remove some")
        rows, columns = latent_image_shape[-2:]
        corners, present = torch.zeros(1, self.max_objs, 4), torch.zeros(1, self.max_objs)
        texts = torch.zeros(1, self.max_objs, self.key_dim)
        for i, (text, height, width, y, x) in enumerate(position_params):
            corners[0, i] = torch.tensor([x / columns, y / rows, (x + width) / columns, (y + height) / rows])
            present[0, i] = 1
            texts[0, i] = text
        return self._set_position(*(tensor.to(device) for tensor in (corners, present, texts)))

    def _set_position(self, boxes: torch.Tensor, masks: torch.Tensor, positive_embeddings: torch.Tensor) -> Any:
        """The patch for what `PositionNet` takes; a pack replaces this method."""
        return _BoxPatch(self.module_list, self.position_net(boxes, masks, positive_embeddings))

    def set_empty(self, latent_image_shape: Any, device: Any) -> Any:
        """The patch for no boxes."""
        return self.set_position(latent_image_shape, (), device)


def load_gligen(sd: StateDict) -> Gligen:
    """The network of a state dict. Raises ValueError when it is not GLIGEN's, or incomplete."""
    places: dict[tuple[int, int], StateDict] = {}
    for key, value in sd.items():
        block, marked, name = key.rpartition(".fuser.")
        found = [part for part in _PARTS if f"{part}." in block]
        if marked and found:
            number = int(block.partition(f"{found[0]}.")[2].partition(".")[0])
            places.setdefault((_PARTS.index(found[0]), number), {})[name] = value
    try:
        own = {key.partition("position_net.")[2]: value for key, value in sd.items() if "position_net." in key}
        place = {
            "dtype": comfy.utils.weight_dtype(sd),
            "device": torch.device("meta"),
            "operations": comfy.ops.manual_cast,
        }
        position_net = PositionNet(own["null_positive_feature"].shape[0], own["linears.4.weight"].shape[0], **place)
        position_net.load_state_dict(own, assign=True)
        modules, key_dim = [], _SD1_TEXT
        for _, weights in sorted(places.items()):
            width, key_dim = weights["linear.weight"].shape
            heads = 8 if key_dim == _SD1_TEXT else width // 64
            module = GatedSelfAttentionDense(width, key_dim, heads, width // heads, **place)
            module.load_state_dict(weights, assign=True)
            modules.append(module)
        if not modules:
            raise KeyError("fuser")
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the file holds no GLIGEN network, or not all of one ({error}); choose another") from error
    return Gligen(modules, position_net, key_dim).eval().requires_grad_(False)
