"""Where weights live, and plans within that."""

from __future__ import annotations

import types

import pytest

from comfy.taco_dit.core.config_manager import ParallelConfig
from comfy.taco_dit.core.layout import Layout, Placement, layout_of
from comfy.taco_dit.core.plan import Workload, choose_plan

FLUX = Workload(conds=2, pictures=1, tokens=4608, heads=24, hidden_size=3072)


def test_a_loaded_model_is_whole_or_offloaded() -> None:
    assert layout_of(types.SimpleNamespace()) == Layout()
    assert layout_of(types.SimpleNamespace(model_lowvram=True)).placement is Placement.OFFLOADED


@pytest.mark.parametrize(
    "layout,plan", [(Layout(), "cfg 2 x ulysses 4"), (Layout(tensor_degree=4), "cfg 2"),
                    (Layout(tensor_degree=2, pipeline_stages=((0, 19), (19, 57))), "ulysses 2"),
                    (Layout(tensor_degree=8), "one rank")],
)  # fmt: skip
def test_a_plan_deals_copies_of_the_network(layout: Layout, plan: str) -> None:
    assert choose_plan(ParallelConfig(), FLUX, 8, layout).dims.describe() == plan


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="a layout over 3 ranks does not fit 8 ranks"):
        Layout(tensor_degree=3).copies(8)
    with pytest.raises(ValueError, match="tensor_degree must be at least 1"):
        Layout(tensor_degree=0)
    with pytest.raises(ValueError, match="pipeline stage 1 has the blocks 4 to 9"):
        Layout(pipeline_stages=((0, 3), (4, 9)))


def test_description() -> None:
    layout = Layout(Placement.SHARDED, 2, ((0, 3), (3, 9)))
    assert layout.describe() == "sharded x tensor 2 x pipeline 2" and Layout().describe() == "whole"
