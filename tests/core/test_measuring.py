"""The machine is measured by all ranks together, kept, and the same for all."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

from comfy.taco_dit.core import measuring, step_records
from comfy.taco_dit.core.distributed_manager import RankInfo, TACODiTDistributedManager
from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
from comfy.taco_dit.core.machine_profile import assumed
from comfy.taco_dit.doctor import plans
from comfy.taco_dit.utils.performance_monitor import RunStatistics
from tests.parallel.measuring_cases import measured_together, started_again
from tests.parallel.ranks import run_ranks


def alone() -> TACODiTDistributedManager:
    return TACODiTDistributedManager(RankInfo(), torch.device("cpu"))


def read(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def test_one_rank_is_measured_once(tmp_path, monkeypatch):
    path = str(tmp_path / "taco_dit" / "machine.json")
    began = time.perf_counter()
    first = measuring.agreed_profile(alone(), path, False, True)
    assert time.perf_counter() - began < 2
    assert first.measured and first.devices[0].matrix[-1][1] > 0 and first.host_gbs > 0 and first.launch_us > 0
    key = read(path)[0]["key"]
    assert measuring.load(path, key) == first and measuring.load(path, [*key, "other"]) is None
    assert measuring.agreed_profile(alone(), path, False, False) == assumed(1), "CPU ranks only on request"
    # as on a GPU: what was kept is taken without measuring, other versions are measured anew
    monkeypatch.setattr(measuring, "measure", lambda *args: pytest.fail("measured again"))
    assert measuring._alone(alone(), path, False, False) == first
    monkeypatch.setattr(measuring, "identity", lambda device: ["another driver"])
    with pytest.raises(pytest.fail.Exception):
        measuring._alone(alone(), path, False, False)


@pytest.mark.parametrize("content", ["", "[{}]", "{", '[{"key": 1, "profile": {"devices": 3}}]'])
def test_a_damaged_file_is_measured_anew(tmp_path, content, caplog):
    path = tmp_path / "machine.json"
    path.write_text(content)
    assert measuring.load(str(path), "key") is None and "measured again" in caplog.text
    measuring.keep(str(path), "key", assumed(2))
    assert measuring.load(str(path), "key") == assumed(2)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    measuring.keep(str(tmp_path / "file" / "machine.json"), "key", assumed(1))
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("ranks", range(2, 9))
def test_every_two_ranks_meet_once(ranks):
    met = set()
    for peers in measuring.rounds(ranks):
        for rank, peer in enumerate(peers):
            if peer is not None:
                assert peers[peer] == rank != peer
                met.add((rank, peer))
    assert len(met) == ranks * (ranks - 1)


def test_two_ranks_use_the_same_profile_and_say_what_was_predicted(tmp_path):
    path = str(tmp_path / "machine.json")
    first, second = run_ranks(2, measured_together, path)
    assert first["profile"] == second["profile"] and first["profile"]["source"] == "measured"
    assert first["plan"] == second["plan"] and first["predicted_ms"] == second["predicted_ms"] > 0
    assert first["measured_ms"] > 0
    assert f"(predicted {first['predicted_ms']:.1f})" in first["summary"]
    assert len(read(path)) == 1


def test_a_rank_that_starts_again_takes_the_profile_of_the_others(tmp_path):
    assert run_ranks(2, started_again, str(tmp_path / "machine.json")) == [True, True]


def test_a_rank_that_cannot_measure_leaves_all_with_assumed_numbers(tmp_path):
    results = run_ranks(2, measured_together, str(tmp_path / "machine.json"), 1)
    assert {result["profile"]["source"] for result in results} == {"assumed"}
    assert results[0]["predicted_ms"] is None and results[0]["plan"] == results[1]["plan"]


def test_one_rank_predicts_too(tmp_path):
    from comfy.taco_dit.core.config_manager import TacoConfig
    from comfy_execution.lockstep import Lockstep
    from tests.parallel.engine_cases import Model, batch

    manager = alone()
    engine = TACODiTExecutionEngine(TacoConfig(), manager, Lockstep())
    engine.profile = measuring.agreed_profile(manager, str(tmp_path / "machine.json"), False, True)
    engine.records_file = str(tmp_path / "user" / "steps.json")
    for _ in range(2):
        engine.begin_run()
        with torch.inference_mode():
            engine.evaluate(Model(), [batch(2, 12, 12, [0, 1])], {})
        engine.end_run()
    status = engine.status()
    (record,) = step_records.read(engine.records_file)
    assert (
        record.runs == 2
        and record.network == "Flux"
        and record.measured_ms <= status["last_run"]["mean_call_ms"] + 1e-3
    )
    (finding,) = plans.steps(engine.records_file, 1)
    assert f"one rank, predicted {record.predicted_ms:.1f} ms, measured {record.measured_ms:.1f} ms" in finding.text
    assert not list(plans.steps(engine.records_file, 2))
    assert status["active_plan"] == "one rank" and status["predicted_ms"] > 0 and status["machine"]["measured"]
    assert status["last_run"]["predicted_ms"] == status["predicted_ms"]


def test_a_speed_up_is_of_one_rank_measured_at_the_same_work_on_the_same_device(tmp_path):
    file = str(tmp_path / "steps.json")
    two = step_records.StepRecord("Flux", 2, 1, 4608, 2, "cfg 2", 60.0, 55.0, device="H")
    step_records.add(file, two)
    for changed in ({"tokens": 1024}, {"device": "A"}, {"network": "Wan"}):
        step_records.add(
            file, dataclasses.replace(two, **{"ranks": 1, "plan": "one rank", "measured_ms": 7.0, **changed})
        )
    assert step_records.one_rank_ms(file, two) is None
    step_records.add(file, dataclasses.replace(two, ranks=1, plan="one rank", measured_ms=100.0))
    assert step_records.one_rank_ms(file, two) == 100.0
    ranks = [{"calls": 2, "total": 110.0, "exchange": 0.0, "compute": 110.0}] * 2
    run = RunStatistics(world_size=2, working=2, ranks=ranks, one_rank_ms=100.0)
    assert run.speed_up == pytest.approx(100 / 55) and "1.82 times as fast as one rank, measured" in run.text()
    assert run.waste() == "" and dataclasses.replace(run, working=1).waste() == "2 ranks, 1 at work"
    assert dataclasses.replace(run, one_rank_ms=None).speed_up is None
