"""Modulation of Flux's blocks: shifts, scales and gates from the conditioning vector (Peebles & Xie 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import comfy.ops
from comfy.ldm import dit
from comfy.ldm.modules.modulate import spread_rows


@dataclass
class ModulationOut:
    """Shift, scale and gate of one sub-block, [B, 1, C] each."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


class Modulation(nn.Module):
    """adaLN parameters from the conditioning vector (Peebles & Xie 2022)."""

    def __init__(
        self, dim: int, double: bool, bias: bool = True, dtype: Any = None, device: Any = None,
        operations: Any = comfy.ops.manual_cast,
    ) -> None:  # fmt: skip
        super().__init__()
        self.is_double = double
        self.multiplier = 6 if double else 3
        self.lin = operations.Linear(dim, self.multiplier * dim, bias=bias, dtype=dtype, device=device)

    def forward(self, vec: torch.Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        """vec [B, C] or [B, n, C] -> one or two `ModulationOut`."""
        if vec.ndim == 2:
            vec = vec.unsqueeze(1)
        return self.parts(self.lin(nn.functional.silu(vec)))

    def parts(self, out: torch.Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        """The linear's output [B, n, multiplier * C] as one or two `ModulationOut`."""
        parts = out.chunk(self.multiplier, dim=-1)
        return ModulationOut(*parts[:3]), ModulationOut(*parts[3:]) if self.is_double else None


def apply_mod(
    tensor: torch.Tensor,
    m_mult: torch.Tensor,
    m_add: torch.Tensor | None = None,
    modulation_dims: list[tuple[int, int | None, int]] | None = None,
) -> torch.Tensor:
    """tensor * m_mult + m_add; `modulation_dims` lists (start, stop, row of m) for token ranges."""
    if modulation_dims is None:
        return tensor * m_mult if m_add is None else tensor * m_mult + m_add
    out = tensor.clone()
    for start, stop, row in modulation_dims:
        out[:, start:stop] *= m_mult[:, row : row + 1]
        if m_add is not None:
            out[:, start:stop] += m_add[:, row : row + 1]
    return out


def modulation_of(module: Any, vec: torch.Tensor, call: dit.DenoiserCall) -> tuple[ModulationOut, Any]:
    """`module(vec)`, from what was computed beforehand if it was."""
    ready = call.prepared.get(id(module))
    return module(vec) if ready is None else module.parts(ready)


def modulation_rows(state: dit.DiTState, sizes: Any = None) -> Any:
    """Each token's row of modulation with several rows [B, n, C], for each stream if `sizes` are given; None with one."""
    if "rows" not in state.tokenwise:
        return None if sizes is None else (None,) * len(sizes)
    rows = state.local("rows")
    return rows if sizes is None else rows.split(sizes)


def by_token(mod: ModulationOut, rows: torch.Tensor | None) -> ModulationOut:
    """Modulation with a row for each token instead of one for several."""
    if rows is None:
        return mod
    return ModulationOut(*(spread_rows(part, rows) for part in (mod.shift, mod.scale, mod.gate)))
