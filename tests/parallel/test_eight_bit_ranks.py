"""Linears in eight bits on ranks: by Ulysses, on a ring, by conditionings and pictures, with a LoRA."""

from __future__ import annotations

import pytest

from .eight_bit_cases import results
from .ranks import run_ranks


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_rank(world: int) -> None:
    for answer in run_ranks(world, results):
        for form, cases in answer.items():
            same = [off for _, off, _ in cases.values()]
            # A difference in the last bit of fp32 can tip the rounding of a single number to eight bits over.
            assert sorted(same)[-2] < 2e-4 and sum(off < 1e-5 for off in same) >= len(same) - 2, (form, cases)
            lossy = [off for _, _, off in cases.values()]
            assert all(1e-3 < off < (0.1 if form == "fp8" else 0.03) for off in lossy), (form, cases)
        assert {plan for plan, _, _ in answer["fp8"].values()} >= {f"ulysses {world}", f"ring {world}"}
