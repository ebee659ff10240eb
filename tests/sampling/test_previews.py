"""Previews: one picture of bounded size, whatever the latent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import latent_preview
from comfy.cli_args import LatentPreviewMethod, args
from comfy.latent_formats import Flux
from latent_preview import Latent2RGBPreviewer, TAESDPreviewerImpl, first_small, previews_of

FORMAT = Flux()


class CountingVae:
    """Stands for a tiny VAE: notes what it decodes."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.shapes.append(latents.shape)
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=8.0)


def linear() -> Latent2RGBPreviewer:
    return Latent2RGBPreviewer(FORMAT.latent_rgb_factors, FORMAT.latent_rgb_factors_bias)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 16, 64, 48), (48, 64)),
        ((3, 16, 512, 512), (512, 512)),
        ((1, 16, 1000, 600), (307, 512)),
        ((1, 16, 1, 3000), (512, 1)),
        ((2, 16, 3, 600, 700), (512, 438)),
    ],
)
def test_latents_become_small_before_they_become_pictures(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    assert args.preview_size == 512
    form, picture, longest = linear().decode_latent_to_preview_image("JPEG", torch.randn(shape))
    assert (form, picture.size, longest) == ("JPEG", size, 512)


def test_a_tiny_vae_decodes_little_and_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = CountingVae()
    previewer = TAESDPreviewerImpl(vae)
    for shape in ((1, 16, 128, 128), (4, 16, 1024, 512), (1, 16, 5, 300, 300)):
        previewer.decode_latent_to_preview(torch.randn(shape))
    assert vae.shapes == [(1, 16, 128, 128), (1, 16, 128, 64), (1, 16, 128, 128)]
    monkeypatch.setattr(args, "preview_size", 64)
    previewer.decode_latent_to_preview(torch.randn(1, 16, 128, 128))
    assert vae.shapes[-1] == (1, 16, 16, 16)


def test_small_latents_are_shown_as_they_are() -> None:
    latent = torch.randn(2, 16, 32, 24)
    assert first_small(latent, 32).data_ptr() == latent.data_ptr()
    assert torch.equal(first_small(latent, 32), latent[:1])


def test_cells_are_averaged() -> None:
    latent = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert first_small(latent, 2).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


def test_a_preview_of_16384_x_16384_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor or picture in it is larger than the preview; the latent itself is 16 x 2048 x 2048."""
    seen: list[Any] = []
    convert = latent_preview.preview_to_image
    monkeypatch.setattr(latent_preview, "preview_to_image", lambda image: seen.append(image.shape) or convert(image))
    latent = torch.zeros(1, 1, 1, 1).expand(2, 16, 2048, 2048)
    linear().decode_latent_to_preview(latent)
    assert seen == [(512, 512, 3)]


def test_a_prompt_chooses_its_previews_and_a_node_may_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rgb, auto, none = LatentPreviewMethod.Latent2RGB, LatentPreviewMethod.Auto, LatentPreviewMethod.NoPreviews
    monkeypatch.setattr(args, "preview_method", rgb)
    for extra, inside in (
        ({"preview_method": "none"}, none),
        ({"preview_method": "default"}, rgb),
        ({"preview_method": ["none"]}, rgb),
        ({}, rgb),
        (None, rgb),
    ):
        with previews_of(extra):
            assert args.preview_method is inside
        assert args.preview_method is rgb
    with previews_of({"preview_method": "none"}):
        args.preview_method = auto
    assert args.preview_method is auto
