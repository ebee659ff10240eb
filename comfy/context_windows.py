"""Long latents in overlapping windows: each step predicts the windows one by one and blends their predictions.

A handler of this module goes into `model_options["context_handler"]`; `comfy.cond_batching` asks it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import comfy.model_management
import comfy.patcher_extension

Window = list[int]
STATIC, UNIFORM, LOOPED, BATCHED = "standard_static", "standard_uniform", "looped_uniform", "batched"
PYRAMID, RELATIVE, FLAT, OVERLAP_LINEAR = "pyramid", "relative", "flat", "overlap-linear"


# ---- which windows ---------------------------------------------------------------------------------------------------


def ordered_halving(step: int) -> float:
    """Step numbers spread over 0 to 1 with every gap halved in turn: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    share, weight = 0.0, 0.5
    while step:
        share += weight * (step & 1)
        step >>= 1
        weight /= 2
    return share


def _static(frames: int, handler: IndexListContextHandler) -> list[Window]:
    """Windows one after the other; the last one is moved back so that it is full."""
    length = handler.context_length
    starts = list(range(0, frames, length - handler.context_overlap))
    kept = [start for start in starts if start + length < frames]
    return [list(range(start, start + length)) for start in [*kept, frames - length]]


def _batched(frames: int, handler: IndexListContextHandler) -> list[Window]:
    """Cut without overlap."""
    length = handler.context_length
    return [list(range(start, min(start + length, frames))) for start in range(0, frames, length)]


def _strided(frames: int, handler: IndexListContextHandler, loops: bool) -> list[Window]:
    """Windows with a distance of 1, 2, 4, ... frames, moved at each step; they go round past the end."""
    length, overlap = handler.context_length, handler.context_overlap
    shift = ordered_halving(handler.step)
    pad = round(frames * shift)
    windows = []
    for power in range(min(handler.context_stride, math.ceil(math.log2(frames / length)) + 1)):
        distance = 1 << power
        end = frames + pad - (0 if loops else overlap)
        for start in range(int(shift * distance) + pad, end, length * distance - overlap):
            windows.append([frame % frames for frame in range(start, start + length * distance, distance)])
    return windows


def _looped(frames: int, handler: IndexListContextHandler) -> list[Window]:
    return _strided(frames, handler, handler.closed_loop)


def _wrap_place(window: Window) -> int | None:
    """Where a window goes back to the beginning."""
    for place, (before, after) in enumerate(zip(window, window[1:]), start=1):
        if after < before:
            return place
    return None


def _uniform(frames: int, handler: IndexListContextHandler) -> list[Window]:
    """As looped, but a window past the end is moved to the end, and another begins where it went round."""
    waiting = _strided(frames, handler, False)
    windows: list[Window] = []
    while waiting:
        window = waiting.pop(0)
        place = _wrap_place(window)
        if place is not None:
            again = window[place]
            offsets = [(frame - window[0]) % frames for frame in window]
            window = [offset + frames - 1 - offsets[-1] for offset in offsets]
            following = waiting[0] if waiting else (windows or [window])[0]
            if again not in following:
                waiting.insert(0, list(range(again, again + handler.context_length)))
        if window not in windows:
            windows.append(window)
    return windows


SCHEDULES: dict[str, Callable[[int, IndexListContextHandler], list[Window]]] = {
    STATIC: _static,
    UNIFORM: _uniform,
    LOOPED: _looped,
    BATCHED: _batched,
}

# ---- how they are blended --------------------------------------------------------------------------------------------


def _flat(window: Window, frames: int, handler: IndexListContextHandler) -> torch.Tensor:
    return torch.ones(len(window))


def _pyramid(window: Window, frames: int, handler: IndexListContextHandler) -> torch.Tensor:
    """1, 2, 3, ... to the middle and back."""
    position = torch.arange(len(window))
    return torch.minimum(position, position.flip(0)).float() + 1


