"""Wan 2.2 Animate (Wan Team 2025): a character in the motion of a body, as a latent, and of a face, as pictures.

Motion of a face is what an encoder with StyleGAN 2's layers (Karras et al. 2020) finds in its pictures, as a sum of
directions (LIA, Wang et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops
from comfy.ldm import dit
from comfy.ldm.common_dit import pad_to_patch_size

from .frames import MotionEncoder, attend, with_frames
from .model import WanModel, heads_of

_ARGUMENTS = dit.BlockArguments(
    tokens={"x": ("img",)}, values={"motion_vec": "frame_tokens", "mask": "frame_mask"}, optional=frozenset({"mask"})
)
_EVERY = 5  # blocks between two of the face
_AT_ONCE = 8  # pictures of faces


def _cast(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return comfy.ops.cast_to_input(weight, x, copy=False)


class _Convolution(nn.Module):
    """A convolution whose weights are kept at variance 1 and scaled when used."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel: int, stride: int, padding: int, place: dict[str, Any]
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, kernel, kernel, **place), requires_grad=False)
        self.scale, self.stride, self.padding = 1 / math.sqrt(in_dim * kernel**2), stride, padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, _cast(self.weight, x) * self.scale, stride=self.stride, padding=self.padding)


class _Linear(nn.Module):
    """A linear whose weights are kept at variance 1."""

    def __init__(self, in_dim: int, out_dim: int, place: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, **place), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_dim, **place), requires_grad=False)
        self.scale = 1 / math.sqrt(in_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _cast(self.weight, x) * self.scale, _cast(self.bias, x))


class _Activation(nn.Module):
    """A bias, leaky ReLU, and the scale that keeps the variance."""

    def __init__(self, channels: int, place: dict[str, Any]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1, channels, 1, 1, **place), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x + _cast(self.bias, x), 0.2) * 2**0.5


