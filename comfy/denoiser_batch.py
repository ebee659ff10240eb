"""One denoiser call in pieces that can run anywhere: the seam between sampling and parallel execution.

`comfy.samplers.calc_cond_batch` groups conditionings into batches and hands them over as `DenoiserBatch` objects. The
patcher of the model evaluates them: here one after the other, in a parallel patcher spread over ranks. A batch can be
cut by conditioning and by sample; both cuts give a smaller batch with the same meaning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from comfy.ldm.dit_state import DenoiserCall

# Entries of `transformer_options` that have one element per conditioning.
_PER_COND_OPTIONS = ("cond_or_uncond", "uuids")


@dataclasses.dataclass
class DenoiserBatch:
    """`k` conditionings of a batch of `B` samples, as arguments of one `apply_model` call.

    x: noisy latents [k*B, C, ...]; row `j*B + b` is sample `b` under conditioning `j`.
    sigma: [k*B].
    conditioning: keyword arguments of `apply_model`: tensors with k*B rows, lists and dicts of them (reference
        latents; control residuals), constants, and `transformer_options`.
    cond_or_uncond: for each conditioning, its place in the list given to `calc_cond_batch` (0 positive, 1 negative).
    batch_size: B.
    constant_keys: keys of `conditioning` that are the same for every row and never cut.
    control: the chain of control networks, evaluated with the batch, for the rows that it has then; None without.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    conditioning: dict[str, Any]
    cond_or_uncond: list[int]
    batch_size: int
    constant_keys: frozenset[str] = frozenset()
    control: Any = None

    @property
    def num_conds(self) -> int:
        """k."""
        return len(self.cond_or_uncond)

    def select_conds(self, indices: Sequence[int]) -> DenoiserBatch:
        """The batch with only the conditionings at `indices` (0 .. k-1), in that order.

        Raises ValueError when a tensor's rows do not tell conditionings apart; such a batch must run whole.
        """
        indices = list(indices)
        if not indices or not all(0 <= j < self.num_conds for j in indices):
            raise ValueError(f"conditionings {indices} of a batch that has {self.num_conds}")
        return self._select(indices, 0, self.batch_size)

    def select_samples(self, start: int, stop: int) -> DenoiserBatch:
        """The batch with only the samples `start` to `stop` (exclusive) of every conditioning.

        Raises ValueError as `select_conds` does.
        """
        if not 0 <= start < stop <= self.batch_size:
            raise ValueError(f"samples {start} to {stop} of a batch of {self.batch_size}")
        return self._select(list(range(self.num_conds)), start, stop)

    def within(self, call: DenoiserCall) -> DenoiserBatch:
        """The batch with `transformer_options` that carry `call` to the network."""
        options = call.within(self.conditioning.get("transformer_options"))
        return dataclasses.replace(self, conditioning={**self.conditioning, "transformer_options": options})

    def _select(self, conds: list[int], start: int, stop: int) -> DenoiserBatch:
        cut = _Cut(conds, start, stop, self.batch_size, self.num_conds)
        conditioning = {}
        for key, value in self.conditioning.items():
            if key == "transformer_options":
                conditioning[key] = cut.options(value)
            elif key in self.constant_keys:
                conditioning[key] = value
            else:
                conditioning[key] = cut.value(value, key)
        return DenoiserBatch(
            x=cut.rows(self.x),
            sigma=cut.rows(self.sigma),
            conditioning=conditioning,
            cond_or_uncond=[self.cond_or_uncond[j] for j in conds],
            batch_size=stop - start,
            constant_keys=self.constant_keys,
            control=self._control_of(start, stop),
        )

    def _control_of(self, start: int, stop: int) -> Any:
        if self.control is None or (start, stop) == (0, self.batch_size):
            return self.control
        if not hasattr(self.control, "for_samples"):
            raise ValueError(
                f"{type(self.control).__name__} has to see all samples of a call; this batch has to run whole"
            )
        return self.control.for_samples(start, stop, self.batch_size)

    def with_residuals(self) -> DenoiserBatch:
        """The batch with its control networks' residuals under `control` in `conditioning`."""
        if self.control is None:
            return self
        options = self.conditioning.get("transformer_options", {})
        residuals = self.control.get_control(self.x, self.sigma, self.conditioning, self.num_conds, options)
        return dataclasses.replace(self, conditioning={**self.conditioning, "control": residuals}, control=None)


class _Cut:
    """Which rows of tensors with k*B rows stay."""

    def __init__(self, conds: list[int], start: int, stop: int, batch_size: int, num_conds: int) -> None:
        self.conds, self.start, self.stop = conds, start, stop
        self.batch_size, self.num_conds = batch_size, num_conds
        self.total = batch_size * num_conds

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows that stay; a view where they are contiguous."""
        first, last = self.conds[0], self.conds[-1]
        whole_samples = self.start == 0 and self.stop == self.batch_size
        if self.conds == list(range(first, last + 1)) and (whole_samples or first == last):
            begin = first * self.batch_size + self.start
            return tensor[begin : last * self.batch_size + self.stop]
        pieces = [tensor[j * self.batch_size + self.start : j * self.batch_size + self.stop] for j in self.conds]
        return torch.cat(pieces)

    def value(self, value: Any, name: str) -> Any:
        """A conditioning value of any structure, cut."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value, name)
        if isinstance(value, dict):
            return {key: self.value(item, f"{name}.{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.value(item, f"{name}[{i}]") for i, item in enumerate(value))
        return value

    def _tensor(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if tensor.ndim == 0 or tensor.shape[0] == 1 != self.total:
            return tensor
        if tensor.shape[0] == self.total:
            return self.rows(tensor)
        raise ValueError(
            f"conditioning {name} has {tensor.shape[0]} rows where {self.num_conds} conditionings of "
            f"{self.batch_size} samples need {self.total}; this batch cannot be cut and has to run whole"
        )

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        """`transformer_options` for the rows that stay; everything else in it is shared."""
        options = dict(options)
        for key in _PER_COND_OPTIONS:
            if len(options.get(key) or ()) == self.num_conds:
                options[key] = [options[key][j] for j in self.conds]
        sigmas = options.get("sigmas")
        if isinstance(sigmas, torch.Tensor) and sigmas.ndim and sigmas.shape[0] == self.batch_size:
            options["sigmas"] = sigmas[self.start : self.stop]
        return options


def evaluate_batch(model: Any, batch: DenoiserBatch, model_options: dict[str, Any]) -> torch.Tensor:
    """The denoised prediction [k*B, C, ...] of one batch, through the custom node's wrapper if there is one."""
    batch = batch.with_residuals()
    wrapper = model_options.get("model_function_wrapper")
    if wrapper is None:
        return model.apply_model(batch.x, batch.sigma, **batch.conditioning)
    call = {
        "input": batch.x,
        "timestep": batch.sigma,
        "c": batch.conditioning,
        "cond_or_uncond": batch.cond_or_uncond,
    }
    return wrapper(model.apply_model, call)


def evaluate_serially(
    model: Any, batches: Sequence[DenoiserBatch], model_options: dict[str, Any]
) -> list[torch.Tensor]:
    """The denoised predictions of all batches, one after the other on this process."""
    return [evaluate_batch(model, batch, model_options) for batch in batches]
