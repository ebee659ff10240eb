"""Plans: every number of ranks has one, it covers all work, and fixed degrees hold."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re

import pytest

from comfy.taco_dit.core.config_manager import ConfigError, ParallelConfig
from comfy.taco_dit.core.plan import ParallelDims, Workload, choose_plan, share
from comfy.taco_dit.core.rows import rows_of

FLUX = Workload(conds=1, pictures=1, tokens=4608, heads=24, hidden_size=3072)


def plan(world: int, config: ParallelConfig | None = None, **changes: object) -> ParallelDims:
    """The plan of a Flux-sized call."""
    return choose_plan(config or ParallelConfig(), dataclasses.replace(FLUX, **changes), world).dims


@pytest.mark.parametrize("world", range(1, 17))
@pytest.mark.parametrize("conds,pictures", [(1, 1), (2, 1), (2, 3), (1, 4), (3, 2)])
def test_every_number_of_ranks_has_a_plan_that_uses_all(world: int, conds: int, pictures: int) -> None:
    dims = plan(world, conds=conds, pictures=pictures)
    assert dims.world_size == world
    assert dims.replicas == 1, "tokens can always be split"
    assert dims.cfg_degree <= conds
    assert dims.data_degree <= pictures


def test_usual_choices() -> None:
    assert plan(3) == ParallelDims(1, 1, 3)
    assert plan(4) == ParallelDims(1, 1, 4)
    assert plan(6) == ParallelDims(1, 1, 6)
    assert plan(2, conds=2) == ParallelDims(2, 1, 1)
    assert plan(4, conds=2) == ParallelDims(2, 1, 2)
    assert plan(3, conds=2) == ParallelDims(1, 1, 3)
    assert plan(4, pictures=4) == ParallelDims(1, 4, 1)


def test_fixed_degrees_hold() -> None:
    assert plan(4, ParallelConfig(ulysses_degree=2), conds=2) == ParallelDims(2, 1, 2)
    assert plan(4, ParallelConfig(ulysses_degree=4), conds=2) == ParallelDims(1, 1, 4)
    assert plan(4, ParallelConfig(cfg_parallel=False), conds=2) == ParallelDims(1, 1, 4)
    assert plan(4, ParallelConfig(sequence_parallel=False), conds=2).replicas == 2
    assert plan(4, ParallelConfig(enabled=False), conds=2).replicas == 4
    assert plan(4, ParallelConfig(data_parallel_degree=2), pictures=4).data_degree == 2


def test_without_auto_detection_only_what_is_written_is_used() -> None:
    assert plan(4, ParallelConfig(auto_detect=False)).replicas == 4
    assert plan(4, ParallelConfig(auto_detect=False, ulysses_degree=2)) == ParallelDims(1, 1, 2, 2)
    assert plan(4, ParallelConfig(auto_detect=False, ulysses_degree=2), conds=2) == ParallelDims(2, 1, 2)
    assert plan(4, ParallelConfig(auto_detect=False, data_parallel_degree=4), pictures=4) == ParallelDims(1, 4, 1)


def test_foreign_code_keeps_rows_together() -> None:
    dims = plan(4, conds=2, pictures=4, rows_split=False)
    assert dims == ParallelDims(1, 1, 4)
    assert plan(4, conds=2, rows_split=False, tokens_split=False).replicas == 4


def test_a_ring_is_used_where_it_is_configured() -> None:
    assert plan(4, ParallelConfig(ring_degree=2)).describe() == "ulysses 2 x ring 2"
    assert plan(4, ParallelConfig(ring_degree=2), conds=2).describe() == "cfg 2 x ring 2"
    assert plan(6, ParallelConfig(sequence_parallel_degree=6, ulysses_degree=2)).describe() == "ulysses 2 x ring 3"
    assert plan(4, ParallelConfig(sequence_parallel_degree=4, ring_degree=4)).describe() == "ring 4"
    assert plan(4, ParallelConfig(auto_detect=False, ring_degree=2)).describe() == "ring 2 x replicas 2"
    assert plan(4, ParallelConfig(ring_degree=2), tokens_split=False).replicas == 4


def test_a_ring_comes_where_ranks_are_more_than_heads() -> None:
    found = choose_plan(ParallelConfig(), dataclasses.replace(FLUX, heads=4, tokens=20000), 8)
    assert found.dims.describe() == "ulysses 4 x ring 2"
    assert "a ring of 2, as there are more ranks than heads" in found.reason
    assert plan(8, heads=8, tokens=20000).describe() == "ulysses 8"
    assert plan(8, ParallelConfig(ring_degree=1), heads=4, tokens=20000).describe() == "ulysses 8"
    for world in range(1, 17):
        assert plan(world, heads=3, tokens=20000).replicas == 1


def test_a_fixed_data_degree_shrinks_with_the_batch() -> None:
    assert plan(4, ParallelConfig(data_parallel_degree=4), pictures=3).data_degree == 2
    assert plan(4, ParallelConfig(data_parallel_degree=4), pictures=1).data_degree == 1


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ConfigError, match="no plan for 4 ranks"):
        plan(4, ParallelConfig(ulysses_degree=3))


@pytest.mark.parametrize("dims", [ParallelDims(2, 3, 2, 2), ParallelDims(1, 1, 5), ParallelDims(3, 2, 1, 1, 2),
                                  ParallelDims(2, 1, 2, 2, 3)])  # fmt: skip
def test_groups_partition_the_ranks(dims: ParallelDims) -> None:
    world = range(dims.world_size)
    assert sorted(itertools.chain(*{dims.token_group(r) for r in world})) == list(world)
    assert sorted(itertools.chain(*{dims.row_group(r) for r in world})) == list(world)
    for rank in world:
        assert rank in dims.token_group(rank)
        cfg, data, _, _ = dims.coordinates(rank)
        assert dims.row_group(rank)[cfg * dims.data_degree + data] == rank
        members, near, ring = dims.token_group(rank), dims.ulysses_group(rank), dims.ring_group(rank)
        place = members.index(rank)
        assert near == members[place - near.index(rank) :][: dims.ulysses_degree]
        assert len(ring) == dims.ring_degree and ring[place // dims.ulysses_degree] == rank
        assert set(near) & set(ring) == {rank} and set(ring) <= set(members)


@pytest.mark.parametrize("total,parts", [(0, 3), (1, 4), (7, 3), (4608, 5)])
def test_shares_are_even_and_complete(total: int, parts: int) -> None:
    bounds = [share(total, parts, i) for i in range(parts)]
    assert [b for bound in bounds for b in range(*bound)] == list(range(total))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


class _Batch:
    """A denoiser batch's shape."""

    def __init__(self, conds: int, pictures: int) -> None:
        self.cond_or_uncond = list(range(conds))
        self.batch_size = pictures


@pytest.mark.parametrize("cfg,data", [(1, 1), (2, 1), (3, 2), (2, 3)])
def test_rows_are_dealt_exactly_once(cfg: int, data: int) -> None:
    batches = [_Batch(2, 3), _Batch(1, 3)]
    dims = ParallelDims(cfg, data)
    seen = []
    for c, d in itertools.product(range(cfg), range(data)):
        for i, conds, (start, stop) in rows_of(batches, dims, c, d):
            seen += [(i, cond, picture) for cond in conds for picture in range(start, stop)]
    assert sorted(seen) == sorted((i, c, p) for i, b in enumerate(batches) for c in b.cond_or_uncond for p in range(3))


def test_the_page_says_every_reason_and_cure_in_chinese():
    from comfy.taco_dit.core.reasons import TEXTS
    from comfy.taco_dit.utils.events import REMEDY_CODES

    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with open(os.path.join(root, "app", "web", "panel", "texts.js"), encoding="utf-8") as file:
        chinese = file.read().split("const ZH")[1]
    entries = dict(re.findall(r'^    (\w+): "(.*)",$', chinese, re.MULTILINE))
    assert set(REMEDY_CODES) <= set(entries)
    for code, text in TEXTS.items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", entries[code])), code
