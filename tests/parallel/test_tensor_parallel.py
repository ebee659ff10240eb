"""Networks whose linears are cut over ranks equal whole ones, also with everything custom nodes do to them."""

from __future__ import annotations

import pytest
import torch

from comfy.ldm import dit

from .ranks import run_ranks
from .tensor_cases import call_for, cut
from .test_flux_tokens import CASES, SHAPES
from .tiny import inputs, tiny_flux


def _compare(manager, degree, ulysses, ring, shapes):
    """Largest relative deviation of each case and shape from the whole network on the same rank."""
    call, worst = call_for(manager, degree, ulysses, ring), {}
    for case in CASES:
        for height, width, text, batch in shapes:
            arguments = inputs(height, width, text, batch)
            with torch.inference_mode():
                serial = case(tiny_flux(), arguments, {})
                with dit.fallback_call(call):
                    parallel = case(cut(tiny_flux(), manager, degree), arguments, call.within({}))
            worst[case.__name__, height] = ((parallel - serial).abs().max() / serial.abs().max()).item()
    return worst


@pytest.mark.parametrize(
    "world,degree,ulysses,ring", [(2, 2, 1, 1), (3, 3, 1, 1), (5, 5, 1, 1), (4, 2, 2, 1), (4, 2, 1, 2), (6, 3, 2, 1)]
)
def test_cut_networks_equal_whole_ones(world, degree, ulysses, ring):
    """Every case at odd sizes; five ranks share four heads."""
    shapes = SHAPES if world < 4 else SHAPES[:1]
    for worst in run_ranks(world, _compare, degree, ulysses, ring, shapes):
        for case, deviation in worst.items():
            assert deviation < 1e-5, f"{case}: {deviation}"
