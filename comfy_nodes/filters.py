"""Small image filters."""

from __future__ import annotations

import torch


def gaussian_kernel(radius: int, sigma: float, device: torch.device | str | None = None) -> torch.Tensor:
    """A normalised Gaussian [2 radius + 1, 2 radius + 1]; sigma counts in half widths of the kernel, which is 2 wide."""
    size = radius * 2 + 1
    axis = torch.linspace(-1, 1, size, device=device)
    distance = axis[:, None] ** 2 + axis[None, :] ** 2
    weights = torch.exp(-distance / (2 * sigma**2))
    return weights / weights.sum()


def sharpening_kernel(radius: int, sigma: float, alpha: float) -> torch.Tensor:
    """Kernel of unsharp masking: the picture plus ten times `alpha` of what blurring takes away."""
    kernel = gaussian_kernel(radius, sigma) * -(alpha * 10)
    kernel[radius, radius] += 1.0 - kernel.sum()
    return kernel
