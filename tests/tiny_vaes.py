"""Tiny VAEs of every kind of video VAE and of HunyuanImage 2.1's, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WIDTH = 8


def _res(channels: int, layers: int = 1, timed: bool = False, noise: bool = False) -> dict[str, Any]:
    return {"kind": "res", "channels": channels, "layers": layers, "timed": timed, "noise": noise}


def _up(channels: int, out: int, stride: tuple[int, int, int], residual: bool) -> dict[str, Any]:
    cells = stride[0] * stride[1] * stride[2]
    return {"kind": "unfold", "channels": channels, "made": out * cells, "stride": stride, "residual": residual}


def _down(channels: int, out: int, stride: tuple[int, int, int]) -> dict[str, Any]:
    return {"kind": "fold", "channels": channels, "out_channels": out, "stride": stride}


def ltx_config(version: int, z: int = 16) -> dict[str, Any]:
    """The argument of LTX-Video's VAE as 0.9.0 (0) has it, or with a decoder that knows a time, as 0.9.1 (1) and 0.9.5 (2)."""
    c = WIDTH
    strided: list[dict[str, Any]] = [
        _res(c), {"kind": "stride", "channels": c}, {"kind": "widen", "in_channels": c, "out_channels": 2 * c},
        {"kind": "stride", "channels": 2 * c}, {"kind": "stride", "channels": 2 * c}, _res(2 * c),
    ]  # fmt: skip
    folding = [
        _res(c), _down(c, 2 * c, (1, 2, 2)), _down(2 * c, 2 * c, (2, 1, 1)), _res(2 * c), _down(2 * c, 2 * c, (2, 2, 2)),
        _down(2 * c, 2 * c, (2, 2, 2)),
    ]  # fmt: skip
    every = (2, 2, 2)
    plain = [
        _res(2 * c), _up(2 * c, 2 * c, every, False), {"kind": "widen", "in_channels": 2 * c, "out_channels": c},
        _up(c, c, every, False), _up(c, c, every, False), _res(c),
    ]  # fmt: skip
    timed = [
        _res(4 * c, 2, True), _up(4 * c, 2 * c, every, True), _res(2 * c, 1, True, version == 1),
        _up(2 * c, c, every, True), _up(c, c // 2, every, True), _res(c // 2, 1, True, version == 1),
    ]  # fmt: skip
    up = timed if version else plain
    first, last = up[0]["channels"], up[-1]["channels"]
    return {
        "down": folding if version == 2 else strided, "up": up, "encoder_ends": [48, c, 2 * c, z + 1],
        "decoder_ends": [z, first, last, 48], "z_dim": z, "patch": 4, "timed": version > 0, "causal": False,
        "padding": "zeros",
    }  # fmt: skip


def ltx(version: int) -> torch.nn.Module:
    """LTX-Video's VAE."""
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    return VideoVAE(ltx_config(version))


def folding_config(video: bool) -> dict[str, Any]:
    """The argument of HunyuanImage 2.1's VAE, or of its refiner's."""
    c, levels = (WIDTH, 3) if video else (32, 2)
    down = [c] * (levels + 1) if video else [c, 2 * c, 2 * c]
    times = [False, True, True] if video else [False] * levels
    return {
        "video": video, "channels": 3, "z": 4, "blocks": 1, "down": down, "up": down[::-1], "down_times": times,
        "up_times": times[::-1],
    }  # fmt: skip


def folding(video: bool) -> torch.nn.Module:
    """HunyuanImage 2.1's VAE, or its refiner's."""
    from comfy.ldm.hunyuan_video.folding_vae import FoldingVAE

    return FoldingVAE(folding_config(video))


def wan(residual: bool) -> torch.nn.Module:
    """The VAE of Wan 2.1, or of Wan 2.2 5B."""
    from comfy.ldm.wan.vae import WanVAE

    if residual:
        return WanVAE(dim=8, decoder_dim=12, z_dim=6, residual=True, temperal_downsample=(False, True, True))
    return WanVAE(dim=8, z_dim=4)


def hunyuan() -> torch.nn.Module:
    """HunyuanVideo's VAE."""
    from comfy.ldm.hunyuan_video.vae import HunyuanVideoVAE

    config = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "in_channels": 3, "out_ch": 3, "z_channels": 4}
    return HunyuanVideoVAE(config, 4)


KINDS: dict[str, Callable[[], torch.nn.Module]] = {
    "wan21": lambda: wan(False),
    "wan22": lambda: wan(True),
    "hunyuan": hunyuan,
    "ltx 0.9.0": lambda: ltx(0),
    "ltx 0.9.1": lambda: ltx(1),
    "ltx 0.9.5": lambda: ltx(2),
    "refiner": lambda: folding(True),
    "hunyuan image": lambda: folding(False),
}


def network(kind: str, seed: int = 0) -> torch.nn.Module:
    """A network of KINDS with weights that keep the size of what passes through."""
    made = KINDS[kind]().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("gamma", "std-of-means")) or (parameter.ndim == 1 and name.endswith("weight")):
            values = 1 + 0.1 * values
        elif name.endswith("timestep_scale_multiplier"):
            values = torch.tensor(1000.0)
        elif parameter.ndim > 1 and not name.endswith("table"):
            values = values / max(1, parameter[0].numel()) ** 0.5
        else:
            values = 0.1 * values
        parameter.data = values
    return made
