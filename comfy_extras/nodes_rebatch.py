"""Cutting batches anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.latent import repeat_mask
from comfy_nodes.v3 import batch, extension

Latent = dict[str, Any]


def _single_latents(latents: list[Latent]) -> Iterator[Latent]:
    """Each picture as a latent of its own, with mask [1, 1, 8 H, 8 W] and noise index."""
    counted = 0
    for latent in latents:
        samples = latent["samples"]
        shape = (samples.shape[0], 1, samples.shape[-2] * 8, samples.shape[-1] * 8)
        mask = latent.get("noise_mask")
        if mask is None:
            mask = torch.ones(shape, device="cpu")
        else:
            mask = mask.reshape((-1, 1, *mask.shape[-2:]))
            if mask.shape[-2:] != shape[-2:]:
                mask = torch.nn.functional.interpolate(mask, size=shape[-2:], mode="bilinear")
            mask = repeat_mask(mask, samples.shape[0])
        indices = latent.get("batch_index", range(counted, counted + samples.shape[0]))
        counted += samples.shape[0]
        for i, index in zip(range(samples.shape[0]), indices, strict=False):
            yield {"samples": samples[i : i + 1], "noise_mask": mask[i : i + 1], "batch_index": [index]}


def _joined(parts: list[Latent]) -> Latent:
    return {
        "samples": torch.cat([part["samples"] for part in parts]),
        "noise_mask": torch.cat([part["noise_mask"] for part in parts]),
        "batch_index": [index for part in parts for index in part["batch_index"]],
    }


class LatentRebatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RebatchLatents",
            display_name="Rebatch Latents",
            category="latent/batch",
            is_input_list=True,
            inputs=[io.Latent.Input("latents"), batch()],
            outputs=[io.Latent.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, latents: list[Latent], batch_size: list[int]):
        """Pictures of one size go together; another size begins a new batch."""
        batches: list[list[Latent]] = []
        for single in _single_latents(latents):
            open_batch = batches[-1] if batches else []
            fits = 0 < len(open_batch) < batch_size[0]
            if fits and open_batch[0]["samples"].shape[1:] == single["samples"].shape[1:]:
                open_batch.append(single)
            else:
                batches.append([single])
        return io.NodeOutput([_joined(parts) for parts in batches])

    rebatch = execute


class ImageRebatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RebatchImages",
            display_name="Rebatch Images",
            category="image/batch",
            is_input_list=True,
            inputs=[io.Image.Input("images"), batch()],
            outputs=[io.Image.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, images: list[torch.Tensor], batch_size: list[int]):
        singles = [image[i : i + 1] for image in images for i in range(image.shape[0])]
        size = batch_size[0]
        return io.NodeOutput([torch.cat(singles[i : i + size]) for i in range(0, len(singles), size)])

    rebatch = execute


comfy_entrypoint = extension(LatentRebatch, ImageRebatch)
