"""Videos to latents and back: what `comfy.vae.VAE` does with the weights of a video VAE.

Frames are a batch of pictures [T, H, W, 3], or [B, T, H, W, 3]; latents are [B, C, t, h, w].
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import comfy.model_management as model_management
import comfy.utils
from comfy.missing import FeatureMissingError
from comfy.model_detection import metadata_config
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
    [B, C, t, h, w], as ComfyUI estimates them for these networks. noise: share of noise that the decoder expects in
    latents. still: pictures of a batch are videos of one frame each.
    """

    make: Callable[[], torch.nn.Module]
    latent_channels: int
    out_channels: int
    time: int
    space: int
    encode_bytes: Bytes
    decode_bytes: Bytes
    working_dtypes: tuple[torch.dtype, ...] = _HALF
    noise: float = 0.0
    still: bool = False

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


Told = Mapping[str, Any]
"""What a file's metadata says of its VAE."""


def _wan(sd: dict[str, torch.Tensor], told: Told) -> VideoFormat | None:
    from comfy.ldm.wan import vae

    config = vae.config_from_state_dict(sd)
    if config is None:
        return None
    encode, decode, space = (3300, 8000, 16) if config["residual"] else (6000, 7000, 8)
    return VideoFormat(
        lambda: vae.WanVAE(**config), config["z_dim"], config["conv_out_channels"], 4, space,
        lambda shape: encode * shape[3] * shape[4], lambda shape: decode * shape[3] * shape[4] * space**2,
    )  # fmt: skip


def _hunyuan(sd: dict[str, torch.Tensor], told: Told) -> VideoFormat | None:
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


def _refiner(sd: dict[str, torch.Tensor], told: Told) -> VideoFormat | None:
    if "decoder.up.0.upsample.conv.conv.weight" not in sd:
        return None
    from comfy.ldm.hunyuan_video import folding_vae as vae

    config = vae.config_from_state_dict(sd)
    if config is None:
        return None
    space = 2 ** (len(config["down"]) - 1)
    # Latent frames come in pairs, so that a latent frame after the first is two pieces of the video.
    return VideoFormat(
        lambda: vae.FoldingVAE(config), 2 * config["z"], 3, 2 * vae.PIECE, space,
        lambda shape: 1400 * min(shape[2], vae.PIECE) * shape[3] * shape[4],
        lambda shape: 1400 * (1 if shape[2] == 1 else vae.PIECE) * shape[3] * shape[4] * space**2,
        (torch.float16, torch.bfloat16, torch.float32), still=True,
    )  # fmt: skip


def _ltx(sd: dict[str, torch.Tensor], told: Told) -> VideoFormat | None:
    from comfy.ldm.lightricks.vae import causal_video_autoencoder as vae

    config = vae.config_from_state_dict(sd, told)
    if config is None:
        return None
    time, space = vae.ratios(config)
    cell = time * space**2 // config["patch"] ** 2
    return VideoFormat(
        lambda: vae.VideoVAE(config), config["z_dim"], 3, time, space,
        lambda shape: 80 * max(shape[2], 7) * shape[3] * shape[4],
        lambda shape: 1200 * shape[2] * shape[3] * shape[4] * cell,
        (torch.bfloat16, torch.float32), vae.NOISE if config["timed"] else 0.0,
    )  # fmt: skip


# Kinds that are recognised only: a key that tells them, and what is missing.
_ABSENT = (("decoder.conv_in_x_t.weight", "the diffusion decoder of LTX-2.5"),)


