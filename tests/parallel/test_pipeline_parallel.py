"""Networks in pipeline stages equal whole ones, at odd sizes; PipeFusion is near, and equal where it should be."""

from __future__ import annotations

import pytest

import comfy.model_management as management
from comfy.model_patcher import ModelPatcher
from comfy.taco_dit import runtime
from comfy.taco_dit.core.config_manager import parse_config, validate_for
from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
from comfy.taco_dit.core.layout import stages_by_cost
from comfy.taco_dit.core.lockstep import RankLockstep

from .arranged_cases import CPU, Model, deviation, evaluated
from .pipeline_cases import exact, stale
from .ranks import run_ranks


@pytest.mark.parametrize("costs, count, stages", [
    ([1] * 5, 2, ((0, 2), (2, 5))),
    ([1] * 5, 1, ((0, 5),)),
    ([4, 1, 1, 1, 1], 2, ((0, 1), (1, 5))),
    ([1, 1, 1, 1, 4, 4], 3, ((0, 4), (4, 5), (5, 6))),
])  # fmt: skip
def test_stages_cost_alike(costs, count, stages):
    assert stages_by_cost(costs, count) == stages


def test_stages_have_alike_sizes_first():
    assert stages_by_cost([1] * 6, 2, [20, 20, 20, 10, 10, 10]) == ((0, 2), (2, 6))
    assert stages_by_cost([1] * 3, 2, [80, 10, 10]) == ((0, 1), (1, 3)), "as near as possible"


def test_more_stages_than_blocks_are_an_error():
    with pytest.raises(ValueError, match="3 blocks cannot be cut into 4 pipeline stages; use 1 to 3"):
        stages_by_cost([1, 1, 1], 4)


def _exact(manager, stages, ulysses):
    return exact(manager, stages, ulysses), stale(manager, stages, ulysses, 2 * stages + 1)


@pytest.mark.parametrize("ranks, stages, ulysses", [(2, 2, 1), (3, 3, 1), (4, 2, 2)])
def test_stages_equal_one_rank(ranks, stages, ulysses):
    for deviations, fusion in run_ranks(ranks, _exact, stages, ulysses):
        assert len(deviations) == 10
        assert not {name: found for name, found in deviations.items() if not found < 1e-5}
        total = {warm_up: sum(fusion[warm_up][0]) for warm_up in (1, 3, 6)}
        assert total[6] < 1e-5 < total[3] < 0.75 * total[1] < 0.1, total
        assert [fusion[warm_up][1] for warm_up in (1, 3, 6)] == [5, 3, 0]
        assert fusion["unchanged"] < 1e-5 and fusion["risen"] < 1e-5
        assert max(fusion[3][0][:3]) < 1e-5, "the first three calls are exact"


def _fusion(manager):
    """What the engine says of five calls with inputs that stay as they are, and the deviation of the last."""
    config = parse_config({"parallel": {"pipeline_parallel": True, "pipefusion": True}}, "test")
    lockstep = RankLockstep(manager)
    engine = TACODiTExecutionEngine(validate_for(config, manager.world_size), manager, lockstep)
    runtime.activate(runtime.Runtime(engine.config, manager, lockstep, engine))
    lockstep.begin("fusion")
    whole, parts = ModelPatcher(Model(), CPU, CPU), ModelPatcher(Model(), CPU, CPU)
    management.load_models_gpu([parts])
    serial = evaluated(whole.model)
    engine.begin_run()
    found = [deviation(evaluated(parts.model, engine), serial) for _ in range(5)]
    engine.end_run()
    kept = [keys for keys in engine.pipelines._stale.values() if keys._memories]
    engine.pipelines.end_run()
    assert kept and not any(keys._memories for keys in kept), "gigabytes are given up after a run"
    said = engine.summary(), engine.status()["pipefusion"]
    lockstep.end()
    return max(found), said


def test_pipefusion_is_named_as_lossy_with_what_was_not_exact():
    for worst, (summary, status) in run_ranks(2, _fusion):
        assert worst < 1e-5, "stale keys of inputs that do not change are right"
        assert status == {"calls": 5, "stale_calls": 3}, "two calls are exact by default"
        assert "lossy: PipeFusion: 3 of 5 calls attended to keys of the call before" in summary
