"""Wan networks that are led by sound: S2V (Wan 2.2, Wan Team 2025) and HuMo (Chen et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops
from comfy.ldm import dit
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.modules.modulate import norm_modulate, spread_rows

from .frames import CausalConv1d, MotionEncoder, add_reached, attend, with_frames
from .model import WanAttentionBlock, WanModel, WanT2VCrossAttention, block_state

FRAMES_PER_LATENT = 4
_ADAPTIVE_EPS = 1e-5
_BUCKETS = (1, 2, 16)  # latent frames of the video before, from the last on, that are packed ever more tightly
_INJECTED = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
_HUMO_CHANNELS = 1536  # of tokens of sound
_ARGUMENTS = dit.BlockArguments(
    tokens={"x": ("img",)},
    values={
        "context": "frame_tokens",
        "mask": "frame_mask",
        "modulation": "frame_modulation",
        "frames": "frame",
        "reached": "reached",
    },
    optional=frozenset({"mask", "modulation", "frames", "reached"}),
)

# --- S2V --------------------------------------------------------------------------------------------------------------


class _SoundTokens(MotionEncoder):
    """States [B, t, in_dim] -> tokens of a frame [B, t / 4, heads + 1, C], and one vector [B, t / 4, C]."""

    def __init__(self, in_dim: int, dim: int, heads: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__(in_dim, (dim // 4, dim // 2, dim), heads, dim, place, operations)
        self.conv1_global = CausalConv1d(in_dim, dim // 4, 1, place, operations)
        self.final_linear = operations.Linear(dim, dim, **place)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole = self.final_linear(self.slower(self.conv1_global(states.transpose(1, 2))))
        return self.padded(self.by_head(states)), whole


class CausalAudioEncoder(nn.Module):
    """States of all layers of an audio encoder [B, layers, in_dim, t], weighted -> as `_SoundTokens`."""

    def __init__(self, in_dim: int, layers: int, dim: int, tokens: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.encoder = _SoundTokens(in_dim, dim, tokens, place, operations)
        self.weights = nn.Parameter(torch.empty(1, layers, 1, 1, **place), requires_grad=False)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = F.silu(comfy.ops.cast_to_input(self.weights, states, copy=False))
        mean = (states * weights / weights.sum(dim=1, keepdim=True)).sum(dim=1)
        return self.encoder(mean.transpose(1, 2))


class _Modulation(nn.Module):
    def __init__(self, dim: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.linear = operations.Linear(dim, 2 * dim, **place)


@dit.own_block
class SoundAttention(WanT2VCrossAttention):
    """Attention of video tokens to the sound of their frame, whose vector modulates them before."""

    def __init__(self, number: int, *args: Any) -> None:
        super().__init__(*args)
        self.number = number

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The stream `img` with what the sound adds to the video's tokens."""
        x = state.streams["img"]
        rows = state.sample["frame_modulation"][:, self.number]
        shift, scale = (spread_rows(part, state.local("frame")) for part in rows.chunk(2, dim=-1))
        q = self.normed(self.norm_q, self.q(norm_modulate(x, scale, shift, _ADAPTIVE_EPS)))
        ((k, v),) = self.keys(state.sample["frame_tokens"], None)
        return state.with_stream("img", add_reached(x, self.o(attend(q, k, v, self.num_heads, state, call)), state))

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor | None = None,
        modulation: torch.Tensor | None = None,
        frames: torch.Tensor | None = None,
        reached: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Whole video tokens x [B, L, C] of `frames` [L], tokens of the sound [B, F * n, C] that the mask [1, L, F * n]
        lets them see, and modulation [B, layers, F, 2 C] -> x with what the sound adds where `reached` [L, 1] is 1.
        """
        if modulation is None or frames is None:
            raise ValueError("attention to sound needs the modulation of each frame, and the frames of the tokens")
        call = dit.call_of(transformer_options)
        sample = {"frame_tokens": context, "frame_mask": mask, "frame_modulation": modulation}
        axes = {"frame": frames} if reached is None else {"frame": frames, "reached": reached}
        tokenwise = {name: dit.TokenAxis(value, ("img",), 0) for name, value in axes.items()}
        state = dit.DiTState({"img": x}, tokenwise, sample)
        return self.forward_state(state.shard(call.plan), call).whole("img")


class AudioInjector(nn.Module):
    """One `SoundAttention` for each of some of the blocks, and the layers that make modulation of the sound's vectors."""

    def __init__(self, count: int, settings: dict[str, Any], place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        dim = settings["dim"]
        shared = (dim, settings["num_heads"], True, settings["eps"], place, operations)
        self.injector = nn.ModuleList(SoundAttention(i, *shared) for i in range(count))
        self.injector_adain_layers = nn.ModuleList(_Modulation(dim, place, operations) for _ in range(count))

    def modulation(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors of frames [B, F, C] -> [B, layers, F, 2 C]."""
        active = F.silu(vectors)
        layers: Any = self.injector_adain_layers
        return torch.stack([layer.linear(active) for layer in layers], dim=1)


class FramePacker(nn.Module):
    """The video before, in patches that grow with its age."""

    def __init__(self, dim: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        for name, size in (("proj", (1, 2, 2)), ("proj_2x", (2, 4, 4)), ("proj_4x", (4, 8, 8))):
            setattr(self, name, operations.Conv3d(16, dim, kernel_size=size, stride=size, **place))

    def forward(self, latent: torch.Tensor, network: WanModel) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, 16, F, h, w] -> tokens [B, n, C] and their rotary table [1, n, 1, D/2, 2, 2]."""
        total = sum(_BUCKETS)
        latent = latent[:, :, -total:]
        height, width = latent.shape[3:]
        latent = F.pad(latent, (0, 0, 0, 0, total - latent.shape[2], 0))
        tokens, tables, end = [], [], total
        for frames, name in zip(_BUCKETS, ("proj", "proj_2x", "proj_4x")):
            start = end - frames
            patches = getattr(self, name)(latent[:, :, start:end])
            tables.append(
                network.rope_encode(
                    patches.shape[2], height, width, t_start=start - total, steps_h=patches.shape[3],
                    steps_w=patches.shape[4], device=latent.device,
                )
            )  # fmt: skip
            tokens.append(patches.flatten(2).transpose(1, 2))
            end = start
        return torch.cat(tokens, dim=1), torch.cat(tables, dim=1)


class WanModel_S2V(WanModel):  # noqa: N801 (ComfyUI's name)
    """Wan whose video follows a sound; a reference picture and the video before are tokens after it."""

    references_first = False

    def __init__(
        self, model_type: str = "s2v", audio_dim: int = 1024, audio_layers: int = 25, num_audio_token: int = 4,
        cond_dim: int = 16, audio_inject_layers: Sequence[int] = _INJECTED, operations: Any = None, **settings: Any,
    ) -> None:  # fmt: skip
        operations = operations or comfy.ops.disable_weight_init
        super().__init__(model_type=model_type, operations=operations, **settings)
        place = {name: self.block_settings[name] for name in ("dtype", "device")}
        self.injected = {block: i for i, block in enumerate(audio_inject_layers)}
        self.trainable_cond_mask = operations.Embedding(3, self.dim, **place)
        self.casual_audio_encoder = CausalAudioEncoder(
            audio_dim, audio_layers, self.dim, num_audio_token, place, operations
        )
        self.cond_encoder = operations.Conv3d(cond_dim, self.dim, self.patch_size, self.patch_size, **place)
        self.audio_injector = AudioInjector(len(self.injected), self.block_settings, place, operations)
        self.frame_packer = FramePacker(self.dim, place, operations)

    def patches(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        embedded = super().patches(x)
        control = kwargs.get("control_video")
        if control is None:
            return embedded
        return embedded + self.cond_encoder(pad_to_patch_size(control.to(embedded), self.patch_size))

    def _after(
        self, x: torch.Tensor, kinds: torch.Tensor, **kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
        """Tokens and rotary tables of what comes after the video, and for how many rows of modulation each counts."""
        tokens, tables, rows = [], [], []
        reference, before = kwargs.get("reference_latent"), kwargs.get("reference_motion")
        if reference is not None:
            padded = pad_to_patch_size(reference.to(x), self.patch_size)
            tokens.append(super().patches(padded).flatten(2).transpose(1, 2) + kinds[1])
            start = max(30, x.shape[2] + 9)
            frames, height, width = padded.shape[2:]
            tables.append(self.rope_encode(frames, height, width, t_start=start, device=x.device))
            rows.append(frames)
        if before is not None:
            packed, table = self.frame_packer(before.to(x), self)
            tokens.append(packed + kinds[2])
            tables.append(table)
            rows.append(3)
        return tokens, tables, rows

    def embed(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, clip_fea: torch.Tensor | None = None,
        freqs: torch.Tensor | None = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ) -> dit.DiTState:  # fmt: skip
        """As `WanModel.embed`. audio_embed [B, layers, audio_dim, 4 F]: states of sound; control_video, reference_latent,
        reference_motion: latents.
        """
        kinds = comfy.ops.cast_to_input(self.trainable_cond_mask.weight, x)
        video = self.patches(x, **kwargs).flatten(2).transpose(1, 2) + kinds[0]
        if freqs is None:
            frames, height, width = x.shape[2:]
            freqs = self.rope_encode(frames, height, width, device=x.device, transformer_options=transformer_options)
        tokens, tables, rows = self._after(x, kinds, **kwargs)
        # Times are by latent frame; what comes after the video is at time 0. The video before has half as many tokens a row.
        times = t.unsqueeze(1).expand(-1, x.shape[2]) if t.ndim == 1 else t
        before = kwargs.get("reference_motion") is not None
        still = [times.new_zeros((times.shape[0], count)) for count in rows]
        if before:
            last = still.pop()
            times = torch.cat((torch.cat((times, *still), dim=1).repeat_interleave(2, dim=1), last), dim=1)
        else:
            times = torch.cat((times, *still), dim=1)
        features = timestep_embedding(times.flatten(), self.freq_dim, time_factor=1.0).to(video.dtype)
        e = self.time_embedding(features).unflatten(0, (times.shape[0], -1))
        e0 = self.time_projection(e).unflatten(-1, (6, self.dim))
        state = block_state(
            torch.cat((video, *tokens), dim=1),
            e0,
            torch.cat((freqs, *tables), dim=1),
            self.text_embedding(context),
            None,
        )
        state = state.replace(sample={**state.sample, "time": e})
        sound = kwargs.get("audio_embed")
        if sound is None:
            return state
        wanted = x.shape[2] * FRAMES_PER_LATENT
        sound = sound[..., :wanted].to(x)
        local, vectors = self.casual_audio_encoder(F.pad(sound, (0, wanted - sound.shape[-1])))
        state = with_frames(state, local, video.shape[1])
        return state.replace(
            sample={**state.sample, "frame_modulation": self.audio_injector.modulation(vectors)}
        )  # fmt: skip

    def run(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The blocks; those of the sound only where there is one."""
        blocks = self.block_list() if "frame_tokens" in state.sample else super().block_list()
        return dit.run_blocks(self, state, call, blocks)

    def block_list(self) -> tuple[dit.Block, ...]:
        """Attention to the sound follows some of the video's blocks."""
        out: list[dit.Block] = []
        for block in super().block_list():
            out.append(block)
            i = self.injected.get(block.index)
            if i is not None:
                module = self.audio_injector.injector[i]
                name = f"audio_injector.injector.{i}"
                out.append(dit.Block(name, module, _ARGUMENTS, i, cost=0.2, cacheable=False))
        return tuple(out)


# --- HuMo -------------------------------------------------------------------------------------------------------------


class _WithLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class AudioProjModel(nn.Module):
    """States of sound around each latent frame [B, F, 8, 5, 1280] -> tokens [B, F, n, C]."""

    audio_proj_glob_3: _WithLayer

    def __init__(self, states: int, inner: int, dim: int, tokens: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.tokens = tokens
        sizes = ((states, inner), (inner, inner), (inner, tokens * dim))
        for i, (a, b) in enumerate(sizes, start=1):
            setattr(self, f"audio_proj_glob_{i}", _WithLayer(operations.Linear(a, b, **place)))
        self.audio_proj_glob_norm = _WithLayer(operations.LayerNorm(dim, **place))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        x = states.flatten(2)
        for name in ("audio_proj_glob_1", "audio_proj_glob_2"):
            x = torch.relu(getattr(self, name).layer(x))
        x = self.audio_proj_glob_3.layer(x).unflatten(-1, (self.tokens, -1))
        return self.audio_proj_glob_norm.layer(x)


class _SoundCrossAttention(WanT2VCrossAttention):
    """Attention to tokens of sound, which have other channels."""

    def __init__(
        self,
        dim: int,
        sound_dim: int,
        num_heads: int,
        qk_norm: bool,
        eps: float,
        place: dict[str, Any],
        operations: Any,
    ) -> None:
        super().__init__(dim, num_heads, qk_norm, eps, place, operations)
        for name in "kv":
            setattr(self, name, operations.Linear(sound_dim, dim, **place))


class _SoundWrapper(nn.Module):
    def __init__(self, settings: dict[str, Any], sound_dim: int) -> None:
        super().__init__()
        dim, eps, operations = settings["dim"], settings["eps"], settings["operations"]
        place = {name: settings[name] for name in ("dtype", "device")}
        self.audio_cross_attn = _SoundCrossAttention(
            dim, sound_dim, settings["num_heads"], settings["qk_norm"], eps, place, operations
        )
        self.norm1_audio = operations.LayerNorm(dim, eps, elementwise_affine=True, **place)


@dit.own_block
class WanAttentionBlockAudio(WanAttentionBlock):
    """A block with attention to the sound of its frame between those to text and the MLP."""

    def __init__(self, cross_attn_type: str, **settings: Any) -> None:
        super().__init__(cross_attn_type, **settings)
        self.audio_cross_attn_wrapper = _SoundWrapper(settings, _HUMO_CHANNELS)

    def _rest(
        self, x: torch.Tensor, out: torch.Tensor, mlp: Sequence[torch.Tensor], state: dit.DiTState,
        call: dit.DenoiserCall,
    ) -> torch.Tensor:  # fmt: skip
        if "frame_tokens" not in state.sample:
            return super()._rest(x, out, mlp, state, call)
        x = x + self.cross_attn.o(out)
        attn = self.audio_cross_attn_wrapper.audio_cross_attn
        q = attn.normed(attn.norm_q, attn.q(self.audio_cross_attn_wrapper.norm1_audio(x)))
        ((k, v),) = attn.keys(state.sample["frame_tokens"], None)
        return self._feed(x + attn.o(attend(q, k, v, self.num_heads, state, call)), *mlp)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        e: torch.Tensor,
        freqs: torch.Tensor,
        context: torch.Tensor,
        context_img_len: int | None = None,
        audio: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """As `WanAttentionBlock.forward`; audio: tokens [B, F, n, 1536] of the sound of F frames."""
        call = dit.call_of(transformer_options)
        state = block_state(x, e, freqs, context, context_img_len)
        if audio is not None:
            state = with_frames(state, audio)
        return self.forward_state(state.shard(call.plan), call).whole("img")


_HUMO_ARGUMENTS = dit.BlockArguments(
    tokens={"img": ("img",)},
    values={"txt": "txt", "vec": "vec", "pe": "pe"},
    optional=frozenset({"context_img_len", "audio"}),
    first="img",
    renamed={"txt": "context", "vec": "e", "pe": "freqs"},
    hidden={"context_img_len": "context_img_len", "audio": "sound"},
)


class HumoWanModel(WanModel):
    """Wan whose video follows a sound and shows the subject of a picture, which is a frame after it."""

    references_first = False
    block_class = WanAttentionBlockAudio
    arguments = _HUMO_ARGUMENTS

    def __init__(
        self, model_type: str = "humo", audio_token_num: int = 16, audio_states: int = 8 * 5 * 1280,
        audio_inner: int = 512, operations: Any = None, **settings: Any,
    ) -> None:  # fmt: skip
        operations = operations or comfy.ops.disable_weight_init
        super().__init__(model_type=model_type, operations=operations, **settings)
        place = {name: self.block_settings[name] for name in ("dtype", "device")}
        self.audio_proj = AudioProjModel(audio_states, audio_inner, _HUMO_CHANNELS, audio_token_num, place, operations)

    def embed(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> dit.DiTState:
        """As `WanModel.embed`; audio_embed [B, F, 8, 5, 1280]: states of sound around each latent frame."""
        reference = kwargs.pop("reference_latent", None)
        state = super().embed(x, *args, **kwargs)
        frames = x.shape[2]
        if reference is not None:
            padded = pad_to_patch_size(reference.to(x), self.patch_size)
            tokens = torch.cat((state.streams["img"], self.patches(padded).flatten(2).transpose(1, 2)), dim=1)
            more, height, width = padded.shape[2:]
            table = self.rope_encode(more, height, width, t_start=frames, device=x.device)
            freqs = torch.cat((state.tokenwise["pe"].value, table), dim=1)
            sample = state.sample
            state = block_state(tokens, sample["vec"], freqs, sample["txt"], sample["context_img_len"])
            state = state.replace(sample={**state.sample, "time": sample["time"]})
            frames += more
        states = kwargs.get("audio_embed")
        if states is None:
            return state
        states = states[:, : x.shape[2]].to(x)  # there is silence in the picture, and where the sound has ended
        states = F.pad(states, (0, 0, 0, 0, 0, 0, 0, frames - states.shape[1]))
        sound = self.audio_proj(states)
        state = with_frames(state, sound)
        return state.replace(sample={**state.sample, "sound": sound})
