"""Spatial parallelism of convolutional networks: the rows of a picture are dealt over ranks.

A network that is called with a `RowsTensor` instead of a picture computes this rank's rows of everything. Convolutions
exchange the rows next to a rank's own (halos), group norms sum their statistics, queries of an attention stay and keys and
values are gathered (`rows_layers`); the exchanges are those of a `RowsPlan`. All of it is exact: the same sums as on one
rank, up to the order of those over a group of channels. Networks are written for whole pictures and know nothing of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import rows_layers  # noqa: F401 (tells RowsTensor about layers)
from .rows_plan import RowsPlan, captures
from .rows_tensor import RowsTensor, note_whole, whole

__all__ = ["RowsPlan", "SpatialPlan", "run_by_rows", "takes_rows"]


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


class SpatialPlan:
    """How UNets are called by the ranks of `group`, each with some rows of every picture.

    Patches and replacements of custom nodes get whole pictures, and what they return is dealt again.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._rows = RowsPlan(group, device)
        self.size, self.index = group.size, group.index

    def around(self, network: Any) -> Callable[..., torch.Tensor]:
        """`network(x, timestep, ...)` of latents x [B, C, h, w], whole on every rank, as its result is."""
        return functools.partial(self._call, network)

    def _call(
        self, network: Any, x: torch.Tensor, *arguments: Any, transformer_options: Any = None, **named: Any
    ) -> torch.Tensor:
        self._rows.out_of_memory = False
        options = _for_whole_pictures(transformer_options or {})
        picture = self._rows.deal(x, unit=network.row_unit)
        out: torch.Tensor = whole(network(picture, *arguments, transformer_options=options, **named))
        if not captures(self._rows.device):
            self._rows.finish()
        return out


def _for_whole_pictures(options: dict[str, Any]) -> dict[str, Any]:
    """`transformer_options` whose functions get whole pictures and return rows of them."""
    out = dict(options)
    if options.get("patches"):
        out["patches"] = {kind: [_of_wholes(patch) for patch in some] for kind, some in options["patches"].items()}
    if options.get("patches_replace"):
        out["patches_replace"] = {
            kind: {place: _of_wholes(function) for place, function in some.items()}
            for kind, some in options["patches_replace"].items()
        }
    if options.get("optimized_attention_override") is not None:
        out["optimized_attention_override"] = _of_wholes(options["optimized_attention_override"])
    return out


def _of_wholes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of pictures or tokens as one of their rows. What it writes into its arguments is written into the rows."""

    def run(*args: Any, **kwargs: Any) -> Any:
        wholes = {
            id(value): (value, whole(value)) for value in (*args, *kwargs.values()) if isinstance(value, RowsTensor)
        }

        def given(value: Any) -> Any:
            return wholes[id(value)][1] if id(value) in wholes else value

        out = function(*map(given, args), **{name: given(value) for name, value in kwargs.items()})
        rows = [value for value, _ in wholes.values()]
        for value, tensor in wholes.values():
            if not value.local.is_meta:
                value.local.copy_(value.plan.part(tensor, value.rows))
        return type(out)(_as_rows(part, rows) for part in out) if type(out) in (list, tuple) else _as_rows(out, rows)

    return run


def _as_rows(value: Any, known: list[RowsTensor]) -> Any:
    """This rank's rows of a whole tensor: as those `known` that it is like; of a picture of another size, evenly dealt."""
    if not isinstance(value, torch.Tensor) or isinstance(value, RowsTensor):
        return value
    for like in known:
        axis = like.rows.axis
        if (
            value.ndim == like.ndim
            and value.shape[axis] == like.shape[axis]
            and (axis > 1 or value.shape == like.shape)
        ):
            return like.with_local(like.plan.part(value, like.rows))
    if value.ndim == 4 and known and known[0].ndim == 4:
        return known[0].plan.deal(value)
    return value
