"""Strength of a hook over the progress of sampling."""

from __future__ import annotations

from typing import Any

import torch


class InterpolationMethod:
    """Ways to go from one strength to another."""

    LINEAR = "linear"
    EASE_IN = "ease_in"
    EASE_OUT = "ease_out"
    EASE_IN_OUT = "ease_in_out"
    _LIST = [LINEAR, EASE_IN, EASE_OUT, EASE_IN_OUT]

    @classmethod
    def get_weights(
        cls, num_from: float, num_to: float, length: int, method: str, reverse: bool = False
    ) -> torch.Tensor:
        """`length` values from `num_from` to `num_to`."""
        share = torch.linspace(0, 1, length)
        curves = {
            cls.LINEAR: share,
            cls.EASE_IN: share**2,
            cls.EASE_OUT: 1 - (1 - share) ** 2,
            cls.EASE_IN_OUT: 3 * share**2 - 2 * share**3,
        }
        if method not in curves:
            raise ValueError(f"unknown interpolation {method!r}; choose one of {', '.join(cls._LIST)}")
        weights = num_from + (num_to - num_from) * curves[method]
        return weights.flip(dims=(0,)) if reverse else weights


class HookKeyframe:
    """A strength from `start_percent` of the progress on, held for at least `guarantee_steps` steps."""

    def __init__(self, strength: float, start_percent: float = 0.0, guarantee_steps: int = 1) -> None:
        self.strength = strength
        self.start_percent = float(start_percent)
        self.start_t = 999999999.9
        self.guarantee_steps = guarantee_steps

    def get_effective_guarantee_steps(self, max_sigma: torch.Tensor) -> int:
        """Guaranteed steps; none for a keyframe that lies before the first sigma."""
        return 0 if self.start_percent > 0.0 and self.start_t > max_sigma else self.guarantee_steps

    def clone(self) -> HookKeyframe:
        """A copy."""
        other = HookKeyframe(self.strength, self.start_percent, self.guarantee_steps)
        other.start_t = self.start_t
        return other


class HookKeyframeGroup:
    """Keyframes in order of progress, and which of them holds now."""

    def __init__(self) -> None:
        self.keyframes: list[HookKeyframe] = []
        self.reset()

    @property
    def strength(self) -> float:
        """The current keyframe's strength, 1 without keyframes."""
        return 1.0 if self._current is None else self._current.strength

    def reset(self) -> None:
        """Go back to the first keyframe."""
        self._index = 0
        self._used_steps = 0
        self._current_t = -1.0
        self._current = self.keyframes[0] if self.keyframes else None

    def add(self, keyframe: HookKeyframe) -> None:
        """Insert a keyframe at its place."""
        self.keyframes = sorted([*self.keyframes, keyframe], key=lambda frame: frame.start_percent)
        self.reset()

    def is_empty(self) -> bool:
        """Whether there is none."""
        return not self.keyframes

    def has_index(self, index: int) -> bool:
        """Whether there is a keyframe number `index`."""
        return 0 <= index < len(self.keyframes)

    def keyframe_at(self, percent: float) -> HookKeyframe:
        """The keyframe that holds at a progress."""
        started = [frame for frame in self.keyframes if frame.start_percent <= percent]
        return started[-1] if started else self.keyframes[0]

    def select(self, keyframe: HookKeyframe | None) -> None:
        """Let one keyframe hold, whatever the progress; None leaves the current one."""
        if keyframe is not None:
            self._current = keyframe
            self._index = self.keyframes.index(keyframe)

    def clone(self) -> HookKeyframeGroup:
        """A group of the same keyframes, at its beginning."""
        other = HookKeyframeGroup()
        other.keyframes = list(self.keyframes)
        other.reset()
        return other

    def initialize_timesteps(self, model: Any) -> None:
        """Turn progress into sigmas of this model and go back to the first keyframe."""
        for keyframe in self.keyframes:
            keyframe.start_t = model.model_sampling.percent_to_sigma(keyframe.start_percent)
        self.reset()

    def prepare_current_keyframe(
        self, curr_t: float | torch.Tensor, transformer_options: dict[str, Any] | None = None
    ) -> bool:
        """Move on to the keyframe that holds at sigma `curr_t`; returns whether the strength changed.

        Progress turned into sigmas is in double precision. Sigmas of steps are float32, and so is the comparison with
        them: else a keyframe that begins exactly at a step would begin one step later.
        """
        current_t = float(curr_t)
        if self.is_empty() or current_t == self._current_t:
            return False
        before = self._index
        options = transformer_options or {}
        sigmas = options.get("sample_sigmas")
        highest = sigmas[0] if sigmas is not None else torch.tensor(current_t)
        assert self._current is not None
        if self._used_steps >= self._current.get_effective_guarantee_steps(highest):
            for i in range(self._index + 1, len(self.keyframes)):
                candidate = self.keyframes[i]
                if candidate.start_t < curr_t:  # in the precision of `curr_t`
                    break
                self._index, self._current, self._used_steps = i, candidate, 0
                if candidate.get_effective_guarantee_steps(highest) > 0:
                    break
        self._used_steps += 1
        self._current_t = current_t
        return self._index != before
