"""AuraFlow (fal, 2024): an MM-DiT whose last blocks have one set of weights for text and picture.

Shapes: B pictures, L tokens, C hidden size, H heads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ldm.common_dit
import comfy.ops
from comfy.ldm import dit
from comfy.ldm.modules.attention import AttentionSpec, joined_heads, meet
from comfy.ldm.modules.copy_runs import joined_tokens
from comfy.ldm.modules.embedders import TimestepEmbedder, heads_of, to_patches, to_picture
from comfy.ldm.modules.modulate import add_gated, norm_modulate

__all__ = ["DiTBlock", "DoubleAttention", "MLP", "MMDiT", "MMDiTBlock", "SingleAttention"]

NORM_EPS = 1e-5
REGISTERS = 8  # learned tokens before the text
_DOUBLE = dit.BlockArguments(
    tokens={"txt": ("txt",), "img": ("img",)}, values={"vec": "vec"},
    renamed={"txt": "c", "img": "x", "vec": "global_cond"},
)  # fmt: skip
_SINGLE = dit.BlockArguments(
    tokens={"img": ("txt", "img")}, values={"vec": "vec"}, renamed={"img": "cx", "vec": "global_cond"}
)


def mlp_size(dim: int) -> int:
    """Width of an MLP with a gate: two thirds of 4 C, in whole 256."""
    return -(-int(8 * dim / 3) // 256) * 256


class MLP(nn.Module):
    """Linear with a SiLU-gated second one, linear (Shazeer 2020, SwiGLU): [.., C] -> [.., C]."""

    def __init__(
        self, dim: int, hidden_dim: int | None = None, dtype: Any = None, device: Any = None, operations: Any = None
    ) -> None:
        super().__init__()
        width = mlp_size(dim if hidden_dim is None else hidden_dim)
        place = {"bias": False, "dtype": dtype, "device": device}
        self.c_fc1 = operations.Linear(dim, width, **place)
        self.c_fc2 = operations.Linear(dim, width, **place)
        self.c_proj = operations.Linear(width, dim, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.silu(self.c_fc1(x)) * self.c_fc2(x))


class SingleAttention(nn.Module):
    """The weights of one set of tokens: queries and keys are normed over the head size without weights."""

    w1o: nn.Module

    def __init__(
        self, dim: int, n_heads: int, mh_qknorm: bool = False, dtype: Any = None, device: Any = None,
        operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_heads, self.head_dim = n_heads, dim // n_heads
        for name in "qkvo":
            setattr(self, f"w1{name}", operations.Linear(dim, dim, bias=False, dtype=dtype, device=device))

    def pre_attention(self, x: torch.Tensor, which: int = 1) -> tuple[torch.Tensor, ...]:
        """x [B, L, C] -> q, k, v [B, H, L, D] by the weights w1 or w2."""
        q, k, v = (heads_of(getattr(self, f"w{which}{name}")(x), 1, self.head_dim)[0] for name in "qkv")
        return *(F.layer_norm(t, t.shape[-1:], eps=NORM_EPS) for t in (q, k)), v


class DoubleAttention(SingleAttention):
    """The weights of text (w1) and picture (w2)."""

    def __init__(
        self, dim: int, n_heads: int, mh_qknorm: bool = False, dtype: Any = None, device: Any = None,
        operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(dim, n_heads, mh_qknorm, dtype, device, operations)
        for name in "qkvo":
            setattr(self, f"w2{name}", operations.Linear(dim, dim, bias=False, dtype=dtype, device=device))


def _modulation(dim: int, global_conddim: int, parts: int, place: dict[str, Any], operations: Any) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), operations.Linear(global_conddim, parts * dim, bias=False, **place))


def _mods(module: nn.Module, vec: torch.Tensor, call: dit.DenoiserCall) -> tuple[torch.Tensor, ...]:
    """vec [B, C] -> shift, scale, gate of attention and of MLP, [B, 1, C] each."""
    ready = call.prepared.get(id(module))
    return (module(vec).unsqueeze(1) if ready is None else ready).chunk(6, dim=-1)


def _after_attention(
    x: torch.Tensor, out: torch.Tensor, mlp: nn.Module, mods: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """x [B, L, C] plus the MLP of x and the attention's output, normed twice: only the MLP's output stays."""
    inner = F.layer_norm(add_gated(x, out, mods[2]), x.shape[-1:], eps=NORM_EPS)
    return add_gated(x, mlp(inner * (1 + mods[4]) + mods[3]), mods[5])


@dit.own_block
class MMDiTBlock(nn.Module):
    """Text and picture with weights of their own, attending to each other."""

    mlpC: nn.Module
    mlpX: nn.Module
    modC: nn.Module
    modX: nn.Module

    def __init__(
        self, dim: int, heads: int = 8, global_conddim: int = 1024, dtype: Any = None, device: Any = None,
        operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        for stream in "CX":
            setattr(self, f"mlp{stream}", MLP(dim, operations=operations, **place))
            setattr(self, f"mod{stream}", _modulation(dim, global_conddim, 6, place, operations))
        self.attn = DoubleAttention(dim, heads, operations=operations, **place)

    @dit.stage
    def _into_attention(self, which: int, x: torch.Tensor, mods: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return self.attn.pre_attention(norm_modulate(x, mods[1], mods[0], NORM_EPS), which)

    @dit.stage
    def _after_attention(
        self, which: int, x: torch.Tensor, out: torch.Tensor, mods: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        mlp = self.mlpC if which == 1 else self.mlpX
        return _after_attention(x, getattr(self.attn, f"w{which}o")(out), mlp, mods)

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The block on a state with the streams `txt` and `img` and the time's vector `vec` [B, C]."""
        txt, img, vec = state.streams["txt"], state.streams["img"], state.sample["vec"]
        txt_mods, img_mods = _mods(self.modC, vec, call), _mods(self.modX, vec, call)
        parts = zip(self._into_attention(1, txt, txt_mods), self._into_attention(2, img, img_mods))
        q, k, v = (joined_tokens(*pair) for pair in parts)
        meeting = meet(AttentionSpec(q.shape[1], state.tokens("txt", "img"), layer=call.layer), call)
        meeting.send(q, k, v)
        meeting.attend()
        meeting.send_back()
        txt_out, img_out = joined_heads(meeting.result()).split(state.inside("txt", "img"), dim=1)
        return state.replace(
            streams={
                "txt": self._after_attention(1, txt, txt_out, txt_mods),
                "img": self._after_attention(2, img, img_out, img_mods),
            }
        )

    def forward(
        self,
        c: torch.Tensor,
        x: torch.Tensor,
        global_cond: torch.Tensor,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole text [B, L, C], picture [B, L, C] and vector [B, C] -> text and picture."""
        call = dit.call_of(transformer_options)
        state = dit.DiTState({"txt": c, "img": x}, {}, {"vec": global_cond})
        state = self.forward_state(state.shard(call.plan), call)
        return state.whole("txt"), state.whole("img")


@dit.own_block
class DiTBlock(nn.Module):
    """All tokens with the same weights."""

    def __init__(
        self, dim: int, heads: int = 8, global_conddim: int = 1024, dtype: Any = None, device: Any = None,
        operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.modCX = _modulation(dim, global_conddim, 6, place, operations)
        self.attn = SingleAttention(dim, heads, operations=operations, **place)
        self.mlp = MLP(dim, operations=operations, **place)

    @dit.stage
    def _into_attention(self, x: torch.Tensor, mods: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return self.attn.pre_attention(norm_modulate(x, mods[1], mods[0], NORM_EPS))

    @dit.stage
    def _after_attention(self, x: torch.Tensor, out: torch.Tensor, mods: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return _after_attention(x, self.attn.w1o(out), self.mlp, mods)

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The block on all streams of a state as one sequence."""
        x, mods = state.joint(), _mods(self.modCX, state.sample["vec"], call)
        q, k, v = self._into_attention(x, mods)
        meeting = meet(AttentionSpec(q.shape[1], state.tokens(), layer=call.layer), call)
        meeting.send(q, k, v)
        meeting.attend()
        meeting.send_back()
        return state.with_joint(self._after_attention(x, joined_heads(meeting.result()), mods))

    def forward(
        self,
        cx: torch.Tensor,
        global_cond: torch.Tensor,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Whole tokens [B, L, C], text first, and vector [B, C] -> [B, L, C]."""
        call = dit.call_of(transformer_options)
        state = dit.DiTState({"cx": cx}, {}, {"vec": global_cond})
        return self.forward_state(state.shard(call.plan), call).whole("cx")


class MMDiT(nn.Module):
    """The whole network, with ComfyUI's configuration names. max_seq: patches in the table of positions, a square."""

    positional_encoding: nn.Parameter
    register_tokens: nn.Parameter

    def __init__(
        self, in_channels: int = 4, out_channels: int = 4, patch_size: int = 2, dim: int = 3072, n_layers: int = 36,
        n_double_layers: int = 4, n_heads: int = 12, global_conddim: int = 3072, cond_seq_dim: int = 2048,
        max_seq: int = 32 * 32, dtype: Any = None, device: Any = None, operations: Any = None, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        operations = operations or comfy.ops.disable_weight_init
        place = {"dtype": dtype, "device": device}
        linear = functools.partial(operations.Linear, **place)
        self.dtype, self.patch_size = dtype, patch_size
        self.hidden_size, self.num_heads, self.out_channels = dim, n_heads, out_channels
        self.t_embedder = TimestepEmbedder(global_conddim, operations=operations, **place)
        self.cond_seq_linear = linear(cond_seq_dim, dim, bias=False)
        self.init_x_linear = linear(patch_size**2 * in_channels, dim)
        for name, count in (("positional_encoding", max_seq), ("register_tokens", REGISTERS)):
            table = torch.empty((1, count, dim), **place)
            setattr(self, name, nn.Parameter(table, requires_grad=False))
        options = {"operations": operations, **place}
        self.double_layers = nn.ModuleList(
            MMDiTBlock(dim, n_heads, global_conddim, **options) for _ in range(n_double_layers)
        )
        self.single_layers = nn.ModuleList(
            DiTBlock(dim, n_heads, global_conddim, **options) for _ in range(n_layers - n_double_layers)
        )
        self.final_linear = linear(dim, patch_size**2 * out_channels, bias=False)
        self.modF = _modulation(dim, global_conddim, 2, place, operations)

    def positions(self, rows: int, cols: int, like: torch.Tensor) -> torch.Tensor:
        """The middle of the table [1, rows * cols, C]; for a larger picture the table is enlarged first."""
        size = math.isqrt(self.positional_encoding.shape[1])
        table = comfy.ops.cast_to(self.positional_encoding, dtype=like.dtype, device=like.device)
        table = table.unflatten(1, (size, size))
        longest = max(rows, cols)
        if longest > size:
            table = F.interpolate(table.movedim(-1, 1), (longest, longest), mode="bilinear").movedim(1, -1)
            size = longest
        top, left = (size - rows) // 2, (size - cols) // 2
        return table[:, top : top + rows, left : left + cols].flatten(1, 2)

    def embed(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> dit.DiTState:
        """Padded latents [B, C, H, W], times [B] in 0..1, text [B, L, cond_seq_dim] -> whole state."""
        img = self.init_x_linear(to_patches(x, self.patch_size))
        img = img + self.positions(x.shape[2] // self.patch_size, x.shape[3] // self.patch_size, img)
        txt = self.cond_seq_linear(context)
        registers = comfy.ops.cast_to(self.register_tokens, dtype=txt.dtype, device=txt.device)
        txt = torch.cat((registers.expand(txt.shape[0], -1, -1), txt), dim=1)
        vec = self.t_embedder(timesteps.float() * 1000, dtype=x.dtype)
        return dit.DiTState({"txt": txt, "img": img}, {}, {"vec": vec})

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order."""
        kinds = (("double", self.double_layers, _DOUBLE), ("single", self.single_layers, _SINGLE))
        return tuple(
            dit.Block(f"{kind}_layers.{i}", block, arguments, i, replace_key=(f"{kind}_block", i))
            for kind, blocks, arguments in kinds
            for i, block in enumerate(blocks)
        )

    def prepared_layers(self, state: dit.DiTState) -> list[dit.PreparedLayer]:
        """All blocks' modulations: they need nothing but the time's vector [B, C]."""
        blocks = (*self.double_layers, *self.single_layers)
        mods = [m for block in blocks for name, m in block.named_children() if name.startswith("mod")]
        vec = state.sample["vec"]
        return [dit.PreparedLayer(m, 6 * self.hidden_size, functools.partial(m, vec)) for m in mods]

    def head(self, state: dit.DiTState) -> torch.Tensor:
        """Patches [B, L, patch^2 * out_channels], whole; the last tokens are modulated without a norm."""
        shift, scale = self.modF(state.sample["vec"]).unsqueeze(1).chunk(2, dim=-1)
        out = self.final_linear(state.streams["img"] * (1 + scale) + shift)
        return state.with_stream("img", out).whole("img")

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature)
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict the flow of latents x [B, C, H, W] at times [B] in 0..1 given text [B, L, cond_seq_dim]."""
        return comfy.ldm.common_dit.inside_wrappers(
            self, self._forward, transformer_options, x, timestep, context, control, transformer_options, **kwargs
        )

    def _forward(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, control: Any, options: Any, **kwargs: Any
    ) -> torch.Tensor:
        call = dit.call_of(options, control)
        padded = comfy.ldm.common_dit.pad_to_patch_size(x, (self.patch_size, self.patch_size))
        state = dit.run_blocks(self, self.embed(padded, timestep, context), call)
        out = to_picture(self.head(state), padded.shape[2] // self.patch_size, self.patch_size)
        return out[:, :, : x.shape[2], : x.shape[3]]