class _Blur(nn.Module):
    """A binomial filter of 4 x 4 pixels over each channel, before every second pixel is taken."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = torch.arange(4, device=x.device)  # no copy from the host, which would break the capture of the call
        row = 1 + 2 * ((place == 1) | (place == 2)).to(x.dtype)
        weight = (row[:, None] * row / 64).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, weight, padding=self.padding, groups=x.shape[1])


def _halving(in_dim: int, out_dim: int, kernel: int, place: dict[str, Any]) -> list[nn.Module]:
    return [_Blur(kernel // 2 + 1), _Convolution(in_dim, out_dim, kernel, 2, 0, place)]


class _ResBlock(nn.Module):
    """[B, in_dim, H, W] -> [B, out_dim, H / 2, W / 2]."""

    def __init__(self, in_dim: int, out_dim: int, place: dict[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(_Convolution(in_dim, in_dim, 3, 1, 1, place), _Activation(in_dim, place))
        self.conv2 = nn.Sequential(*_halving(in_dim, out_dim, 3, place), _Activation(out_dim, place))
        self.skip = nn.Sequential(*_halving(in_dim, out_dim, 1, place))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / 2**0.5


class _Appearance(nn.Module):
    """Pictures [B, 3, H, W] with sides of 4 pixels, twice as many for each further width, -> [B, style]."""

    def __init__(self, widths: Sequence[int], style: int, place: dict[str, Any]) -> None:
        super().__init__()
        first = nn.Sequential(_Convolution(3, widths[0], 1, 1, 0, place), _Activation(widths[0], place))
        blocks = [_ResBlock(a, b, place) for a, b in zip(widths, widths[1:])]
        self.convs = nn.ModuleList([first, *blocks, _Convolution(widths[-1], style, 4, 1, 0, place)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.convs:
            x = layer(x)
        return x.flatten(1)


class _MotionNetwork(nn.Module):
    def __init__(self, widths: Sequence[int], style: int, motions: int, place: dict[str, Any]) -> None:
        super().__init__()
        self.net_app = _Appearance(widths, style, place)
        self.fc = nn.Sequential(*[_Linear(style, style, place) for _ in range(4)], _Linear(style, motions, place))


class _Direction(nn.Module):
    def __init__(self, style: int, motions: int, place: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(style, motions, **place), requires_grad=False)


class _Directions(nn.Module):
    def __init__(self, style: int, motions: int, place: dict[str, Any]) -> None:
        super().__init__()
        self.direction = _Direction(style, motions, place)


class FaceMotion(nn.Module):
    """Pictures of a face [B, 3, 512, 512] in -1..1 -> its motion [B, style], a sum of orthogonal directions."""

    def __init__(self, widths: Sequence[int], style: int, place: dict[str, Any], motions: int = 20) -> None:
        super().__init__()
        self.enc = _MotionNetwork(widths, style, motions, place)
        self.dec = _Directions(style, motions, place)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        amounts = self.enc.fc(self.enc.net_app(pictures))
        weight = _cast(self.dec.direction.weight, pictures)
        stable = weight + 1e-8 * torch.eye(*weight.shape, dtype=weight.dtype, device=weight.device)
        directions = torch.linalg.qr(stable.float()).Q
        return amounts @ directions.T.to(amounts)


class FaceEncoder(MotionEncoder):
    """Motions [B, T, in_dim] -> tokens [B, T / 4, 5, C]."""

    def __init__(self, in_dim: int, hidden: int, dim: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__(in_dim, (hidden, hidden, hidden), 4, dim, place, operations)
        self.out_proj = operations.Linear(hidden, dim, **place)

    def forward(self, motions: torch.Tensor) -> torch.Tensor:
        return self.padded(self.out_proj(self.by_head(motions)))


@dit.own_block
class FaceBlock(nn.Module):
    """Attention of video tokens to the face of their frame."""

    def __init__(self, dim: int, heads: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.heads_num = heads
        self.linear1_kv = operations.Linear(dim, 2 * dim, **place)
        self.linear1_q = operations.Linear(dim, dim, **place)
        self.linear2 = operations.Linear(dim, dim, **place)
        self.q_norm = operations.RMSNorm(dim // heads, eps=1e-6, **place)
        self.k_norm = operations.RMSNorm(dim // heads, eps=1e-6, **place)

    def _added(self, x: torch.Tensor, faces: torch.Tensor, state: dit.DiTState, call: dit.DenoiserCall) -> torch.Tensor:
        x, faces = (F.layer_norm(part, part.shape[-1:], eps=1e-6) for part in (x, faces))
        k, v = (heads_of(part, self.heads_num) for part in self.linear1_kv(faces).chunk(2, dim=-1))
        q = heads_of(self.linear1_q(x), self.heads_num)
        return self.linear2(attend(self.q_norm(q), self.k_norm(k), v, self.heads_num, state, call))

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The stream `img` with what the faces add."""
        x = state.streams["img"]
        return state.with_stream("img", x + self._added(x, state.sample["frame_tokens"], state, call))

    def forward(
        self,
        x: torch.Tensor,
        motion_vec: torch.Tensor,
        mask: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Whole video tokens x [B, L, C] and tokens of all faces [B, F * n, C], of which the mask [1, L, F * n] says who
        sees what, -> x with what the faces add.
        """
        call = dit.call_of(transformer_options)
        state = dit.DiTState({"img": x}, {}, {"frame_tokens": motion_vec, "frame_mask": mask})
        return self.forward_state(state.shard(call.plan), call).whole("img")


class FaceAdapter(nn.Module):
    def __init__(self, dim: int, heads: int, layers: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.fuser_blocks = nn.ModuleList(FaceBlock(dim, heads, place, operations) for _ in range(layers))


class AnimateWanModel(WanModel):
    """Wan whose video has the motion of a body (`pose_latents`) and of a face (`face_pixel_values`)."""

    def __init__(
        self, model_type: str = "animate", motion_encoder_dim: int = 512, face_hidden: int = 1024,
        face_widths: Sequence[int] = (32, 64, 128, 256, 512, 512, 512, 512), operations: Any = None, **settings: Any,
    ) -> None:  # fmt: skip
        operations = operations or comfy.ops.disable_weight_init
        super().__init__(model_type=model_type, operations=operations, **settings)
        place = {name: self.block_settings[name] for name in ("dtype", "device")}
        self.pose_patch_embedding = operations.Conv3d(16, self.dim, self.patch_size, self.patch_size, **place)
        self.motion_encoder = FaceMotion(face_widths, motion_encoder_dim, place)
        layers = -(-self.num_layers // _EVERY)
        self.face_adapter = FaceAdapter(self.dim, self.num_heads, layers, place, operations)
        self.face_encoder = FaceEncoder(motion_encoder_dim, face_hidden, self.dim, place, operations)

    def patches(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        embedded = super().patches(x)
        pose = kwargs.get("pose_latents")
        if pose is None:
            return embedded
        motion = self.pose_patch_embedding(pad_to_patch_size(pose.to(embedded), self.patch_size))
        motion = motion[:, :, : embedded.shape[2] - 1]  # the first frame is the character's picture
        return embedded + F.pad(motion, (0, 0, 0, 0, 1, embedded.shape[2] - 1 - motion.shape[2]))

    def faces(self, pixels: torch.Tensor, frames: int) -> torch.Tensor:
        """Pictures of the face [B, 3, T, H, W] -> tokens [B, frames, n, C]; zeros for the first frame and after the last."""
        pictures = pixels.transpose(1, 2).flatten(0, 1)
        motions = torch.cat([self.motion_encoder(some) for some in pictures.split(_AT_ONCE)])
        tokens = self.face_encoder(motions.unflatten(0, (pixels.shape[0], -1)))[:, : frames - 1]
        return F.pad(tokens, (0, 0, 0, 0, 1, frames - 1 - tokens.shape[1]))

    def embed(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> dit.DiTState:
        """As `WanModel.embed`, with tokens of faces where there is a video of one."""
        state = super().embed(x, *args, **kwargs)
        pixels = kwargs.get("face_pixel_values")
        return state if pixels is None else with_frames(state, self.faces(pixels.to(x), x.shape[2]))

    def run(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The blocks; those of the face only where there is one."""
        blocks = self.block_list()
        if "frame_tokens" not in state.sample:
            blocks = super().block_list()
        return dit.run_blocks(self, state, call, blocks)

    def block_list(self) -> tuple[dit.Block, ...]:
        """A block of the face follows every fifth block of the video, beginning with the first."""
        out: list[dit.Block] = []
        for block in super().block_list():
            out.append(block)
            j, rest = divmod(block.index, _EVERY)
            if rest == 0:
                face = self.face_adapter.fuser_blocks[j]
                out.append(dit.Block(f"face_adapter.fuser_blocks.{j}", face, _ARGUMENTS, j, cost=0.2, cacheable=False))
        return tuple(out)
