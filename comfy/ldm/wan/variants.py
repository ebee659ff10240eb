"""Wan networks with a second input: VACE (Jiang et al. 2025) and camera paths (Wan Fun camera)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import comfy.ops
from comfy.ldm import dit
from comfy.ldm.common_dit import pad_to_patch_size

from .model import WanAttentionBlock, WanModel, block_state

_VACE = dit.BlockArguments(
    tokens={"c": ("vace",), "x": ("img",)},
    values={
        "e": "vec",
        "freqs": "pe",
        "context": "txt",
        "context_img_len": "context_img_len",
        "strengths": "strengths",
    },
    optional=frozenset({"context_img_len"}),
)


@dit.own_block
class VaceWanAttentionBlock(WanAttentionBlock):
    """A block on the control tokens; what it gives is added to the video tokens."""

    def __init__(self, cross_attn_type: str, block_id: int = 0, **settings: Any) -> None:
        super().__init__(cross_attn_type, **settings)
        operations, place = settings["operations"], {name: settings[name] for name in ("dtype", "device")}
        if block_id == 0:
            self.before_proj = operations.Linear(self.dim, self.dim, **place)
        self.after_proj = operations.Linear(self.dim, self.dim, **place)

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The streams `vace` [n * B, L, C] of n controls, one after the other, and `img` [B, L, C]."""
        control, x = state.streams["vace"], state.streams["img"]
        count = control.shape[0] // x.shape[0]
        repeated = {
            name: state.sample[name].repeat(count, *[1] * (state.sample[name].ndim - 1)) for name in ("txt", "vec")
        }
        control = self.on_tokens(control, state.replace(sample={**state.sample, **repeated}), call)
        for strength, hint in zip(state.sample["strengths"], self.after_proj(control).chunk(count)):
            x = x + hint * strength
        return state.replace(streams={"img": x, "vace": control})

    def forward(  # type: ignore[override]
        self,
        c: torch.Tensor,
        x: torch.Tensor,
        e: torch.Tensor,
        freqs: torch.Tensor,
        context: torch.Tensor,
        context_img_len: int | None = None,
        strengths: Any = (1.0,),
        transformer_options: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole control tokens c [n * B, L, C] and video tokens x [B, L, C] -> both; the rest as for a video block."""
        call = dit.call_of(transformer_options)
        state = block_state(x, e, freqs, context, context_img_len)
        sample = {**state.sample, "strengths": strengths}
        state = dit.DiTState({"img": x, "vace": c}, state.tokenwise, sample).shard(call.plan)
        state = self.forward_state(state, call)
        return state.whole("vace"), state.whole("img")


class VaceWanModel(WanModel):
    """Wan whose video is controlled by a second one (what to keep, what to change, where) through blocks of its own."""

    def __init__(
        self, model_type: str = "vace", vace_layers: int | None = None, vace_in_dim: int | None = None, **settings: Any
    ) -> None:
        super().__init__(model_type=model_type, **settings)
        layers = self.num_layers // 2 if vace_layers is None else vace_layers
        if layers < 1 or layers > self.num_layers:
            raise ValueError(f"{layers} VACE blocks do not fit {self.num_layers} blocks; the file is incomplete")
        self.vace_layers, self.vace_in_dim = layers, vace_in_dim or 96
        self.vace_blocks = nn.ModuleList(
            VaceWanAttentionBlock("t2v_cross_attn", block_id=i, **self.block_settings) for i in range(layers)
        )
        conv = type(self.patch_embedding)
        place = {name: self.block_settings[name] for name in ("dtype", "device")}
        self.vace_patch_embedding = conv(self.vace_in_dim, self.dim, self.patch_size, self.patch_size, **place)

    def embed(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, *args: Any, **kwargs: Any
    ) -> dit.DiTState:  # fmt: skip
        """As `WanModel.embed`, with the stream `vace` from `vace_context` [B, n, vace_in_dim, F, h, w]."""
        state = super().embed(x, t, context, *args, **kwargs)
        controls = kwargs.get("vace_context")
        if controls is None:
            return state
        flat = pad_to_patch_size(controls.movedim(0, 1).flatten(0, 1), self.patch_size)
        tokens = self.vace_patch_embedding(flat.float()).to(x.dtype).flatten(2).transpose(1, 2)
        video = state.streams["img"]
        if tokens.shape[1] != video.shape[1]:
            raise ValueError(
                f"the VACE control has {tokens.shape[1]} tokens and the video {video.shape[1]}; give the control node "
                "the size and length of the video's latent"
            )
        first: Any = self.vace_blocks[0]
        tokens = first.before_proj(tokens) + video.repeat(controls.shape[1], 1, 1)
        strengths = kwargs.get("vace_strength") or [1.0] * controls.shape[1]
        sample = {**state.sample, "strengths": strengths}
        return dit.DiTState({"img": video, "vace": tokens}, state.tokenwise, sample)

    def run(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The blocks; those of the control only when there is one."""
        blocks = self.block_list()
        if "vace" not in state.streams:
            blocks = tuple(block for block in blocks if not block.name.startswith("vace_blocks."))
        return dit.run_blocks(self, state, call, blocks)

    def block_list(self) -> tuple[dit.Block, ...]:
        """Each control block follows the video block to which its output is added."""
        step = self.num_layers // self.vace_layers
        out: list[dit.Block] = []
        for block in super().block_list():
            out.append(block)
            j, rest = divmod(block.index, step)
            if rest == 0 and j < self.vace_layers:
                out.append(dit.Block(f"vace_blocks.{j}", self.vace_blocks[j], _VACE, j, cacheable=False))
        return tuple(out)


class _ResidualBlock(nn.Module):
    """Two convolutions around a ReLU, added to their input [B, C, h, w]."""

    def __init__(self, dim: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.conv1 = operations.Conv2d(dim, dim, kernel_size=3, padding=1, **place)
        self.conv2 = operations.Conv2d(dim, dim, kernel_size=3, padding=1, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(torch.relu(self.conv1(x)))


class WanCamAdapter(nn.Module):
    """Plücker rays [B, in_dim, F, 8h, 8w] at pixel size -> [B, out_dim, F, h / patch, w / patch]."""

    shrink = 8

    def __init__(
        self, in_dim: int, out_dim: int, patch: tuple[int, int], num_residual_blocks: int = 1, dtype: Any = None,
        device: Any = None, operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.conv = operations.Conv2d(in_dim * self.shrink**2, out_dim, kernel_size=patch, stride=patch, **place)
        self.residual_blocks = nn.Sequential(
            *(_ResidualBlock(out_dim, place, operations) for _ in range(num_residual_blocks))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = x.transpose(1, 2)
        cells = nn.functional.pixel_unshuffle(frames.flatten(0, 1), self.shrink)
        out = self.residual_blocks(self.conv(cells))
        return out.unflatten(0, frames.shape[:2]).transpose(1, 2)


class CameraWanModel(WanModel):
    """Wan with a camera path."""

    def __init__(
        self, model_type: str = "camera", in_dim_control_adapter: int = 24, operations: Any = None, **settings: Any
    ) -> None:
        operations = operations or comfy.ops.disable_weight_init
        super().__init__(model_type=model_type, operations=operations, **settings)
        place = {name: self.block_settings[name] for name in ("dtype", "device")}
        rows, columns = self.patch_size[1:]
        self.control_adapter = WanCamAdapter(
            in_dim_control_adapter, self.dim, (rows, columns), operations=operations, **place
        )

    def patches(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        embedded = super().patches(x)
        rays = kwargs.get("camera_conditions")
        return embedded if rays is None else embedded + self.control_adapter(rays.to(embedded))
