"""Spatial parallelism of convolutional networks: the rows of a picture are dealt over ranks.

A network that is called with a `RowsTensor` instead of a picture computes this rank's rows of everything. Convolutions
exchange the rows next to a rank's own (halos), group norms sum their statistics, queries of an attention stay and keys and
values are gathered (`rows_layers`); the exchanges are those of a `RowsPlan`. All of it is exact: the same sums as on one
rank, up to the order of those over a group of channels. Networks are written for whole pictures and know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import rows_layers  # noqa: F401 (tells RowsTensor about layers)
from .rows_plan import RowsPlan
from .rows_tensor import note_whole, whole

__all__ = ["RowsPlan", "run_by_rows", "takes_rows"]


def run_by_rows(
    network: Callable[[torch.Tensor], torch.Tensor],
    picture: torch.Tensor,
    group: Any,
    device: torch.device,
    unit: int = 1,
) -> torch.Tensor:
    """`network(picture)` of a picture [B, C, ..., H, W] that every rank of `group` has, as every rank gets the result.

    `network` may be any code for whole pictures whose result is a tensor. `unit`: rows that stay on one rank, best the
    factor by which the network makes pictures smaller. Raises the out-of-memory error on all ranks when one has it.
    """
    plan = RowsPlan(group, device)
    out: torch.Tensor = whole(network(plan.deal(picture, unit=unit)))
    plan.finish()
    return out


def takes_rows(network: torch.nn.Module) -> bool:
    """Whether a network can be called with rows: not if parts of it are compiled, which need tensors of torch's own."""
    for module in network.modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None or isinstance(
            module, torch.jit.ScriptModule
        )
        if compiled or type(module).__module__.startswith("torch._dynamo"):
            note_whole(f"the compiled {type(network).__name__}")
            return False
    return True