def find(sd: dict[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> VideoFormat | None:
    """The kind of video VAE that these weights are of, or None. `metadata`: that of their file.

    Raises FeatureMissingError for kinds that are not in this version.
    """
    for key, name in _ABSENT:
        if key in sd:
            raise FeatureMissingError(f"{name} is not in this version; decode the latent with another program")
    told = metadata_config(metadata, "vae")
    return next(
        (kind for kind in (look(sd, told) for look in (_wan, _hunyuan, _refiner, _ltx)) if kind is not None), None
    )


class VideoCoder:
    """Encoding and decoding for the `VAE` object `vae`, whose weights are of the kind `kind`."""

    def __init__(self, vae: Any, kind: VideoFormat) -> None:
        self.vae, self.kind = vae, kind

    # --- decoding --------------------------------------------------------------------------------------------------

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.vae
        return vae.first_stage_model.decode(latents.to(vae.device, vae.vae_dtype)).float()

    def _each(self, batch: torch.Tensor, work: Callable[[torch.Tensor], torch.Tensor], unit: int, pixels: int) -> Any:
        """`work` for each video of a batch on its own, videos or rows of them dealt over ranks, or None without memory.

        unit: as of `spread_pictures`.
        """
        vae = self.vae
        try:
            return spread_pictures(
                batch,
                lambda videos: torch.cat([work(one).to(vae.output_device) for one in videos.split(1)]),
                vae.first_stage_model, work, vae.device, pixels, unit,
            ).to(vae.output_device)  # fmt: skip
        except model_management.OOM_EXCEPTION:
            return None  # what is done then is outside the handler, whose traceback keeps the failed tensors

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, t, h, w] -> [B, T, H, W, 3] in 0..1; in tiles when memory does not suffice.

        Raises ValueError for latents with other axes or channels.
        """
        samples = self._noised(self._checked(samples))
        vae, kind = self.vae, self.kind
        pixels = kind.frames(samples.shape[2]) * samples.shape[3] * samples.shape[4] * kind.space**2
        needed = vae.memory_used_decode(samples.shape, vae.vae_dtype)
        vae._load(needed / rows_over(samples.shape[0], pixels))
        made = self._each(samples, self._decoded, 1, pixels)
        if made is None:
            logging.warning("Ran out of memory when regular VAE decoding, retrying with tiled VAE decoding.")
            tile = _FALLBACK_PIXELS // kind.space
            each = vae._tiles_together(samples, pixels)
            video = self._decode_in_tiles(samples, (9999, tile, tile), (1, tile // 4, tile // 4), each)
        else:
            video = vae.process_output(made)
        vae.patcher.weight_store.check_files()
        return video.movedim(1, -1)

    def _checked(self, samples: torch.Tensor) -> torch.Tensor:
        if samples.ndim == 4:
            samples = samples.unsqueeze(2)  # one frame
        if samples.ndim != 5 or samples.shape[1] != self.kind.latent_channels:
            raise ValueError(
                f"a latent {tuple(samples.shape)} for a VAE of videos with {self.kind.latent_channels} channels; "
                "use the VAE that belongs to the model, or its empty latent node"
            )
        return samples

    def _noised(self, samples: torch.Tensor) -> torch.Tensor:
        """Latents with the noise that the decoder expects. It is the same at each decoding, in all tiles and ranks."""
        share = self.kind.noise
        if not share:
            return samples
        noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
        return samples * (1.0 - share) + noise.to(samples) * share

    def decode_tiled(
        self, samples: torch.Tensor, tile: tuple[int | None, int | None, int | None], overlap: int | None,
        overlap_t: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """`decode` in tiles of (frames, columns, rows) latent cells."""
        samples, vae = self._noised(self._checked(samples)), self.vae
        frames, columns, rows = tile
        overlap = 8 if overlap is None else overlap
        overlaps = (1 if overlap_t is None else max(1, overlap_t), overlap, overlap)
        sizes = (9999 if frames is None else max(2, frames), rows or 32, columns or 32)
        vae._load(vae.memory_used_decode((1, samples.shape[1], *map(min, samples.shape[2:], sizes)), vae.vae_dtype))
        video = self._decode_in_tiles(samples, sizes, overlaps, spread_rounds)
        vae.patcher.weight_store.check_files()
        return video.movedim(1, -1)

    def _decode_in_tiles(
        self, samples: torch.Tensor, tile: tuple[int, int, int], overlap: tuple[int, int, int], each: Each
    ) -> torch.Tensor:
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
        videos = pixels.unsqueeze(1 if self.kind.still else 0) if pixels.ndim == 4 else pixels
        for axis in (2, 3):
            size = videos.shape[axis] // self.kind.space * self.kind.space
            videos = videos.narrow(axis, videos.shape[axis] % self.kind.space // 2, size)
        kept = self.kind.frames(1 + (videos.shape[1] - 1) // self.kind.time)
        return videos[:, :kept].movedim(-1, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Frames [T, H, W, 3] in 0..1, or pictures of a still kind, -> latents [B, C, t, h, w]; in tiles without memory."""
        vae, kind, video = self.vae, self.kind, self._video(pixels)
        size = video.shape[2] * video.shape[3] * video.shape[4]
        vae._load(vae.memory_used_encode(video.shape, vae.vae_dtype) / rows_over(video.shape[0], size))
        latents = self._each(video, self._encoded, kind.space, size)
        if latents is None:
            logging.warning("Ran out of memory when regular VAE encoding, retrying with tiled VAE encoding.")
            tile, each = _FALLBACK_PIXELS, vae._tiles_together(video, size)
            latents = self._encode_in_tiles(video, (9999, tile, tile), (1, tile // 4, tile // 4), each)
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
        self, video: torch.Tensor, tile: tuple[int, int, int], overlap: tuple[int, int, int], each: Each
    ) -> torch.Tensor:
        kind, vae = self.kind, self.vae
        return comfy.utils.tiled_scale_multidim(
            video, self._encoded, tile=tile, overlap=overlap, upscale_amount=kind.downscale,
            out_channels=kind.latent_channels, downscale=True, output_device=vae.output_device,
            index_formulas=(kind.time, kind.space, kind.space), each=each,
        )  # fmt: skip
