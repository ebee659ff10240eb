"""All solvers by ComfyUI's names: `sample_<name>(model, x, sigmas, extra_args=, callback=, disable=, **options)`.

`comfy.samplers` finds a solver by `getattr` on this module when it is used, so custom nodes may add or replace
`sample_<name>` here, as well as the noise functions below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from comfy.k_diffusion.cfg_pp import (
    sample_dpmpp_2m_cfg_pp,
    sample_dpmpp_2s_ancestral_cfg_pp,
    sample_euler_ancestral_cfg_pp,
    sample_euler_cfg_pp,
)
from comfy.k_diffusion.dpm_solver import DPMSolver, PIDStepSizeController, sample_dpm_adaptive, sample_dpm_fast
from comfy.k_diffusion.dpmpp import (
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2m_sde_gpu,
    sample_dpmpp_2m_sde_heun,
    sample_dpmpp_2m_sde_heun_gpu,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_2s_ancestral_RF,
    sample_dpmpp_3m_sde,
    sample_dpmpp_3m_sde_gpu,
    sample_dpmpp_sde,
    sample_dpmpp_sde_gpu,
)
from comfy.k_diffusion.multistep import (
    sample_deis,
    sample_gradient_estimation,
    sample_gradient_estimation_cfg_pp,
    sample_ipndm,
    sample_ipndm_v,
    sample_lms,
    sample_res_multistep,
    sample_res_multistep_ancestral,
    sample_res_multistep_ancestral_cfg_pp,
    sample_res_multistep_cfg_pp,
)
from comfy.k_diffusion.onestep import (
    sample_ddpm,
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpm_2_ancestral_RF,
    sample_euler,
    sample_euler_ancestral,
    sample_euler_ancestral_RF,
    sample_heun,
    sample_heunpp2,
    sample_lcm,
)
from comfy.k_diffusion.run import (
    get_ancestral_step,
    half_log_snr_to_sigma,
    offset_first_sigma_for_snr,
    sigma_to_half_log_snr,
    to_d,
)
from comfy.k_diffusion.sa_solver import sample_sa_solver, sample_sa_solver_pece
from comfy.k_diffusion.schedules import (
    append_zero,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_laplace,
    get_sigmas_polyexponential,
    get_sigmas_vp,
)
from comfy.k_diffusion.sde import sample_er_sde, sample_seeds_2, sample_seeds_3

__all__ = [
    "BrownianTreeNoiseSampler", "DPMSolver", "PIDStepSizeController", "append_zero", "default_noise_sampler",
    "get_ancestral_step", "get_sigmas_exponential",
    "get_sigmas_karras", "get_sigmas_laplace", "get_sigmas_polyexponential", "get_sigmas_vp", "half_log_snr_to_sigma",
    "offset_first_sigma_for_snr", "sample_ddpm", "sample_deis", "sample_dpm_2", "sample_dpm_2_ancestral",
    "sample_dpm_2_ancestral_RF", "sample_dpm_adaptive", "sample_dpm_fast", "sample_dpmpp_2m", "sample_dpmpp_2m_cfg_pp",
    "sample_dpmpp_2m_sde", "sample_dpmpp_2m_sde_gpu", "sample_dpmpp_2m_sde_heun", "sample_dpmpp_2m_sde_heun_gpu",
    "sample_dpmpp_2s_ancestral", "sample_dpmpp_2s_ancestral_RF", "sample_dpmpp_2s_ancestral_cfg_pp",
    "sample_dpmpp_3m_sde", "sample_dpmpp_3m_sde_gpu", "sample_dpmpp_sde", "sample_dpmpp_sde_gpu", "sample_er_sde",
    "sample_euler", "sample_euler_ancestral", "sample_euler_ancestral_RF", "sample_euler_ancestral_cfg_pp",
    "sample_euler_cfg_pp", "sample_gradient_estimation", "sample_gradient_estimation_cfg_pp", "sample_heun",
    "sample_heunpp2", "sample_ipndm", "sample_ipndm_v", "sample_lcm", "sample_lms", "sample_res_multistep",
    "sample_res_multistep_ancestral", "sample_res_multistep_ancestral_cfg_pp", "sample_res_multistep_cfg_pp",
    "sample_sa_solver", "sample_sa_solver_pece", "sample_seeds_2", "sample_seeds_3", "sigma_to_half_log_snr", "to_d",
]  # fmt: skip


def default_noise_sampler(x: torch.Tensor, seed: int | None = None) -> Any:
    """Independent unit noise shaped like `x`, from a generator of its own on x's device (the global one without seed).

    As in ComfyUI the seed is that of the initial noise, so on the CPU the first draw repeats it.
    """
    generator = None
    if seed is not None:
        generator = torch.Generator(device=x.device).manual_seed(seed)

    def draw(sigma: Any, sigma_next: Any) -> torch.Tensor:
        return torch.randn(x.size(), dtype=x.dtype, layout=x.layout, device=x.device, generator=generator)

    return draw


class BrownianTreeNoiseSampler:
    """Noise as increments of one Brownian path W over [sigma_min, sigma_max], so that finer schedules agree.

    Called with two sigmas it returns (W(high) - W(low)) / sqrt(high - low) with the sign of the direction: unit noise
    shaped like `x`. `seed` is the tree's entropy (a list: one path per sample); `cpu` keeps the tree in host memory,
    which makes it independent of the device. `transform` maps sigma to the path's time.
    """

    def __init__(
        self,
        x: torch.Tensor,
        sigma_min: Any,
        sigma_max: Any,
        seed: int | Sequence[int] | None = None,
        transform: Any = lambda value: value,
        cpu: bool = False,
    ) -> None:
        import torchsde

        self.transform = transform
        start, end = sorted((self._time(sigma_min), self._time(sigma_max)))
        # torchsde rounds the ends of a path to six digits; queries at the ends follow, or it would warn at every run.
        self._ends = {start: round(start, 6), end: round(end, 6)}
        self.output_device = x.device
        first = torch.zeros_like(x, device="cpu") if cpu else torch.zeros_like(x)
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        seeds = [seed] if isinstance(seed, int) else list(seed)
        self.batched = not isinstance(seed, int)
        if self.batched and len(seeds) != x.shape[0]:
            raise ValueError(f"{len(seeds)} noise seeds for a batch of {x.shape[0]}; give one seed or one per sample")
        starts = list(first) if self.batched else [first]
        self.trees = [torchsde.BrownianTree(start, w, end, entropy=s) for w, s in zip(starts, seeds)]

    def _time(self, sigma: Any) -> float:
        return float(self.transform(torch.as_tensor(sigma)))

    def __call__(self, sigma: Any, sigma_next: Any) -> torch.Tensor:
        start, end = self._time(sigma), self._time(sigma_next)
        low, high = sorted((start, end))
        steps = [tree(self._ends.get(low, low), self._ends.get(high, high)) for tree in self.trees]
        step = torch.stack(steps) if self.batched else steps[0]
        # Divided in float32, as in ComfyUI: the draws agree to the last bit.
        width = float((torch.tensor(high) - torch.tensor(low)).sqrt())
        return (step / (width if start <= end else -width)).to(self.output_device)
