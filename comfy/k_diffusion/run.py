"""What every solver shares: one sampling run over a list of sigmas, and the algebra of noise levels.

Solvers work on Python floats for sigmas and coefficients, read once at the start: scaling a latent by a number costs
no synchronisation with the device, and the arithmetic is double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm.auto import trange

from comfy.model_sampling import CONST

Callback = Callable[[dict[str, Any]], None]  # gets x, i, sigma, sigma_hat and denoised after each evaluation
NoiseSampler = Callable[..., torch.Tensor]  # (sigma, sigma_next) -> unit noise shaped like the latent


def to_d(x: torch.Tensor, sigma: Any, denoised: torch.Tensor) -> torch.Tensor:
    """The slope dx/dsigma of the probability flow (Karras et al. 2022): (x - denoised) / sigma.

    `sigma` is a number or a tensor of `[B]`.
    """
    if isinstance(sigma, torch.Tensor) and sigma.ndim:
        sigma = sigma.view(sigma.shape + (1,) * (x.ndim - sigma.ndim))
    return (x - denoised) / sigma


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """(sigma_down, sigma_up): step down to sigma_down, then add noise of sigma_up to arrive at `sigma_to`."""
    if not eta:
        return sigma_to, 0.0
    up = eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5
    sigma_up = min(sigma_to, up)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


def flow_ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float, float]:
    """The ancestral step of a rectified flow: (sigma_down, scale, noise).

    x at sigma_down, times `scale`, plus `noise` * N(0, 1) has the signal and the noise of `sigma_next`.
    """
    sigma_down = sigma_next * (1.0 + (sigma_next / sigma - 1.0) * eta)
    scale = (1.0 - sigma_next) / (1.0 - sigma_down)
    return sigma_down, scale, math.sqrt(max(sigma_next**2 - (sigma_down * scale) ** 2, 0.0))


def sigma_to_half_log_snr(sigma: Any, model_sampling: Any) -> Any:
    """lambda = log(alpha / sigma): -logit(sigma) for flows, -log(sigma) otherwise. Numbers or tensors."""
    flow = isinstance(model_sampling, CONST)
    if isinstance(sigma, torch.Tensor):
        return sigma.logit().neg() if flow else sigma.log().neg()
    if sigma <= 0.0:
        return math.inf
    return math.log((1.0 - sigma) / sigma) if flow else -math.log(sigma)


def half_log_snr_to_sigma(half_log_snr: Any, model_sampling: Any) -> Any:
    """The inverse of `sigma_to_half_log_snr`."""
    flow = isinstance(model_sampling, CONST)
    if isinstance(half_log_snr, torch.Tensor):
        return half_log_snr.neg().sigmoid() if flow else half_log_snr.neg().exp()
    return 1.0 / (1.0 + math.exp(half_log_snr)) if flow else math.exp(-half_log_snr)


def offset_first_sigma_for_snr(sigmas: torch.Tensor, model_sampling: Any, percent_offset: float = 1e-4) -> torch.Tensor:
    """A flow's first sigma of 1 has no signal at all and log SNR -inf: start a hair's breadth later."""
    flow = isinstance(model_sampling, CONST)
    if len(sigmas) > 1 and flow and sigmas[0] >= 1:
        sigmas = sigmas.clone()
        sigmas[0] = model_sampling.percent_to_sigma(percent_offset)
    return sigmas


class SamplingRun:
    """One run of a solver: the model bound to its arguments, the schedule as floats, progress and noise.

    `model(x, sigma [B], **extra_args)` returns the denoised latent; `x` is `[B, C, ...]`; `sigmas` [n + 1] decreases.
    `noise_sampler(sigma, sigma_next)` returns unit noise shaped like x; by default a generator seeded with
    `extra_args["seed"]`. With `offset_first`, a flow's schedule starts just below 1 (for solvers in log SNR).
    """

    def __init__(
        self,
        model: Any,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callback | None = None,
        disable: bool | None = None,
        noise_sampler: NoiseSampler | None = None,
        offset_first: bool = False,
    ) -> None:
        self.model = model
        self.extra_args = {} if extra_args is None else extra_args
        self.callback = callback
        self.disable = disable
        # The Brownian path spans the schedule as it was asked for.
        positive = [sigma for sigma in sigmas.tolist() if sigma > 0]
        self._lowest: float = min(positive, default=0.0)
        self._highest: float = max(positive, default=0.0)
        if offset_first:
            sigmas = offset_first_sigma_for_snr(sigmas, self.model_sampling)
        self.sigmas = sigmas
        self.host_sigmas = sigmas.detach().cpu()
        self.levels: list[float] = self.host_sigmas.tolist()
        self.ones = x.new_ones([x.shape[0]])
        self._noise_sampler = noise_sampler
        self._x = x

    @property
    def model_sampling(self) -> Any:
        """The `model_sampling` behind the guider that solvers get as their model."""
        return self.model.inner_model.inner_model.model_sampling

    @property
    def is_flow(self) -> bool:
        """Whether x = (1 - sigma) latent + sigma noise."""
        return isinstance(self.model_sampling, CONST)

    def half_log_snr(self, sigma: float) -> float:
        """log(alpha / sigma)."""
        return sigma_to_half_log_snr(sigma, self.model_sampling)

    def sigma_of(self, half_log_snr: float) -> float:
        """The sigma of a log SNR, as the float32 value that the model will see."""
        return half_log_snr_to_sigma(half_log_snr, self.model_sampling)

    def alpha_of(self, sigma: float) -> float:
        """The signal's factor: 1 - sigma for flows, 1 otherwise."""
        return 1.0 - sigma if self.is_flow else 1.0

    def steps(self) -> Iterator[tuple[int, float, float]]:
        """(index, sigma, next sigma) of every step, with a progress bar."""
        for i in trange(len(self.levels) - 1, disable=self.disable):
            yield i, self.levels[i], self.levels[i + 1]

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """The denoised prediction at `sigma`."""
        return self.model(x, self.ones * sigma, **self.extra_args)

    def report(
        self, i: int, x: torch.Tensor, denoised: torch.Tensor, sigma_hat: float | None = None, **more: Any
    ) -> None:
        """Tell the callback about step `i`."""
        if self.callback is None:
            return
        sigma = self.sigmas[i]
        hat = sigma if sigma_hat is None or sigma_hat == self.levels[i] else sigma * (sigma_hat / self.levels[i])
        self.callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": hat, "denoised": denoised, **more})

    def noise(self, sigma: float, sigma_next: float) -> torch.Tensor:
        """Unit noise for going from `sigma` to `sigma_next` (given to the noise sampler as host tensors)."""
        if self._noise_sampler is None:
            # Looked up late: custom nodes replace the module's default.
            from comfy.k_diffusion import sampling

            self._noise_sampler = sampling.default_noise_sampler(self._x, seed=self.extra_args.get("seed"))
        return self._noise_sampler(torch.tensor(sigma), torch.tensor(sigma_next))

    def use_brownian_noise(self, cpu: bool = True) -> None:
        """Unless a noise sampler was given, draw from one Brownian path over the schedule."""
        if self._noise_sampler is None:
            from comfy.k_diffusion import sampling

            self._noise_sampler = sampling.BrownianTreeNoiseSampler(
                self._x, self._lowest, self._highest, seed=self.extra_args.get("seed"), cpu=cpu
            )

    def churn(
        self, x: torch.Tensor, sigma: float, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
    ) -> tuple[torch.Tensor, float]:
        """Karras' stochastic churn: x raised to a slightly higher sigma_hat. Returns (x, sigma_hat)."""
        if s_churn <= 0 or not s_tmin <= sigma <= s_tmax:
            return x, sigma
        gamma = min(s_churn / (len(self.levels) - 1), math.sqrt(2.0) - 1.0)
        sigma_hat = sigma * (1.0 + gamma)
        return x + torch.randn_like(x) * (s_noise * math.sqrt(sigma_hat**2 - sigma**2)), sigma_hat

    def watch_unconditional(self) -> dict[str, torch.Tensor]:
        """A dict whose "uncond" is the unconditional prediction of the latest call (forces the negative pass)."""
        from comfy.model_patcher import set_model_options_post_cfg_function

        seen: dict[str, torch.Tensor] = {}

        def remember(args: dict[str, Any]) -> torch.Tensor:
            seen["uncond"] = args["uncond_denoised"]
            return args["denoised"]

        options = set_model_options_post_cfg_function(
            dict(self.extra_args.get("model_options", {})), remember, disable_cfg1_optimization=True
        )
        self.extra_args = {**self.extra_args, "model_options": options}
        return seen