def _overlap_linear(window: Window, frames: int, handler: IndexListContextHandler) -> torch.Tensor:
    """Ramps where windows overlap, except at the ends of the latent."""
    weights, overlap = torch.ones(len(window)), handler.context_overlap
    if overlap and min(window) > 0:
        weights[:overlap] = torch.linspace(1e-37, 1, overlap)
    if overlap and max(window) < frames - 1:
        weights[-overlap:] = torch.linspace(1, 1e-37, overlap)
    return weights


def _relative(window: Window, frames: int, handler: IndexListContextHandler) -> torch.Tensor:
    """Nearness to the middle of the window, in its frame numbers."""
    first, last = window[0], window[-1]
    away = (torch.tensor(window, dtype=torch.float64) - (first + last) / 2).abs() / ((last - first + 1e-2) / 2)
    return (1 - away).clamp(min=1e-2).float()


FUSE_METHODS: dict[str, Callable[[Window, int, IndexListContextHandler], torch.Tensor]] = {
    PYRAMID: _pyramid,
    RELATIVE: _relative,
    FLAT: _flat,
    OVERLAP_LINEAR: _overlap_linear,
}


def _chosen(table: dict[str, Any], what: str, name: str) -> Any:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(table)}")
    return table[name]


def get_matching_context_schedule(context_schedule: str) -> ContextSchedule:
    """The schedule of a name. Raises ValueError for an unknown one."""
    return ContextSchedule(context_schedule, _chosen(SCHEDULES, "context_schedule", context_schedule))


def get_matching_fuse_method(fuse_method: str) -> ContextFuseMethod:
    """The fuse method of a name. Raises ValueError for an unknown one."""
    return ContextFuseMethod(fuse_method, _chosen(FUSE_METHODS, "fuse_method", fuse_method))


class ContextSchedules:
    """ComfyUI's names of the schedules."""

    STATIC_STANDARD = STATIC
    UNIFORM_STANDARD = UNIFORM
    UNIFORM_LOOPED = LOOPED
    BATCHED = BATCHED


class ContextFuseMethods:
    """ComfyUI's names of the fuse methods, and the lists that nodes offer."""

    FLAT = FLAT
    PYRAMID = PYRAMID
    RELATIVE = RELATIVE
    OVERLAP_LINEAR = OVERLAP_LINEAR
    LIST = (PYRAMID, FLAT, OVERLAP_LINEAR)
    LIST_STATIC = (PYRAMID, RELATIVE, FLAT, OVERLAP_LINEAR)


@dataclass(frozen=True)
class ContextSchedule:
    """How windows are chosen: `func(frames, handler)`."""

    name: str
    func: Callable[[int, IndexListContextHandler], list[Window]]


@dataclass(frozen=True)
class ContextFuseMethod:
    """How windows are blended: weights per frame of `func(window, frames, handler)`."""

    name: str
    func: Callable[[Window, int, IndexListContextHandler], torch.Tensor]


# ---- the handler -----------------------------------------------------------------------------------------------------


class IndexListContextWindow:
    """Some frames of an axis."""

    def __init__(self, index_list: Window, dim: int = 0) -> None:
        self.index_list = index_list
        self.context_length = len(index_list)
        self.dim = dim

    def get_tensor(self, full: torch.Tensor) -> torch.Tensor:
        """The window's part of a tensor; a batch of one is for all frames."""
        if self.dim == 0 and full.shape[0] == 1:
            return full
        return full.index_select(self.dim, torch.tensor(self.index_list, device=full.device))

    def add_window(self, full: torch.Tensor, to_add: torch.Tensor) -> torch.Tensor:
        """Add the window's part to the full tensor, in place."""
        return full.index_add_(self.dim, torch.tensor(self.index_list, device=full.device), to_add)


