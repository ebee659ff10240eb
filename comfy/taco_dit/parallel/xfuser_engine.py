"""xfuser as the engine of attention (`optimization.engine: xfuser`), for what it can do; ours does the rest.

xfuser (Fang et al. 2024, xDiT) is imported only when it is chosen. Its USP attention wants equal shards, heads that
divide by the degree, no mask, and all ranks in one group; every other call goes through the native exchange.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

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

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        function: Callable[..., torch.Tensor],
        *,
        layout: tuple[int, ...],
        in_order: bool,
        beside: Callable[[], Any] | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """See `comfy.ldm.dit.TokenPlan.attend`."""
        fits = not in_order and len(set(layout)) == 1 and q.shape[1] % self.exchange.size == 0 and q.is_cuda
        if not fits:
            return super().attend(q, k, v, function, layout=layout, in_order=in_order, beside=beside)
        aside = beside() if beside is not None else None
        return self._usp(q, k, v), aside
