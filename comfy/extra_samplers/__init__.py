"""Solvers that are not found by name in `comfy.k_diffusion.sampling`."""
