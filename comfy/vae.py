"""Pictures to latents and back: the `VAE` object of workflows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

import comfy.model_management as model_management
import comfy.model_patcher
import comfy.utils
from comfy import accounting, video_vae, weight_files
from comfy.ldm.models.autoencoder import convert_diffusers_vae, image_network
from comfy.taco_dit.core.spread import rows_over, spread_pictures, spread_rounds

# Bytes of activations per output pixel and byte of dtype, measured on the 84M-parameter image VAE.
DECODE_BYTES = 2178
ENCODE_BYTES = 1767


class VAE:
    """An image VAE, where it computes and waits. Pictures are [B, H, W, 3] in 0..1, latents [B, C, h, w].

    With the weights of a video VAE, frames are a batch of pictures, and latents are [B, C, t, h, w].
    """

    def __init__(
        self,
        sd: dict[str, torch.Tensor] | None = None,
        device: torch.device | None = None,
        config: Any = None,
        dtype: torch.dtype | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        """Build from a state dict with latent diffusion's or diffusers' keys.

        Raises ValueError when the weights are not those of an image VAE, or incomplete.
        """
        if sd is None:
            raise ValueError("VAE needs a state dict; was the file empty?")
        files = weight_files.files_in(sd)
        if "decoder.up_blocks.0.resnets.0.norm1.weight" in sd:
            sd = convert_diffusers_vae(sd)
        kind = video_vae.find(sd)
        self.video = None if kind is None else video_vae.VideoCoder(self, kind)
        self.device = model_management.vae_device() if device is None else device
        self.vae_dtype = dtype or model_management.vae_dtype(self.device)
        self.working_dtypes = [torch.bfloat16, torch.float32]
        self.output_device = model_management.intermediate_device()
        if kind is None:
            image = image_network(sd)
            self.latent_channels, self.output_channels = image.latent_channels, image.out_channels
            self.downscale_ratio: Any = image.factor
            self.upscale_ratio: Any = image.factor
            self.vae_dtype = dtype or image.dtype or self.vae_dtype
        else:
            self.latent_channels, self.output_channels = kind.latent_channels, kind.out_channels
            self.downscale_ratio, self.upscale_ratio = kind.downscale, kind.upscale
            self.working_dtypes = list(kind.working_dtypes)
        self.latent_dim = 2 if kind is None else 3
        self._activations = image.activations if kind is None else 1.0
        self.crop_input = True
        self.disable_offload = False
        self.not_video = kind is None
        self.process_input: Callable[[torch.Tensor], torch.Tensor] = lambda image: image * 2.0 - 1.0
        self.process_output: Callable[[torch.Tensor], torch.Tensor] = lambda image: ((image + 1.0) / 2.0).clamp(
            0.0, 1.0
        )
        with torch.device("meta"):
            network = image.make() if kind is None else kind.make()
        self.first_stage_model = self._with_weights(network, sd).eval()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=model_management.vae_offload_device()
        )
        self.patcher.weight_store.loaded_from |= files

    def _with_weights(self, network: Any, sd: dict[str, torch.Tensor]) -> Any:
        weights = {key: value.to(self.vae_dtype) for key, value in sd.items() if value.is_floating_point()}
        missing, unexpected = network.load_state_dict(weights, strict=False, assign=True)
        empty = [name for name, parameter in network.named_parameters() if parameter.is_meta]
        if empty:
            raise ValueError(f"the VAE lacks {len(empty)} weights, first {empty[0]}; the file is incomplete")
        if unexpected:
            logging.debug("Leftover VAE keys: %s", unexpected)
        return network

    def throw_exception_if_invalid(self) -> None:
        """Kept for callers written for ComfyUI: an invalid VAE cannot be constructed here."""

    # --- memory ----------------------------------------------------------------------------------------------------

    def memory_used_decode(self, shape: Any, dtype: torch.dtype) -> float:
        """Bytes to decode a latent of this shape."""
        if self.video is not None:
            return self.video.kind.decode_bytes(shape) * model_management.dtype_size(dtype)
        pixels = shape[2] * shape[3] * self.upscale_ratio**2
        return self._activations * DECODE_BYTES * pixels * model_management.dtype_size(dtype)

    def memory_used_encode(self, shape: Any, dtype: torch.dtype) -> float:
        """Bytes to encode pictures of this shape [B, 3, H, W]."""
        if self.video is not None:
            return self.video.kind.encode_bytes(shape) * model_management.dtype_size(dtype)
        return self._activations * ENCODE_BYTES * shape[2] * shape[3] * model_management.dtype_size(dtype)

    def _load(self, needed: float) -> int:
        """Bring the network to its device; returns how many pictures fit at once."""
        model_management.load_models_gpu([self.patcher], memory_required=needed, force_full_load=self.disable_offload)
        return max(1, int(model_management.get_free_memory(self.device) / max(needed, 1.0)))

    # --- decoding --------------------------------------------------------------------------------------------------

    @accounting.phase("vae")
    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None) -> torch.Tensor:
        """Latents [B, C, h, w] -> pictures [B, H, W, 3] in 0..1; in tiles when memory does not suffice.

        Raises ValueError for latents with another number of channels.
        """
        if self.video is not None:
            return self.video.decode(samples_in)
        if samples_in.shape[1] != self.latent_channels:
            raise ValueError(
                f"the latent has {samples_in.shape[1]} channels but this VAE decodes {self.latent_channels}; "
                "use the VAE that belongs to the model, or its empty latent node"
            )
        needed = self.memory_used_decode(samples_in.shape, self.vae_dtype)
        pixels = samples_in.shape[2] * samples_in.shape[3] * self.upscale_ratio**2
        at_once = self._load(needed / rows_over(samples_in.shape[0], pixels))
        pictures = None
        try:
            pictures = spread_pictures(
                samples_in,
                lambda batch: self._in_parts(batch, at_once, self._decode_batch),
                self.first_stage_model,
                self._decode_batch,
                self.device,
                pixels,
            ).to(self.output_device)
        except model_management.OOM_EXCEPTION:
            logging.warning("Ran out of memory when regular VAE decoding, retrying with tiled VAE decoding.")
        if pictures is None:  # outside the handler, whose traceback keeps the failed tensors
            pictures = self._decode_tiled(samples_in, 64, 64, 16)
        self.patcher.weight_store.check_files()
        return pictures.movedim(1, -1)

    def _in_parts(
        self, batch: torch.Tensor, at_once: int, network: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """`network` for a few entries of a batch at a time; what is ready waits on the output device."""
        return torch.cat([network(part).to(self.output_device) for part in batch.split(at_once)])

    def _decode_batch(self, latents: torch.Tensor) -> torch.Tensor:
        return self.process_output(self.first_stage_model.decode(latents.to(self.device, self.vae_dtype)).float())

    def _decode_tiled(self, samples: torch.Tensor, tile_x: int, tile_y: int, overlap: int) -> torch.Tensor:
        """The mean of three tilings, so that no seam is at the same place in all of them."""

        def decode(tile: torch.Tensor) -> torch.Tensor:
            return self.first_stage_model.decode(tile.to(self.device, self.vae_dtype)).float()

        tilings = ((tile_x // 2, tile_y * 2), (tile_x * 2, tile_y // 2), (tile_x, tile_y))
        bar = self._bar(samples, tilings, overlap)
        parts = [
            comfy.utils.tiled_scale(
                samples, decode, width, height, overlap, upscale_amount=self.upscale_ratio,
                out_channels=self.output_channels, output_device=self.output_device, pbar=bar,
                each=spread_rounds,
            )
            for width, height in tilings
        ]  # fmt: skip
        return self.process_output(sum(parts[1:], parts[0]) / 3.0)

    @staticmethod
    def _bar(samples: torch.Tensor, tilings: Any, overlap: int) -> comfy.utils.ProgressBar:
        height, width = samples.shape[-2:]
        steps = sum(comfy.utils.get_tiled_scale_steps(width, height, x, y, overlap) for x, y in tilings)
        return comfy.utils.ProgressBar(samples.shape[0] * steps)

    @accounting.phase("vae")
    def decode_tiled(
        self,
        samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """`decode` in tiles of `tile_x` x `tile_y` latent cells, and `tile_t` latent frames of a video."""
        if self.video is not None:
            return self.video.decode_tiled(samples, (tile_t, tile_x, tile_y), overlap, overlap_t)
        self._load(self.memory_used_decode(samples.shape, self.vae_dtype))
        pictures = self._decode_tiled(samples, tile_x or 64, tile_y or 64, 16 if overlap is None else overlap)
        self.patcher.weight_store.check_files()
        return pictures.movedim(1, -1)

    # --- encoding --------------------------------------------------------------------------------------------------

    def vae_encode_crop_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Cut pictures [B, H, W, C] about the centre to multiples of the VAE's factor, and to three channels."""
        ratio = self.spacial_compression_encode()
        for axis in (1, 2):
            size = (pixels.shape[axis] // ratio) * ratio
            pixels = pixels.narrow(axis, (pixels.shape[axis] % ratio) // 2, size)
        return pixels[..., :3]

    @accounting.phase("vae")
    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """Pictures [B, H, W, 3] in 0..1 -> latents [B, C, h, w]; in tiles when memory does not suffice."""
        if self.video is not None:
            return self.video.encode(pixel_samples)
        pixels = self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1)
        size = pixels.shape[2] * pixels.shape[3]
        at_once = self._load(self.memory_used_encode(pixels.shape, self.vae_dtype) / rows_over(pixels.shape[0], size))
        latents = None
        try:
            latents = spread_pictures(
                pixels,
                lambda batch: self._in_parts(batch, at_once, self._encode_batch),
                self.first_stage_model,
                self._encode_batch,
                self.device,
                size,
                self.spacial_compression_encode(),
            ).to(self.output_device)
        except model_management.OOM_EXCEPTION:
            logging.warning("Ran out of memory when regular VAE encoding, retrying with tiled VAE encoding.")
        if latents is None:  # outside the handler, as above
            latents = self._encode_tiled(pixels, 512, 512, 64)
        self.patcher.weight_store.check_files()
        return latents

    def _encode_batch(self, pixels: torch.Tensor) -> torch.Tensor:
        inputs = self.process_input(pixels.to(self.device)).to(self.vae_dtype)
        return self.first_stage_model.encode(inputs).float()

    def _encode_tiled(self, pixels: torch.Tensor, tile_x: int, tile_y: int, overlap: int) -> torch.Tensor:
        def encode(tile: torch.Tensor) -> torch.Tensor:
            return self.first_stage_model.encode(self.process_input(tile).to(self.device, self.vae_dtype)).float()

        tilings = ((tile_x, tile_y), (tile_x * 2, tile_y // 2), (tile_x // 2, tile_y * 2))
        bar = self._bar(pixels, tilings, overlap)
        parts = [
            comfy.utils.tiled_scale(
                pixels, encode, width, height, overlap, upscale_amount=1 / self.downscale_ratio,
                out_channels=self.latent_channels, output_device=self.output_device, pbar=bar,
                each=spread_rounds,
            )
            for width, height in tilings
        ]  # fmt: skip
        return sum(parts[1:], parts[0]) / 3.0

    @accounting.phase("vae")
    def encode_tiled(
        self,
        pixel_samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """`encode` in tiles of `tile_x` x `tile_y` pixels, and `tile_t` frames of a video."""
        if self.video is not None:
            return self.video.encode_tiled(pixel_samples, (tile_t, tile_x, tile_y), overlap, overlap_t)
        pixels = self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1)
        self._load(self.memory_used_encode(pixels.shape, self.vae_dtype))
        latents = self._encode_tiled(pixels, tile_x or 512, tile_y or 512, 64 if overlap is None else overlap)
        self.patcher.weight_store.check_files()
        return latents

    # --- facts about this VAE --------------------------------------------------------------------------------------

    def get_sd(self) -> dict[str, torch.Tensor]:
        """The weights."""
        return self.first_stage_model.state_dict()

    def spacial_compression_decode(self) -> int:  # ComfyUI's spelling
        """Pixels per latent cell and side."""
        return self.upscale_ratio if self.video is None else self.video.kind.space

    def spacial_compression_encode(self) -> int:
        """Pixels per latent cell and side."""
        return self.downscale_ratio if self.video is None else self.video.kind.space

    def temporal_compression_decode(self) -> int | None:
        """Frames per latent frame; None for image VAEs."""
        return None if self.video is None else self.video.kind.time

    def is_dynamic(self) -> bool:
        """Whether weights are paged in on demand; they are not."""
        return False