class IndexListContextHandler:
    """Predicts latents that are longer than `context_length` on axis `dim` in windows."""

    def __init__(
        self,
        context_schedule: ContextSchedule,
        fuse_method: ContextFuseMethod,
        context_length: int = 1,
        context_overlap: int = 0,
        context_stride: int = 1,
        closed_loop: bool = False,
        dim: int = 0,
    ) -> None:
        if context_overlap >= context_length:
            raise ValueError(
                f"context_overlap is {context_overlap}, which leaves nothing new in a window of context_length "
                f"{context_length}; use at most {context_length - 1}"
            )
        self.context_schedule = context_schedule
        self.fuse_method = fuse_method
        self.context_length = context_length
        self.context_overlap = context_overlap
        self.context_stride = context_stride
        self.closed_loop = closed_loop
        self.dim = dim
        self.step = 0

    def should_use_context(
        self, model: Any, conds: Any, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
    ) -> bool:
        """Whether x [B, C, ...] is longer than a window."""
        if self.dim >= x_in.ndim:
            raise ValueError(
                f"context windows on axis {self.dim}, but the latent has {x_in.ndim} axes; use a lower dim"
            )
        frames = x_in.shape[self.dim]
        if frames <= self.context_length:
            return False
        logging.info("Using context windows %s for %s frames.", self.context_length, frames)
        return True

    def set_step(self, timestep: torch.Tensor, model_options: dict[str, Any]) -> None:
        """Find the step's number; in between (solvers of higher order) the last one stays."""
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        matches = torch.nonzero(torch.isclose(sigmas, timestep[0].to(sigmas), rtol=1e-4))
        if len(matches):
            self.step = int(matches[0])

    def get_context_windows(self, x_in: torch.Tensor) -> list[IndexListContextWindow]:
        windows = self.context_schedule.func(x_in.shape[self.dim], self)
        return [IndexListContextWindow(window, self.dim) for window in windows]

    def _part(self, value: Any, x_in: torch.Tensor, window: IndexListContextWindow) -> Any:
        """What belongs to a window, of a conditioning's value."""
        if isinstance(value, dict):
            return {key: self._part(item, x_in, window) for key, item in value.items()}
        tensor = value if isinstance(value, torch.Tensor) else getattr(value, "cond", None)
        if not isinstance(tensor, torch.Tensor) or tensor.ndim <= self.dim:
            return value
        if tensor.shape[self.dim] != x_in.shape[self.dim]:
            return value
        part = window.get_tensor(tensor)
        return part if tensor is value else value._copy_with(part)

    def get_resized_cond(self, cond_in: Any, x_in: torch.Tensor, window: IndexListContextWindow) -> Any:
        """A conditioning for a window: tensors as long as the latent are cut."""
        return None if cond_in is None else [self._part(cond, x_in, window) for cond in cond_in]

    def execute(
        self,
        calc_cond_batch: Any,
        model: Any,
        conds: list[Any],
        x_in: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any],
    ) -> list[torch.Tensor]:
        """The predictions of all windows, blended."""
        self.set_step(timestep, model_options)
        frames = x_in.shape[self.dim]
        shape = [1] * x_in.ndim
        shape[self.dim] = -1
        total = [torch.zeros_like(x_in) for _ in conds]
        weight_sum = torch.zeros(frames, device=x_in.device, dtype=x_in.dtype)
        for window in self.get_context_windows(x_in):
            comfy.model_management.throw_exception_if_processing_interrupted()
            model_options["transformer_options"]["context_window"] = window
            times = window.get_tensor(timestep) if self.dim == 0 else timestep
            parts = [self.get_resized_cond(cond, x_in, window) for cond in conds]
            outputs = calc_cond_batch(model, parts, window.get_tensor(x_in), times, model_options)
            weights = self.fuse_method.func(window.index_list, frames, self).to(x_in)
            weight_sum.index_add_(0, torch.tensor(window.index_list, device=x_in.device), weights)
            for full, output in zip(total, outputs):
                window.add_window(full, output * weights.view(shape))
        return [full / weight_sum.view(shape) for full in total]


def _prepare(executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
    """PREPARE_SAMPLING: memory is needed for a window, not for all frames."""
    handler = model.model_options.get("context_handler")
    if handler is not None:
        noise_shape = list(noise_shape)
        noise_shape[handler.dim] = min(noise_shape[handler.dim], handler.context_length)
    return executor(model, noise_shape, *args, **kwargs)


def create_prepare_sampling_wrapper(model: Any) -> None:
    """Let a patcher's memory estimate know of its windows."""
    kind = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    model.add_wrapper_with_key(kind, "ContextWindows_prepare_sampling", _prepare)
