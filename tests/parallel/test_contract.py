"""The contract on 2 to 4 ranks with uneven shards: each case once serially and once on shards, in one set of ranks.

Rings are tried in the same ranks as Ulysses, and Ulysses within a ring on four.
"""

from __future__ import annotations

import threading
import types

import pytest
import torch

from comfy.ldm import dit
from comfy.ldm.modules.attention import AttentionSpec, attention, own_attention
from comfy.taco_dit.core.plan import ParallelDims, share
from comfy.taco_dit.parallel.exchange import SingleExchange, head_ranges
from comfy.taco_dit.parallel.ring_parallel import RingPlan, native_plan
from comfy.taco_dit.parallel.zigzag import Zigzag

from .contract_cases import CASES, draw, split_heads
from .engine_cases import engine_results, ring_results
from .ranks import run_ranks


def _deviations(manager, splits):
    """{(case, Ulysses degree, ring degree): deviation from one rank}."""
    plans = {
        split: native_plan(
            manager.data.group, ParallelDims(ulysses_degree=split[0], ring_degree=split[1]), manager.rank
        )
        for split in splits
    }
    deviations = {}
    for case in CASES:
        with torch.inference_mode():
            serial = case(dit.DenoiserCall())
            for split, plan in plans.items():
                parallel = case(dit.DenoiserCall(plan))
                assert serial.shape == parallel.shape, f"{case.__name__}: {serial.shape} and {parallel.shape}"
                deviations[case.__name__, *split] = ((parallel - serial).abs().max() / serial.abs().max()).item()
    return deviations


def _everything(manager):
    world = manager.world_size
    return _deviations(manager, [(world, 1), (1, world)]), engine_results(manager)


@pytest.fixture(scope="module", params=[2, 3])
def results(request):
    """(number of ranks, what every rank found)."""
    return request.param, run_ranks(request.param, _everything)


def _assert_equal(deviations, splits):
    assert len(deviations) == splits * len(CASES)
    wrong = {name: deviation for name, deviation in deviations.items() if not deviation < 1e-5}
    assert not wrong


def test_shards_equal_whole(results):
    for deviations, _ in results[1]:
        _assert_equal(deviations, 2)


def _half_precision(manager):
    """(dtype of an attention in bf16 on a ring, deviation from one rank in fp32)."""
    plan = native_plan(manager.data.group, ParallelDims(ulysses_degree=2, ring_degree=2), manager.rank)
    q, k, v = (split_heads(draw(1, 301, 96, seed=seed)).bfloat16() for seed in (1, 2, 3))
    start, stop = plan.bounds(301)
    mine = (t[:, :, start:stop] for t in (q, k, v))
    spec = AttentionSpec(4, dit.Tokens((301,), sharded=True))
    out = attention(*mine, spec, dit.DenoiserCall(plan))
    wanted = own_attention(q.float(), k.float(), v.float()).transpose(1, 2).flatten(2)
    return out.dtype, ((plan.gather(out, 1, [301]) - wanted).abs().max() / wanted.abs().max()).item()


def _on_a_ring(manager):
    return _deviations(manager, [(2, 2)]), ring_results(manager), _half_precision(manager)


def test_a_ring_around_ulysses_equals_whole():
    for deviations, engine, (dtype, rounding) in run_ranks(4, _on_a_ring):
        _assert_equal(deviations, 1)
        assert dtype == torch.bfloat16 and rounding < 2**-7
        plan, deviation, captured = engine.pop("areas")
        assert plan == "cfg 2 x ring 2" and deviation < 1e-4 and captured
        assert all(deviation < 1e-5 for _, deviation in engine.values()), engine
        plans = {name: plan for name, (plan, _) in engine.items()}
        assert {plans["plain"], plans["declared"]} == {"data 2 x ring 2"}
        assert {plans[name] for name in ("override", "replaced", "patched", "wrapped")} == {"ulysses 2 x ring 2"}


def _leave_a_pass(manager):
    """What ends a wait for a rank that never sends."""
    group = manager.data.group(range(2))
    if manager.rank == 1:
        manager.control.get("left")
        return None
    pending = group.shift(torch.zeros(5), torch.ones(3))
    threading.Timer(0.1, manager.data.abort).start()
    try:
        pending.wait()
    except ConnectionError as error:
        return str(error)
    finally:
        manager.control.set("left", b"1")


def test_a_pass_can_be_left():
    assert "connection closed" in run_ranks(2, _leave_a_pass, timeout=20)[0]


def test_ranks_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="1 x 1 ranks are not the 3 ranks of the token group"):
        RingPlan(types.SimpleNamespace(size=3, index=0), SingleExchange(), types.SimpleNamespace(size=1, index=0))


