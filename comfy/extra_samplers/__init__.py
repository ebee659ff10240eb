"""Solvers that are not found by name in `comfy.k_diffusion.sampling`."""

from typing import TYPE_CHECKING

from comfy.submodules import submodules

if not TYPE_CHECKING:
    __getattr__ = submodules(__name__)
