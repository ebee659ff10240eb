"""Videos to latents and back: what `comfy.vae.VAE` does with the weights of a video VAE.

Frames are a batch of pictures [T, H, W, 3], or [B, T, H, W, 3]; latents are [B, C, t, h, w].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import comfy.model_management as model_management
import comfy.utils
from comfy.missing import FeatureMissingError
from comfy.taco_dit.core.spread import rows_over, spread_pictures, spread_rounds

Bytes = Callable[[Sequence[int]], float]
Each = Callable[..., Iterable[torch.Tensor]]
_FALLBACK_PIXELS = 256  # side of a tile when memory did not suffice for the whole
_HALF = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class VideoFormat:
    """A kind of video VAE.

    make: the network, without weights. time: frames of the video for each latent frame after the first. space: pixels a
    cell and side. encode_bytes, decode_bytes: activations per byte of the dtype, of pixels [B, 3, T, H, W] and of latents
    [B, C, t, h, w], as ComfyUI estimates them for these networks.
    """

    make: Callable[[], torch.nn.Module]
    latent_channels: int
    out_channels: int
    time: int
    space: int
    encode_bytes: Bytes
    decode_bytes: Bytes
    working_dtypes: tuple[torch.dtype, ...] = _HALF

    def frames(self, latents: int) -> int:
        """Frames of the video that so many latent frames give."""
        return max(0, latents * self.time - (self.time - 1))

    def latents(self, frames: int) -> int:
        """Latent frames of a video."""
        return max(0, (frames + self.time - 1) // self.time)

    @property
    def upscale(self) -> tuple[Any, int, int]:
        """By axis, latent -> video, as `tiled_scale_multidim` takes it."""
        return self.frames, self.space, self.space

    @property
    def downscale(self) -> tuple[Any, int, int]:
        """By axis, video -> latent."""
        return self.latents, self.space, self.space


def _wan(sd: dict[str, torch.Tensor]) -> VideoFormat | None:
    from comfy.ldm.wan import vae

    config = vae.config_from_state_dict(sd)
    if config is None:
        return None
    encode, decode, space = (3300, 8000, 16) if config["residual"] else (6000, 7000, 8)
    return VideoFormat(
        lambda: vae.WanVAE(**config), config["z_dim"], config["conv_out_channels"], 4, space,
        lambda shape: encode * shape[3] * shape[4], lambda shape: decode * shape[3] * shape[4] * space**2,
    )  # fmt: skip


def _hunyuan(sd: dict[str, torch.Tensor]) -> VideoFormat | None:
    from comfy.ldm.hunyuan_video import vae

    config = vae.config_from_state_dict(sd)
    if config is None:
        return None
    embed = sd["post_quant_conv.weight"].shape[1]
    return VideoFormat(
        lambda: vae.HunyuanVideoVAE(config, embed), embed, config["out_ch"], 4, 8,
        lambda shape: 900 * max(shape[2], 2) * shape[3] * shape[4],
        lambda shape: 1500 * shape[2] * shape[3] * shape[4] * 4 * 64,
    )  # fmt: skip


# Kinds that are recognised only: a key that tells them, and what is missing.
_ABSENT = (
    ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", "the VAE of LTX-Video"),
    ("decoder.up.0.upsample.conv.conv.weight", "the VAE of HunyuanVideo 1.5 and of HunyuanImage's refiner"),
)


def find(sd: dict[str, torch.Tensor]) -> VideoFormat | None:
    """The kind of video VAE that these weights are of, or None.

    Raises FeatureMissingError for kinds that are not in this version.
    """
    for key, name in _ABSENT:
        if key in sd:
            raise FeatureMissingError(f"{name} is not in this version; decode the latent with another program")
    return next((kind for kind in (look(sd) for look in (_wan, _hunyuan)) if kind is not None), None)


class VideoCoder:
    """Encoding and decoding for the `VAE` object `vae`, whose weights are of the kind `kind`."""

    def __init__(self, vae: Any, kind: VideoFormat) -> None:
        self.vae, self.kind = vae, kind

    # --- decoding --------------------------------------------------------------------------------------------------

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.vae
        return vae.first_stage_model.decode(latents.to(vae.device, vae.vae_dtype)).float()

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, t, h, w] -> [B, T, H, W, 3] in 0..1; in tiles when memory does not suffice.

        Raises ValueError for latents with other axes or channels.
        """
        samples = self._checked(samples)
        vae = self.vae
        frames, (height, width) = self.kind.frames(samples.shape[2]), samples.shape[3:]
        pixels = frames * height * width * self.kind.space**2
        vae._load(vae.memory_used_decode(samples.shape, vae.vae_dtype) / rows_over(samples.shape[0], pixels))
        video = None
        try:
            video = vae.process_output(self._coded(samples, self._decoded, pixels))
        except model_management.OOM_EXCEPTION:
            logging.warning("Ran out of memory when regular VAE decoding, retrying with tiled VAE decoding.")
        if video is None:  # outside the handler, whose traceback keeps the failed tensors
            tile = _FALLBACK_PIXELS // self.kind.space
            video = self._decode_in_tiles(samples, (9999, tile, tile), (1, tile // 4, tile // 4))
        vae.patcher.weight_store.check_files()
        return video.movedim(1, -1)

    def _coded(
        self, videos: torch.Tensor, code: Callable[[torch.Tensor], torch.Tensor], pixels: int, unit: int = 1
    ) -> torch.Tensor:
        """`code` of each video or latent, which are dealt over ranks whole or by rows; arguments as of `spread_pictures`."""
        vae = self.vae

        def one_by_one(some: torch.Tensor) -> torch.Tensor:
            return torch.cat([code(one).to(vae.output_device) for one in some.split(1)])

        done = spread_pictures(videos, one_by_one, vae.first_stage_model, code, vae.device, pixels, unit)
        return done.to(vae.output_device)

    def _checked(self, samples: torch.Tensor) -> torch.Tensor:
        if samples.ndim == 4:
            samples = samples.unsqueeze(2)  # one frame
        if samples.ndim != 5 or samples.shape[1] != self.kind.latent_channels:
            raise ValueError(
                f"a latent {tuple(samples.shape)} for a VAE of videos with {self.kind.latent_channels} channels; "
                "use the VAE that belongs to the model, or its empty latent node"
            )
        return samples

    def decode_tiled(
        self, samples: torch.Tensor, tile: tuple[int | None, int | None, int | None], overlap: int | None,
        overlap_t: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """`decode` in tiles of (frames, columns, rows) latent cells."""
        samples, vae = self._checked(samples), self.vae
        frames, columns, rows = tile
        overlap = 8 if overlap is None else overlap
        overlaps = (1 if overlap_t is None else max(1, overlap_t), overlap, overlap)
        sizes = (9999 if frames is None else max(2, frames), rows or 32, columns or 32)
        vae._load(vae.memory_used_decode((1, samples.shape[1], *map(min, samples.shape[2:], sizes)), vae.vae_dtype))
        video = self._decode_in_tiles(samples, sizes, overlaps, spread_rounds)
        vae.patcher.weight_store.check_files()
        return video.movedim(1, -1)

    def _decode_in_tiles(
        self, samples: torch.Tensor, tile: tuple[int, int, int], overlap: tuple[int, int, int], each: Each = map
    ) -> torch.Tensor:
        """each: deals tiles over ranks. After an out-of-memory of one rank it works alone, as the others may go on."""
        vae = self.vae
        return vae.process_output(
            comfy.utils.tiled_scale_multidim(
                samples, self._decoded, tile=tile, overlap=overlap, upscale_amount=self.kind.upscale,
                out_channels=vae.output_channels, index_formulas=(self.kind.time, self.kind.space, self.kind.space),
                output_device=vae.output_device, each=each,
            )
        )  # fmt: skip

    # --- encoding --------------------------------------------------------------------------------------------------

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self.vae
        return vae.first_stage_model.encode(vae.process_input(pixels.to(vae.device)).to(vae.vae_dtype)).float()

    def _video(self, pixels: torch.Tensor) -> torch.Tensor:
        """Frames [T, H, W, C] or videos [B, T, H, W, C] -> [B, C, T, H, W], cut to whole cells about the centre."""
        videos = pixels.unsqueeze(0) if pixels.ndim == 4 else pixels
        for axis in (2, 3):
            size = videos.shape[axis] // self.kind.space * self.kind.space
            videos = videos.narrow(axis, videos.shape[axis] % self.kind.space // 2, size)
        kept = self.kind.frames(1 + (videos.shape[1] - 1) // self.kind.time)
        return videos[:, :kept].movedim(-1, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Frames [T, H, W, 3] in 0..1 -> latent [1, C, t, h, w]; in tiles when memory does not suffice."""
        vae, video = self.vae, self._video(pixels)
        size = math.prod(video.shape[2:])
        vae._load(vae.memory_used_encode(video.shape, vae.vae_dtype) / rows_over(video.shape[0], size))
        latents = None
        try:
            latents = self._coded(video, self._encoded, size, self.kind.space)
        except model_management.OOM_EXCEPTION:
            logging.warning("Ran out of memory when regular VAE encoding, retrying with tiled VAE encoding.")
        if latents is None:  # outside the handler, as above
            tile = _FALLBACK_PIXELS
            latents = self._encode_in_tiles(video, (9999, tile, tile), (1, tile // 4, tile // 4))
        vae.patcher.weight_store.check_files()
        return latents

    def encode_tiled(
        self, pixels: torch.Tensor, tile: tuple[int | None, int | None, int | None], overlap: int | None,
        overlap_t: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """`encode` in tiles of (frames, columns, rows) pixels."""
        kind, vae, video = self.kind, self.vae, self._video(pixels)
        frames, columns, rows = tile
        overlap = 64 if overlap is None else overlap
        length = 9999 if frames is None else kind.frames(max(2, kind.latents(frames)))
        overlaps = (1 if overlap_t is None else kind.frames(max(1, kind.latents(overlap_t))), overlap, overlap)
        sizes = (length, rows or 512, columns or 512)
        vae._load(vae.memory_used_encode((1, 3, *map(min, video.shape[2:], sizes)), vae.vae_dtype))
        latents = self._encode_in_tiles(video, sizes, overlaps, spread_rounds)
        vae.patcher.weight_store.check_files()
        return latents

    def _encode_in_tiles(
        self, video: torch.Tensor, tile: tuple[int, int, int], overlap: tuple[int, int, int], each: Each = map
    ) -> torch.Tensor:
        kind, vae = self.kind, self.vae
        return comfy.utils.tiled_scale_multidim(
            video, self._encoded, tile=tile, overlap=overlap, upscale_amount=kind.downscale,
            out_channels=kind.latent_channels, downscale=True, output_device=vae.output_device,
            index_formulas=(kind.time, kind.space, kind.space), each=each,
        )  # fmt: skip