def test_a_zigzag_evens_out_the_work_under_a_causal_mask():
    parts = [torch.arange(*share(310, 3, i)) for i in range(3)]
    dealt = [Zigzag(parts, i, torch.device("cpu")) for i in range(3)]
    seen = [int((zigzag.places(i) + 1).sum()) for i, zigzag in enumerate(dealt)]
    assert sorted(torch.cat([zigzag.places(i) for i, zigzag in enumerate(dealt)]).tolist()) == list(range(310))
    assert max(seen) < 1.05 * min(seen), "keys that the queries of each part see"
    assert [[zigzag.sent[i] for zigzag in dealt] for i in range(3)] == [zigzag.received for zigzag in dealt]


def test_foreign_code_keeps_rows_together(results):
    world, found = results
    for _, engine in found:
        plans = {name: plan for name, (plan, _) in (engine["coupled"] | engine["replaced"]).items()}
        assert all(deviation < 1e-5 for _, deviation in (engine["coupled"] | engine["replaced"]).values()), engine
        split = {name for name, plan in plans.items() if plan == f"data {world}"}
        assert split == {"plain", "declared"}, plans
        assert {plan for name, plan in plans.items() if name not in split} == {f"ulysses {world}"}
        assert not engine["options leak"]
    said = [engine["lines"] for _, engine in found]
    assert len(said[0]) == len(set(said[0])) == 7 and not any(said[1:])


def test_row_groups_that_make_other_calls_do_not_wait(results):
    world, found = results
    kinds = []
    for _, engine in found:
        plan, deviation, captured = engine["areas"]
        assert plan == f"cfg {world}" and deviation < 1e-4
        kinds.append(captured)
    assert len(set(kinds)) > 1, "the row groups were to make different numbers of calls"


def test_unets_have_their_rows_dealt(results):
    world, found = results
    for _, engine in found:
        assert all(deviation < 1e-5 for _, deviation in engine["unets"].values()), engine["unets"]
        plans = {name: plan for name, (plan, _) in engine["unets"].items()}
        assert plans["prompts"] == ("cfg 2" if world == 2 else "replicas 3")
        assert plans["pictures"] == f"data {world}" and plans["areas"] == f"cfg {world}", plans
        assert "cfg" not in plans["patched"], plans


def test_spread_deals_items(results):
    world, found = results
    worked = [engine["spread"] for _, engine in found]
    assert [sum(counts) for counts in zip(*worked)][2:] == [2, 7]
    assert max(counts[3] for counts in worked) <= -(-7 // world)


def test_spread_deals_batches(results):
    world, found = results
    worked = [engine["batches"] for _, engine in found]
    assert [sum(counts.get(size, 0) for counts in worked) for size in (1, 2, 5)] == [world, 2, 5]
    assert worked[0]["alone"] == 5


@pytest.mark.parametrize("heads,shared,size", [(24, 24, 5), (4, 2, 3), (12, 4, 3), (8, 1, 2), (2, 1, 5), (6, 6, 4)])
def test_heads_are_dealt_once_and_with_their_keys(heads, shared, size):
    queries, keys = head_ranges(heads, shared, size)
    assert [h for a, b in queries for h in range(a, b)] == list(range(heads))
    for (a, b), (first, last) in zip(queries, keys):
        assert {h * shared // heads for h in range(a, b)} == set(range(first, last))


def test_bad_specs_name_the_fault():
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        AttentionSpec(4, dit.Tokens((5,)), kv_heads=3)
    with pytest.raises(ValueError, match=r"mask of \(4, 5\) for 5 queries and 5 keys"):
        AttentionSpec(4, dit.Tokens((5,)), mask=torch.zeros(4, 5))
    with pytest.raises(ValueError, match="pe has 4 entries on axis 1 where the streams x have 5 tokens"):
        dit.DiTState({"x": torch.zeros(1, 5, 8)}, {"pe": dit.TokenAxis(torch.zeros(1, 4, 8), ("x",), 1)})
    with pytest.raises(ValueError, match=r"stream 'x' must be \[B, L, C\]"):
        dit.DiTState({"x": torch.zeros(5, 8)})


def test_values_are_immutable():
    call, state = dit.DenoiserCall(), dit.DiTState({"x": torch.zeros(1, 5, 8)})
    for value, name in ((call, "plan"), (state, "streams")):
        with pytest.raises(AttributeError):
            setattr(value, name, None)
    import copy

    options = call.within({"a": torch.zeros(1)})
    assert copy.deepcopy(options)[dit.CALL_KEY] is call and dit.call_of(options).options is options
