"""The network of a made-up family, Pebble: image tokens attend to each other with shared key heads, then to the prompt.

It is the example of docs/adding_a_model.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import comfy.ops
import comfy.patcher_extension
from comfy.ldm import dit
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.flux.math import apply_rope, rope
from comfy.ldm.modules.attention import AttentionSpec, attention, joined_heads, meet
from comfy.ldm.modules.modulate import add_gated, norm_modulate

_ARGUMENTS = dit.BlockArguments(
    tokens={"img": ("img",)},
    values={"txt": "txt", "vec": "vec", "pe": "pe", "mask": "mask"},
    optional=frozenset({"mask"}),
)


def _heads(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, L, H * size] -> [B, H, L, size], of as many heads as there are here."""
    return x.unflatten(-1, (x.shape[-1] // size, size)).transpose(1, 2)


@dit.own_block
class PebbleBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, MLP; modulated by the time (Peebles & Xie 2022)."""

    def __init__(self, dim: int, heads: int, kv_heads: int, **place: Any) -> None:
        super().__init__()
        operations = place.pop("operations")
        self.heads, self.kv_heads, self.size = heads, kv_heads, dim // heads
        kv = 2 * kv_heads * (dim // heads)
        sizes = {
            "mod": (dim, 6 * dim), "q": (dim, dim), "kv": (dim, kv), "out": (dim, dim), "cross_q": (dim, dim),
            "cross_kv": (dim, 2 * dim), "cross_out": (dim, dim), "up": (dim, 3 * dim), "down": (3 * dim, dim),
        }  # fmt: skip
        for name, (inner, outer) in sizes.items():
            setattr(self, name, operations.Linear(inner, outer, **place))

    @dit.stage
    def _into_attention(self, x: torch.Tensor, shift: Any, scale: Any, pe: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [B, L, C] -> q [B, H, L, D], k and v [B, KV, L, D]."""
        normed = norm_modulate(x, scale, shift)
        k, v = self.kv(normed).chunk(2, dim=-1)
        q, k = apply_rope(_heads(self.q(normed), self.size), _heads(k, self.size), pe)
        return q, k, _heads(v, self.size)

    @dit.stage
    def _mlp(self, x: torch.Tensor, mod: tuple[torch.Tensor, ...]) -> torch.Tensor:
        shift, scale, gate = mod
        return add_gated(x, self.down(nn.functional.gelu(self.up(norm_modulate(x, scale, shift)))), gate)

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The block on this rank's image tokens."""
        x, txt = state.streams["img"], state.sample["txt"]
        shift, scale, gate, *mlp = self.mod(state.sample["vec"]).unsqueeze(1).chunk(6, dim=-1)
        image, text = state.tokens("img"), dit.Tokens((txt.shape[1],))
        q, k, v = self._into_attention(x, shift, scale, state.local("pe"))
        meeting = meet(AttentionSpec(q.shape[1], image, kv_heads=k.shape[1], layer=call.layer), call)
        meeting.send(q, k, v)
        k, v = (_heads(t, self.size) for t in self.cross_kv(txt).chunk(2, dim=-1))  # while tokens travel
        meeting.attend()
        meeting.send_back()
        x = add_gated(x, self.out(joined_heads(meeting.result())), gate)
        q = _heads(self.cross_q(x), self.size)
        spec = AttentionSpec(q.shape[1], image, text, mask=state.sample.get("mask"))
        x = x + self.cross_out(attention(q, k, v, spec, call))
        return state.with_stream("img", self._mlp(x, tuple(mlp)))

    def forward(
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        vec: torch.Tensor,
        pe: torch.Tensor,
        mask: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """The entrance for foreign code: whole img [B, L, C] -> [B, L, C]."""
        call = dit.call_of(transformer_options)
        axes = {"pe": dit.TokenAxis(pe, ("img",), 2, inside=True)}
        state = dit.DiTState({"img": img}, axes, {"txt": txt, "vec": vec, "mask": mask})
        return self.forward_state(state.shard(call.plan), call).whole("img")


class Pebble(nn.Module):
    """The whole network."""

    def __init__(self, image_model=None, hidden_size=96, num_heads=4, kv_heads=2, depth=2, channels=4, text_size=40,
                 dtype=None, device=None, operations=None, **unused: Any) -> None:  # fmt: skip
        super().__init__()
        operations = operations or comfy.ops.disable_weight_init
        place = {"dtype": dtype, "device": device}
        self.dtype, self.hidden_size, self.num_heads, self.patch_size = dtype, hidden_size, num_heads, 2
        self.pebble_in = operations.Linear(channels * 4, hidden_size, **place)
        self.txt_in = operations.Linear(text_size, hidden_size, **place)
        self.time_in = operations.Linear(1, hidden_size, **place)
        self.blocks = nn.ModuleList(
            PebbleBlock(hidden_size, num_heads, kv_heads, operations=operations, **place) for _ in range(depth)
        )
        self.out = operations.Linear(hidden_size, channels * 4, **place)

    def embed(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
    ) -> dit.DiTState:
        """Padded latents [B, C, H, W], text [B, L, text_size], mask of the text [B, L] -> whole state."""
        rows, cols = x.shape[2] // 2, x.shape[3] // 2
        patches = x.unflatten(3, (cols, 2)).unflatten(2, (rows, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        ids = torch.arange(rows * cols, device=x.device)
        half = self.hidden_size // self.num_heads // 2
        tables = [rope(places, half, 10000) for places in (ids // cols, ids % cols)]
        return dit.DiTState(
            streams={"img": self.pebble_in(patches)},
            tokenwise={"pe": dit.TokenAxis(torch.cat(tables, dim=-3)[None, None], ("img",), 2, inside=True)},
            sample={
                "txt": self.txt_in(context),
                "vec": nn.functional.silu(self.time_in(timestep[:, None].to(x))),
                "mask": None if mask is None else mask.unsqueeze(1) > 0.5,
            },
        )

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order, and what custom nodes may do to each."""
        return tuple(
            dit.Block(
                f"blocks.{i}", block, _ARGUMENTS, i, replace_key=("double_block", i), patches_after=("double_block",),
                residual=dit.Residual("img", "input", i),
            )
            for i, block in enumerate(self.blocks)
        )  # fmt: skip

    def head(self, state: dit.DiTState) -> torch.Tensor:
        """Patches [B, L, 4 * C], whole."""
        return state.with_stream("img", self.out(state.streams["img"])).whole("img")

    def forward(self, x, timestep, context=None, attention_mask=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        """Predict the flow of latents x [B, C, H, W] at times [B] given text [B, L, text_size]."""
        wrappers = comfy.patcher_extension.get_all_wrappers("diffusion_model", transformer_options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, attention_mask, control, transformer_options, **kwargs)

    def _forward(self, x, timestep, context, attention_mask, control, transformer_options, **kwargs):
        call = dit.call_of(transformer_options, control)
        padded = pad_to_patch_size(x, (2, 2))
        state = dit.run_blocks(self, self.embed(padded, timestep, context, attention_mask), call)
        rows, cols = padded.shape[2] // 2, padded.shape[3] // 2
        out = self.head(state).unflatten(1, (rows, cols)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        return out.flatten(4, 5).flatten(2, 3)[:, :, : x.shape[2], : x.shape[3]]
