"""xfuser as the engine of attention (`optimization.engine: xfuser`), for what it can do; ours does the rest.

xfuser (Fang et al. 2024, xDiT) is imported only when it is chosen. Its USP attention wants equal shards, heads that
divide by the degree, no mask, and all ranks in one group; every other call goes through the native exchange.

It is optional, and not the default, because its process group is global to torch.distributed and cannot be aborted: a
rank that fails inside one of its collectives leaves the others waiting there until the group's own time limit, where
our groups are abandoned within seconds (see `comfy.taco_dit.core.data_plane`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from comfy.ldm.dit_state import Compute, Meeting
from comfy.ldm.modules.attention import AttentionSpec
from comfy.taco_dit.core.config_manager import ConfigError

from .exchange import Exchange
from .sequence_parallel import UlyssesPlan


@functools.cache
def start(rank: int, world_size: int) -> Callable[..., torch.Tensor]:
    """Initialise xfuser's groups once in this process and return its attention.

    Raises ConfigError when xfuser cannot be used here.
    """
    if not torch.cuda.is_available():
        raise ConfigError("optimization.engine is 'xfuser', which needs NVIDIA GPUs; allowed here: native")
    try:
        import xfuser.core.distributed.runtime_state as state
        from xfuser.config.args import xFuserArgs
        from xfuser.core.distributed import init_distributed_environment, initialize_model_parallel
        from xfuser.model_executor.layers.usp import USP
    except ImportError as error:
        raise ConfigError(
            f"optimization.engine is 'xfuser' but it cannot be imported ({error}); "
            "install requirements_taco_dit.txt, or set it to native"
        ) from error
    init_distributed_environment(rank=rank, world_size=world_size)
    initialize_model_parallel(sequence_parallel_degree=world_size, ulysses_degree=world_size)
    config, _ = xFuserArgs(model="none", ulysses_degree=world_size).create_config()

    class Runtime(state.RuntimeState):
        """The part of xfuser's runtime that its attention reads; its own builders want a diffusers pipeline."""

    state._RUNTIME = Runtime(config)
    logging.info("TACO-DiT: attention by xfuser (Ulysses over %d ranks)", world_size)
    return USP


class XfuserPlan(UlyssesPlan):
    """A token plan whose attention is xfuser's where its limits allow."""

    def __init__(self, exchange: Exchange, usp: Callable[..., torch.Tensor]) -> None:
        super().__init__(exchange)
        self._usp = usp

    def meet(self, spec: AttentionSpec, compute: Compute, in_order: bool) -> Meeting:
        """See `comfy.ldm.dit.TokenPlan.meet`."""
        even = len(set(self.counts(spec.queries.lengths))) == 1 and spec.heads % self.size == 0
        joint = spec.keys is None and spec.queries.sharded and spec.shared_heads == spec.heads
        if in_order or not even or not joint:
            return super().meet(spec, compute, in_order)
        return UspMeeting(self._usp)


class UspMeeting:
    """An attention that xfuser does in one piece, exchange included."""

    def __init__(self, usp: Callable[..., torch.Tensor]) -> None:
        self._usp = usp

    def send(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._inputs = q, k, v

    def attend(self) -> None:
        self._out = self._usp(*self._inputs)

    def send_back(self) -> None:
        pass

    def result(self) -> torch.Tensor:
        return self._out
