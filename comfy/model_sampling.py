"""Noise schedules and what a network's output means.

A model's `model_sampling` object is one class made of two: a *prediction* (EPS, V_PREDICTION, CONST, ...) that scales
the input, turns the output into the denoised latent and mixes noise with latents, and a *schedule*
(ModelSamplingDiscrete, ModelSamplingDiscreteFlow, ModelSamplingFlux, ...) that relates sigma, network timestep and
progress. Custom nodes build such classes themselves:

    class Sampling(ModelSamplingFlux, CONST): ...

Sigma is the noise level: x = latent + sigma * noise (EPS family), or x = (1 - sigma) * latent + sigma * noise (flow).
Sources: Karras et al. 2022 (arXiv 2206.00364), Salimans & Ho 2022 (v-prediction, 2202.00512), Esser et al. 2024
(rectified flow and its shift, 2403.03206), Lin et al. 2023 (zero terminal SNR, 2305.08891).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from comfy.sigma_schedules import make_beta_schedule, rescale_zero_terminal_snr_sigmas

__all__ = [
    "CONST", "COSMOS_RFLOW", "EDM", "EPS", "IMG_TO_IMG", "ModelSamplingContinuousEDM", "ModelSamplingContinuousV",
    "ModelSamplingCosmosRFlow", "ModelSamplingDiscrete", "ModelSamplingDiscreteEDM", "ModelSamplingDiscreteFlow",
    "ModelSamplingFlux", "StableCascadeSampling", "V_PREDICTION", "X0", "flux_time_shift", "make_beta_schedule",
    "rescale_zero_terminal_snr_sigmas", "reshape_sigma", "time_snr_shift",
]  # fmt: skip

# The progress 0 means "from the very beginning": above any sigma of an unbounded schedule.
BEFORE_ANY_SIGMA = 999999999.9


def reshape_sigma(sigma: torch.Tensor, noise_dim: int) -> torch.Tensor:
    """`sigma` [B] (or one element) shaped to multiply a tensor of `noise_dim` axes."""
    if sigma.nelement() == 1:
        return sigma.view(())
    return sigma.view(sigma.shape[:1] + (1,) * (noise_dim - 1))


class EPS:
    """The network predicts the noise; its input is scaled to unit variance."""

    sigma_data = 1.0

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Network input for noisy latents `noise` [B, C, ...] at `sigma` [B]."""
        sigma = reshape_sigma(sigma, noise.ndim)
        return noise / torch.sqrt(sigma**2 + self.sigma_data**2)

    def calculate_denoised(
        self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor
    ) -> torch.Tensor:
        """Denoised latent from the network's output; `model_input` is the noisy latent before input scaling."""
        return model_input - model_output * reshape_sigma(sigma, model_output.ndim)

    def noise_scaling(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, max_denoise: bool = False
    ) -> torch.Tensor:
        """`latent_image` noised to `sigma`; with `max_denoise` the noise has the variance of a noised unit latent."""
        sigma = reshape_sigma(sigma, noise.ndim)
        scale = torch.sqrt(1.0 + sigma**2) if max_denoise else sigma
        return noise * scale + latent_image

    def inverse_noise_scaling(self, sigma: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """The latent to hand on when sampling stops at `sigma`."""
        return latent


class V_PREDICTION(EPS):  # noqa: N801 (ComfyUI's name)
    """The network predicts the velocity v = alpha * noise - sigma * latent (variance-preserving scale)."""

    _output_sign = -1.0

    def calculate_denoised(
        self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor
    ) -> torch.Tensor:
        """c_skip * x -/+ c_out * output with the coefficients of Karras et al., table 1."""
        sigma = reshape_sigma(sigma, model_output.ndim)
        variance = sigma**2 + self.sigma_data**2
        skip = model_input * (self.sigma_data**2 / variance)
        return skip + model_output * (self._output_sign * sigma * self.sigma_data / torch.sqrt(variance))


class EDM(V_PREDICTION):
    """As V_PREDICTION with the opposite sign: Karras' F(x)."""

    _output_sign = 1.0


class X0(EPS):
    """The network predicts the denoised latent."""

    def calculate_denoised(
        self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor
    ) -> torch.Tensor:
        """The output itself."""
        return model_output


class IMG_TO_IMG(X0):  # noqa: N801 (ComfyUI's name)
    """The network maps a picture to a picture; its input is not scaled."""

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The input itself."""
        return noise


class CONST:
    """Rectified flow: the network predicts noise - latent along the straight line between them."""

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The input itself."""
        return noise

    def calculate_denoised(
        self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor
    ) -> torch.Tensor:
        """x - sigma * output."""
        return model_input - model_output * reshape_sigma(sigma, model_output.ndim)

    def noise_scaling(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, max_denoise: bool = False
    ) -> torch.Tensor:
        """The point at `sigma` on the line from `latent_image` (0) to `noise` (1)."""
        sigma = reshape_sigma(sigma, noise.ndim)
        return sigma * noise + (1.0 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Undo the latent's factor of `noise_scaling`, so that a later run can add noise again."""
        return latent / (1.0 - reshape_sigma(sigma, latent.ndim))


class COSMOS_RFLOW:  # noqa: N801 (ComfyUI's name)
    """Cosmos Predict2: rectified flow behind an EDM-like interface; the network sees t = sigma / (sigma + 1)."""

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x / (sigma + 1): from x = latent + sigma * noise to a point of the line."""
        sigma = reshape_sigma(sigma, noise.ndim)
        return noise * (1.0 - sigma / (sigma + 1.0))

    def calculate_denoised(
        self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor
    ) -> torch.Tensor:
        """x (1 - t) - output * t."""
        sigma = reshape_sigma(sigma, model_output.ndim)
        t = sigma / (sigma + 1.0)
        return model_input * (1.0 - t) - model_output * t

    def noise_scaling(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, max_denoise: bool = False
    ) -> torch.Tensor:
        """latent + sigma * noise."""
        return noise * reshape_sigma(sigma, noise.ndim) + latent_image

    def inverse_noise_scaling(self, sigma: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """The latent itself."""
        return latent


def _settings(model_config: Any) -> dict[str, Any]:
    """`model_config.sampling_settings`, or nothing without a configuration."""
    return getattr(model_config, "sampling_settings", None) or {} if model_config is not None else {}


class _SigmaTable(torch.nn.Module):
    """A schedule with a table of increasing sigmas."""

    sigmas: torch.Tensor

    @property
    def sigma_min(self) -> torch.Tensor:
        """Lowest sigma of the table, a 0-dim tensor."""
        return self.sigmas[0]

    @property
    def sigma_max(self) -> torch.Tensor:
        """Highest sigma of the table, a 0-dim tensor."""
        return self.sigmas[-1]


class ModelSamplingDiscrete(_SigmaTable):
    """A table of trained noise levels from a beta schedule; in between, log sigma is interpolated linearly.

    `sampling_settings`: beta_schedule ("linear": linear in sqrt(beta), "sqrt_linear", "cosine"), linear_start,
    linear_end, timesteps, zsnr. `zsnr` rescales the table to zero signal at its end.
    """

    sigmas: torch.Tensor
    log_sigmas: torch.Tensor

    def __init__(self, model_config: Any = None, zsnr: bool | None = None) -> None:
        super().__init__()
        settings = _settings(model_config)
        self.sigma_data = 1.0
        self.zsnr = settings.get("zsnr", False) if zsnr is None else zsnr
        self._register_schedule(
            beta_schedule=settings.get("beta_schedule", "linear"),
            timesteps=settings.get("timesteps", 1000),
            linear_start=settings.get("linear_start", 0.00085),
            linear_end=settings.get("linear_end", 0.012),
        )

    def _register_schedule(
        self,
        given_betas: Any = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        betas = given_betas
        if betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        betas = torch.as_tensor(betas, dtype=torch.float64)
        self.num_timesteps = betas.shape[0]
        self.linear_start, self.linear_end = linear_start, linear_end
        kept = torch.cumprod(1.0 - betas, dim=0)
        sigmas = ((1.0 - kept) / kept) ** 0.5
        self.set_sigmas(rescale_zero_terminal_snr_sigmas(sigmas) if self.zsnr else sigmas)

    def set_sigmas(self, sigmas: torch.Tensor) -> None:
        """Replace the table by increasing `sigmas` [timesteps]."""
        self.register_buffer("sigmas", sigmas.float())
        self.register_buffer("log_sigmas", sigmas.log().float())

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Index of the table entry nearest to each sigma, in log distance."""
        distance = (sigma.log().to(self.log_sigmas.device) - self.log_sigmas[:, None]).abs()
        return distance.argmin(dim=0).view(sigma.shape).to(sigma.device)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Sigma at (fractional) table positions."""
        last = len(self.sigmas) - 1
        position = timestep.float().to(self.log_sigmas.device).clamp(min=0, max=last)
        below = position.floor().long()
        above = position.ceil().long()
        log_sigma = torch.lerp(self.log_sigmas[below], self.log_sigmas[above], position.frac())
        return log_sigma.exp().to(timestep.device)

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma at a progress of 0 (start) to 1 (end)."""
        if percent <= 0.0:
            return BEFORE_ANY_SIGMA
        if percent >= 1.0:
            return 0.0
        return self.sigma(torch.tensor((1.0 - percent) * 999.0)).item()


class ModelSamplingDiscreteEDM(ModelSamplingDiscrete):
    """A discrete table for a network that is told log(sigma) / 4."""

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """log(sigma) / 4."""
        return 0.25 * sigma.log()

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """exp(4 t)."""
        return (4.0 * timestep).exp()


class ModelSamplingContinuousEDM(_SigmaTable):
    """Any sigma between two limits; the network is told log(sigma) / 4."""

    def __init__(self, model_config: Any = None) -> None:
        super().__init__()
        settings = _settings(model_config)
        self.set_parameters(
            settings.get("sigma_min", 0.002), settings.get("sigma_max", 120.0), settings.get("sigma_data", 1.0)
        )

    def set_parameters(self, sigma_min: float, sigma_max: float, sigma_data: float) -> None:
        """Limits of sigma and the standard deviation of latents."""
        self.sigma_data = sigma_data
        sigmas = torch.linspace(math.log(sigma_min), math.log(sigma_max), 1000).exp()
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """log(sigma) / 4."""
        return 0.25 * sigma.log()

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """exp(4 t)."""
        return (4.0 * timestep).exp()

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma at a progress of 0 (start) to 1 (end), geometric between the limits."""
        if percent <= 0.0:
            return BEFORE_ANY_SIGMA
        if percent >= 1.0:
            return 0.0
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return math.exp(high + (low - high) * percent)


class ModelSamplingContinuousV(ModelSamplingContinuousEDM):
    """Any sigma between two limits; the network is told the angle atan(sigma) as a share of a right angle."""

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """2 atan(sigma) / pi, from 0 to 1."""
        return sigma.atan() * (2.0 / math.pi)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """tan(pi t / 2)."""
        return (timestep * (math.pi / 2.0)).tan()


class ModelSamplingCosmosRFlow(ModelSamplingContinuousEDM):
    """Cosmos Predict2's schedule: the network is told sigma / (sigma + 1)."""

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """sigma / (sigma + 1)."""
        return sigma / (sigma + 1.0)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """t / (1 - t), at most the table's highest sigma."""
        highest = self.sigma_max
        if timestep >= highest / (highest + 1.0):
            return highest
        return timestep / (1.0 - timestep)


def time_snr_shift(alpha: float, t: Any) -> Any:
    """Shift a flow time by `alpha` (Esser et al. 2024, equation 23): alpha t / (1 + (alpha - 1) t)."""
    return t if alpha == 1.0 else alpha * t / (1.0 + (alpha - 1.0) * t)


def flux_time_shift(mu: float, sigma: float, t: Any) -> Any:
    """Flux' time shift: exp(mu) / (exp(mu) + (1/t - 1)^sigma)."""
    factor = math.exp(mu)
    return factor / (factor + (1.0 / t - 1.0) ** sigma)


class ModelSamplingDiscreteFlow(_SigmaTable):
    """Rectified flow with the shift of SD3; the network is told `multiplier` * sigma."""

    def __init__(self, model_config: Any = None) -> None:
        super().__init__()
        settings = _settings(model_config)
        self.set_parameters(shift=settings.get("shift", 1.0), multiplier=settings.get("multiplier", 1000))

    def set_parameters(self, shift: float = 1.0, timesteps: int = 1000, multiplier: float = 1000) -> None:
        """Choose the shift, the table's length and the factor of network timesteps."""
        self.shift = shift
        self.multiplier = multiplier
        steps = torch.arange(1, timesteps + 1) / timesteps
        self.register_buffer("sigmas", self.sigma(steps * multiplier))

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """multiplier * sigma."""
        return sigma * self.multiplier

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """The shifted sigma of an unshifted timestep. Not the inverse of `timestep`, as in ComfyUI."""
        return time_snr_shift(self.shift, timestep / self.multiplier)

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma at a progress of 0 (start) to 1 (end)."""
        return _flow_percent(percent, lambda t: time_snr_shift(self.shift, t))


class ModelSamplingFlux(_SigmaTable):
    """Rectified flow with Flux' exponential shift; the network is told sigma."""

    def __init__(self, model_config: Any = None) -> None:
        super().__init__()
        self.set_parameters(shift=_settings(model_config).get("shift", 1.15))

    def set_parameters(self, shift: float = 1.15, timesteps: int = 10000) -> None:
        """Choose the shift (the exponent mu) and the table's length."""
        self.shift = shift
        self.register_buffer("sigmas", self.sigma(torch.arange(1, timesteps + 1) / timesteps))

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """sigma."""
        return sigma

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """The shifted sigma of an unshifted time."""
        return flux_time_shift(self.shift, 1.0, timestep)

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma at a progress of 0 (start) to 1 (end)."""
        return _flow_percent(percent, lambda t: flux_time_shift(self.shift, 1.0, t))


def _flow_percent(percent: float, shifted: Any) -> float:
    """Progress to sigma for flows, whose sigmas end at 1 and 0."""
    if percent <= 0.0:
        return 1.0
    if percent >= 1.0:
        return 0.0
    return shifted(1.0 - percent)


class StableCascadeSampling(ModelSamplingDiscrete):
    """Stable Cascade: a cosine schedule of signal variance whose log SNR is shifted by 2 log(1 / shift)."""

    def __init__(self, model_config: Any = None) -> None:
        _SigmaTable.__init__(self)
        self.set_parameters(_settings(model_config).get("shift", 1.0))

    def set_parameters(self, shift: float = 1.0, cosine_s: float = 8e-3) -> None:
        """Choose the shift and the cosine's offset."""
        self.shift = shift
        self.cosine_s = torch.tensor(cosine_s)
        self._first_variance = torch.cos(self.cosine_s / (1 + self.cosine_s) * math.pi * 0.5) ** 2
        self.num_timesteps = 10000
        times = torch.arange(1, self.num_timesteps + 1, dtype=torch.float32) / self.num_timesteps
        self.set_sigmas(self.sigma(times))

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Sigma at times of 0 to 1."""
        angle = (timestep + self.cosine_s) / (1 + self.cosine_s) * math.pi * 0.5
        variance = torch.cos(angle) ** 2 / self._first_variance
        if self.shift != 1.0:
            log_snr = torch.log(variance / (1 - variance)) + 2 * math.log(1.0 / self.shift)
            variance = torch.sigmoid(log_snr)
        variance = variance.clamp(0.0001, 0.9999)
        return torch.sqrt((1 - variance) / variance)

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time whose unshifted variance is 1 / (1 + sigma^2)."""
        variance = (1 / (sigma * sigma + 1)).clamp(0, 1)
        offset = self.cosine_s.to(sigma.device)
        angle = torch.sqrt(variance * self._first_variance.to(sigma.device)).acos()
        return angle / (math.pi * 0.5) * (1 + offset) - offset

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma at a progress of 0 (start) to 1 (end)."""
        if percent <= 0.0:
            return BEFORE_ANY_SIGMA
        if percent >= 1.0:
            return 0.0
        return self.sigma(torch.tensor(1.0 - percent)).item()
