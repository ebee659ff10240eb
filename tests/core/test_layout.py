"""Where weights live, and plans within that."""

from __future__ import annotations

import dataclasses
import types

import pytest

from comfy.taco_dit.core.config_manager import MemoryConfig, ParallelConfig, TacoConfig
from comfy.taco_dit.core.layout import Layout, NetworkFacts, Placement, choose_layout, layout_of
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


def test_ranks_hold_parts_of_copies() -> None:
    layout = Layout(tensor_degree=2, pipeline_stages=((0, 19), (19, 57)))
    places = [layout.place_of(rank) for rank in range(8)]
    assert places[:5] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0)]
    assert [layout.rank_of(*place) for place in places] == list(range(8))
    assert layout.tensor_group(6) == (6, 7) and layout.stage_group(5) == (5, 7)
    assert layout.ranks_of((0, 1), 3) == (3, 7), "a group of copies is that of the ranks with the same part"
    assert Layout().ranks_of((2, 5), 1) == (2, 5) and Layout().tensor_group(4) == (4,)
    with pytest.raises(ValueError, match="tensor 2 x pipeline 2 has no copy 0, stage 2"):
        layout.rank_of(0, 2)


GIB = 1 << 30
FLUX_BYTES = NetworkFacts("Flux", 24 * GIB, (GIB // 2,) * 46, cuttable=True)


@pytest.mark.parametrize(
    "parallel,shard,network,memory,ranks,layout,reason",
    [
        ({}, None, FLUX_BYTES, 70 * GIB, 2, Layout(), ""),
        ({}, None, FLUX_BYTES, None, 2, Layout(), ""),
        ({}, None, FLUX_BYTES, 20 * GIB, 2, Layout(Placement.SHARDED),
         "24.0 GiB of weights do not fit 20.0 GiB, 13.5 GiB of each of 2 ranks do"),
        ({}, None, FLUX_BYTES, 8 * GIB, 3, Layout(), "9.7 GiB of each of 3 ranks do not either: they are streamed"),
        ({}, None, FLUX_BYTES, 8 * GIB, 1, Layout(), ""),
        ({}, False, FLUX_BYTES, 20 * GIB, 2, Layout(), ""),
        ({}, None, dataclasses.replace(FLUX_BYTES, saved_bytes=11 * GIB), 20 * GIB, 2, Layout(), ""),
        ({}, True, FLUX_BYTES, None, 2, Layout(Placement.SHARDED), "memory.shard_weights is true"),
        ({}, True, NetworkFacts("UNet", 5 * GIB), None, 2, Layout(), ""),
        ({"tensor_parallel": True}, None, FLUX_BYTES, None, 4, Layout(tensor_degree=4), "tensor_parallel is true"),
        ({"tensor_parallel": True, "ulysses_degree": 2}, None, FLUX_BYTES, None, 4, Layout(tensor_degree=2), "is true"),
        ({"tensor_parallel": True}, None, NetworkFacts("UNet", 5 * GIB), None, 4, Layout(), "are not declared"),
        ({"tensor_parallel": True}, None, NetworkFacts("Flux", GIB, (GIB,), True, "GGMLTensor"), None, 2, Layout(),
         "stored as GGMLTensor, of which no parts can be held"),
        ({"tensor_parallel": True, "enabled": False}, None, FLUX_BYTES, None, 4, Layout(), ""),
    ],
)  # fmt: skip
def test_a_layout_is_chosen_by_configuration_and_memory(
    parallel: dict[str, object],
    shard: bool | None,
    network: NetworkFacts,
    memory: int | None,
    ranks: int,
    layout: Layout,
    reason: str,
) -> None:
    config = TacoConfig(parallel=ParallelConfig(**parallel), memory=MemoryConfig(shard_weights=shard))  # type: ignore[arg-type]
    chosen, why = choose_layout(config, network, memory, ranks)
    assert chosen == layout and reason in why and bool(why) == bool(reason)
