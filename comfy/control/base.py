"""What all control networks share: hint, strength, range of steps, and the chain of networks of one conditioning.

Residuals are `{"input": [...], "middle": [...], "output": [...]}`: tensors (or None) for the blocks of the diffusion
model, whole on every rank: [B, L, C] of a transformer, [B, C, H, W] of a UNet.

A denoiser call may be cut by conditioning and by sample and its parts run on different ranks. So a conditioning's chain
works in two moments: `prepare_hints` on every rank, for the whole call, since encoding hints involves all of them;
`get_control` on each rank, once, for the rows it has.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

import comfy.image_scaling

KINDS = ("input", "middle", "output")
Residuals = dict[str, list[Any]]


class StrengthType(Enum):
    """How strength becomes a factor: the same for all residuals, or its power, rising towards the last one."""

    CONSTANT = 1
    LINEAR_UP = 2


def broadcast_image_to(tensor: torch.Tensor, target_batch_size: int, batched_number: int) -> torch.Tensor:
    """Hints [n, ...] for `batched_number` conditionings of the same samples: one stays one, others are repeated or cut."""
    if tensor.shape[0] == 1:
        return tensor
    samples = comfy.image_scaling.repeat_to_batch_size(tensor, target_batch_size // batched_number)
    return (
        samples if samples.shape[0] == target_batch_size else samples.repeat(batched_number, *[1] * (tensor.ndim - 1))
    )


class ControlBase:
    """A control network as one conditioning uses it; copies share the network itself."""

    def __init__(self) -> None:
        self.cond_hint_original: Any = None
        self.cond_hint: Any = None
        self.strength = 1.0
        self.timestep_percent_range = (0.0, 1.0)
        self.latent_format: Any = None
        self.vae: Any = None
        self.global_average_pooling = False
        self.timestep_range: tuple[float, float] | None = None
        self.compression_ratio = 8
        self.upscale_algorithm = "nearest-exact"
        self.extra_args: dict[str, Any] = {}
        self.previous_controlnet: Any = None
        self.extra_conds: list[str] = []
        self.strength_type = StrengthType.CONSTANT
        self.concat_mask = False
        self.extra_concat_orig: list[torch.Tensor] = []
        self.extra_concat: Any = None
        self.extra_hooks: Any = None
        self.preprocess_image: Any = _unchanged
        self._samples: tuple[int, int, int] | None = None

    # --- what nodes set ----------------------------------------------------------------------------------------------

    def set_cond_hint(
        self,
        cond_hint: torch.Tensor,
        strength: float = 1.0,
        timestep_percent_range: tuple[float, float] = (0.0, 1.0),
        vae: Any = None,
        extra_concat: list[torch.Tensor] | None = None,
    ) -> Any:
        """Pictures [n, 3, H, W] in 0..1, how strongly and from which to which share of the steps they act.

        vae: for networks that take latents; extra_concat: further channels, such as a mask [n, 1, H, W].
        """
        self.cond_hint_original = cond_hint
        self.strength = strength
        self.timestep_percent_range = timestep_percent_range
        if self.latent_format is not None:
            self.vae = vae
        self.extra_concat_orig = list(extra_concat or ())
        if self.concat_mask and not self.extra_concat_orig:
            self.extra_concat_orig.append(torch.ones(1, 1, 1, 1))
        return self

    def set_previous_controlnet(self, controlnet: Any) -> Any:
        """The network whose residuals this one's are added to."""
        self.previous_controlnet = controlnet
        return self

    def set_extra_arg(self, argument: str, value: Any = None) -> None:
        """An argument for the network itself."""
        self.extra_args[argument] = value

    # --- a sampling run ----------------------------------------------------------------------------------------------

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Before sampling: the range of steps as sigmas of `model`."""
        first, last = (percent_to_timestep_function(percent) for percent in self.timestep_percent_range)
        self.timestep_range = (first, last)
        if self.previous_controlnet is not None:
            self.previous_controlnet.pre_run(model, percent_to_timestep_function)

    def cleanup(self) -> None:
        """After sampling: forget what belongs to the run."""
        if self.previous_controlnet is not None:
            self.previous_controlnet.cleanup()
        self.cond_hint = None
        self.extra_concat = None
        self.timestep_range = None

    def is_active(self, sigma: torch.Tensor) -> bool:
        """Whether a call at `sigma` [B] is within the range of steps."""
        if self.timestep_range is None:
            return True
        first, last = self.timestep_range
        return bool(last <= sigma[0] <= first)

    def prepare_hints(self, x_noisy: torch.Tensor) -> None:
        """Make the hints of the whole chain for latents of this size; every rank calls it for the same latents."""
        if type(self).__module__.startswith(__package__):  # a pack's class has its own way with hints
            self.prepare_hint(x_noisy)
        prepare = getattr(self.previous_controlnet, "prepare_hints", None)
        if prepare is not None:
            prepare(x_noisy)

    def prepare_hint(self, x_noisy: torch.Tensor) -> None:
        """Make this network's hint for latents of this size, if it is not there."""

    def get_control(
        self, x_noisy: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], batched_number: int,
        transformer_options: Mapping[str, Any],
    ) -> Residuals | None:  # fmt: skip
        """Residuals of the chain for rows x_noisy [k*B, ...] at sigmas t, which are `batched_number` (k) conditionings."""
        raise NotImplementedError(f"{type(self).__name__} does not compute residuals")

    def previous_residuals(self, *args: Any) -> Residuals | None:
        """Those of the network before this one in the chain; `args` as for `get_control`."""
        return None if self.previous_controlnet is None else self.previous_controlnet.get_control(*args)

    # --- rows of a call ----------------------------------------------------------------------------------------------

    def for_samples(self, start: int, stop: int, total: int) -> Any:
        """The chain for the samples `start` to `stop` (exclusive) of a call of `total`.

        Raises ValueError when a network of the chain is foreign and cannot tell samples apart.
        """
        part = copy.copy(self)
        part._samples = (start, stop, total)
        before = self.previous_controlnet
        if before is not None:
            if not hasattr(before, "for_samples"):
                raise ValueError(f"{type(before).__name__} has to see all samples of a call")
            part.previous_controlnet = before.for_samples(start, stop, total)
        return part

    def hint_rows(self, hint: torch.Tensor, rows: int, batched_number: int) -> torch.Tensor:
        """Of hints for the samples [n, ...] those of the rows that are here: one row, or `rows` of them."""
        if hint.shape[0] == 1:
            return hint
        if self._samples is not None:
            start, stop, total = self._samples
            hint = comfy.image_scaling.repeat_to_batch_size(hint, total)[start:stop]
            if hint.shape[0] == 1:
                return hint
        return broadcast_image_to(hint, rows, batched_number)

    # --- results -----------------------------------------------------------------------------------------------------

    def control_merge(
        self, control: Mapping[str, Any], control_prev: Residuals | None, output_dtype: torch.dtype | None
    ) -> Residuals:
        """This network's residuals, weighted by its strength, plus the chain's.

        Tensors that stand for several blocks stay one tensor, so that they are in memory once.
        """
        out: Residuals = {kind: [] for kind in KINDS}
        weighted: dict[int, torch.Tensor] = {}
        for kind, values in control.items():
            for i, value in enumerate(values):
                if value is not None and id(value) not in weighted:
                    weighted[id(value)] = self._weighted(value, len(values) - i, output_dtype)
                out[kind].append(None if value is None else weighted[id(value)])
        return out if control_prev is None else {kind: _sums(out[kind], control_prev[kind]) for kind in KINDS}

    def _weighted(self, value: torch.Tensor, from_end: int, dtype: torch.dtype | None) -> torch.Tensor:
        if self.global_average_pooling:
            value = value.mean(dim=(2, 3), keepdim=True).expand_as(value)
        factor = self.strength
        if self.strength_type is StrengthType.LINEAR_UP:
            factor = self.strength ** float(from_end)
        value = value if factor == 1.0 else value * factor
        return value if dtype is None else value.to(dtype)

    # --- the object --------------------------------------------------------------------------------------------------

    def get_models(self) -> list[Any]:
        """Patchers of the chain's networks, which must be on the device."""
        return [] if self.previous_controlnet is None else self.previous_controlnet.get_models()

    def get_extra_hooks(self) -> list[Any]:
        """Hook groups of the chain."""
        own = [] if self.extra_hooks is None else [self.extra_hooks]
        return own + ([] if self.previous_controlnet is None else self.previous_controlnet.get_extra_hooks())

    def inference_memory_requirements(self, dtype: torch.dtype | None) -> float:
        """Bytes beyond the weights that the chain needs."""
        before = self.previous_controlnet
        return 0 if before is None else before.inference_memory_requirements(dtype)

    def copy_to(self, c: Any) -> None:
        """Give another object this one's settings; not its place in a chain, nor what belongs to a run."""
        for name in (
            "cond_hint_original", "strength", "timestep_percent_range", "global_average_pooling", "compression_ratio",
            "upscale_algorithm", "latent_format", "vae", "strength_type", "concat_mask", "preprocess_image",
        ):  # fmt: skip
            setattr(c, name, getattr(self, name))
        for name in ("extra_args", "extra_conds", "extra_concat_orig"):
            setattr(c, name, copy.copy(getattr(self, name)))
        c.extra_hooks = self.extra_hooks.clone() if self.extra_hooks else None


def _unchanged(image: torch.Tensor) -> torch.Tensor:
    return image


def _sums(own: list[Any], before: list[Any]) -> list[Any]:
    """Residuals block by block; one that only one of them has stays as it is."""
    made: dict[tuple[int, int], torch.Tensor] = {}
    out = []
    for i in range(max(len(own), len(before))):
        a, b = (values[i] if i < len(values) else None for values in (before, own))
        if a is None or b is None:
            out.append(b if a is None else a)
            continue
        if (id(a), id(b)) not in made:
            made[id(a), id(b)] = a + b
        out.append(made[id(a), id(b)])
    return out
