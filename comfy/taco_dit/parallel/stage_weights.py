"""The weights of a network in pipeline stages: each rank holds the blocks of its stage, and all that is not in a block."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from torch import nn

from comfy.ldm.dit_state import DiTState
from comfy.weights.held import Held

from .tensor_parallel import TensorWeights


class StageWeights:
    """Which blocks of a network this rank has.

    blocks: all of them in order, by their path in the store's model. stages: [start, stop) of each stage's blocks. stage:
    this rank's. cut: how the linears of its blocks are cut besides, None when they are whole.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        stages: Sequence[tuple[int, int]],
        stage: int,
        cut: TensorWeights | None = None,
    ) -> None:
        self._stages, self._cut = stages, cut
        listed = list(blocks.items())
        start, stop = stages[stage]
        self._elsewhere = {path: module for i, (path, module) in enumerate(listed) if not start <= i < stop}
        self._stage_of = {
            id(module): next(s for s, (first, last) in enumerate(stages) if first <= i < last)
            for i, (_, module) in enumerate(listed)
        }
        self._name_of = {id(module): path for path, module in listed}

    def held(self) -> dict[str, Held]:
        """What this rank holds, by key of the model's weights; of all others the whole."""
        out = {} if self._cut is None else self._cut.held()
        for path, module in self._elsewhere.items():
            out.update({f"{path}.{name}": Held() for name, _ in (*module.named_parameters(), *module.named_buffers())})
        return out

    def install(self) -> None:
        """Let blocks of other stages say that they are not here."""
        if self._cut is not None:
            self._cut.install()
        for module in self._elsewhere.values():
            vars(module)["arranged_weights"] = self

    def uninstall(self) -> None:
        """Leave all blocks as they were."""
        for module in self._elsewhere.values():
            vars(module).pop("arranged_weights", None)
        if self._cut is not None:
            self._cut.uninstall()

    def replaced(self, model: nn.Module) -> list[str]:
        """Names of what somebody has replaced without which the network cannot be in stages."""
        return [] if self._cut is None else self._cut.replaced(model)

    def block(self, module: nn.Module, state: DiTState) -> contextlib.AbstractContextManager[None]:
        """Surrounds a block of ours that is not here. Raises ValueError: code that is not ours called it."""
        raise ValueError(
            f"{self._name_of[id(module)]} is in pipeline stage {self._stage_of[id(module)]}, on another rank, but a custom "
            "node calls it here (a replaced forward of the network); set parallel.pipeline_parallel to false for this workflow"
        )
