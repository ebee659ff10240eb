"""Control networks and adapters: what computes residuals for a diffusion model's blocks from a hint picture."""
