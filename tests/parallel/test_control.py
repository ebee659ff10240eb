"""Flux ControlNets over ranks equal one rank: each rank computes the residuals of its rows, tokens shared."""

import pytest

from .control_cases import WORST, control_results, qwen_residuals, sd3_residuals, unet_results
from .ranks import run_ranks


@pytest.mark.parametrize("world", [2, 3])
def test_parallel_equals_serial(world):
    """Odd sizes, a noise mask, several hints, chains, ranges of steps, a foreign network that mixes rows."""
    results = run_ranks(world, control_results, [None, world] if world == 2 else [None])
    for out in results:
        for case, (_, deviation, change, _) in out.items():
            assert deviation < WORST, (case, out[case])
            assert change > 1e-2, (case, out[case])
    out = results[0]
    plans = {case: plan for (case, ring), (plan, *_) in out.items() if ring is None}
    rows = {case: found for (case, ring), (*_, found) in out.items() if ring is None}
    if world == 2:
        assert plans["instantx"] == plans["union of two"] == "cfg 2"
        assert rows["instantx"] == [3, 3]  # one conditioning of three pictures, once a step
        assert rows["union of two"] == [2, 2, 2, 2]
        assert out["instantx", 2][0] == "ring 2"
    else:
        assert plans["instantx"] == "data 3" and rows["instantx"] == [2, 2]
        assert plans["xlabs"] == "ulysses 3" and rows["xlabs"] == [1, 1]
    assert plans["foreign"] == f"ulysses {world}" and rows["foreign"] == [4, 4]
    assert sum(rows["late"]) == 2 * (2 + 1) // (2 if plans["late"] == "data 2" else 1)


def test_others_share_tokens():
    """Residuals of SD3's and HunyuanDiT's control networks at an odd size."""
    for deviations in run_ranks(2, sd3_residuals):
        assert max(deviations) < WORST, deviations


def test_qwen_image_shares_tokens():
    """InstantX's residuals; DiffSynth's patch on the tokens that a rank has, with a reference picture behind them."""
    for deviations, change in run_ranks(3, qwen_residuals):
        assert max(deviations) < WORST and change > 1e-2, (deviations, change)


def test_a_unet_splits_rows():
    """Each rank evaluates the ControlNet for its own conditionings or pictures, with their hints."""
    for out in run_ranks(2, unet_results):
        assert list(out) == ["cfg 2", "data 2"]
        assert max(out.values()) < WORST, out
