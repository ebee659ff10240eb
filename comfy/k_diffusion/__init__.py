"""Solvers of the sampling equation, under the names that ComfyUI inherited from k-diffusion."""
