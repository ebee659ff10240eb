"""Times of denoiser calls, reports of ranks, and the metrics made of them."""

from __future__ import annotations

import json
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from comfy.taco_dit.utils.metrics import Metrics
from comfy.taco_dit.utils.monitor import Monitor
from comfy.taco_dit.utils.performance_monitor import Clock
from comfy.taco_dit.utils.rank_sampler import RankSampler


class Store:
    """Stands for the control store: what is there can be got, the rest would block."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value

    def count(self):
        return len(self.values)

    def peek(self, key):
        return self.values.get(key, b"")


def manager(rank=0, world=1, store=None):
    return SimpleNamespace(rank=rank, world_size=world, device=torch.device("cpu"), control=store)


def engine():
    return SimpleNamespace(clock=Clock(torch.device("cpu")), runner=SimpleNamespace(busy=False))


def step(clock, exchange_s=0.002):
    with clock.call():
        time.sleep(0.001)
        with clock.exchange():
            time.sleep(exchange_s)


def test_the_clock_adds_up_runs_and_all_runs():
    clock = Clock(torch.device("cpu"))
    seen = []
    clock.observer = seen.append
    step(clock)
    assert clock.run.calls == 1 and clock.run.total >= 3 and 2 <= clock.run.exchange < clock.run.total
    step(clock)
    times = clock.read()
    assert times["calls"] == 2 and times["compute"] == pytest.approx(times["total"] - times["exchange"])
    clock.restart()
    assert clock.run.calls == 0 and clock.ever.calls == 2 and len(seen) == 2
    step(clock)
    assert (clock.run.calls, clock.ever.calls) == (1, 3)


def test_exchanges_of_a_call_that_failed_count_for_no_other():
    clock = Clock(torch.device("cpu"))
    with pytest.raises(ValueError), clock.call():
        with clock.exchange():
            time.sleep(0.05)
        raise ValueError
    step(clock, exchange_s=0)
    assert clock.read()["calls"] == 1 and clock.read()["exchange"] < 40


def test_a_rank_on_the_cpu_says_what_it_knows_only():
    read = RankSampler(torch.device("cpu")).read()
    assert 0 < read["memory_used"] < read["memory_total"] and 0 <= read["utilisation"] <= 1
    assert read["temperature"] is None


class NoSuchValue(Exception):
    """Stands for NVMLError."""


def fake_nvml(monkeypatch, **functions):
    """A GPU whose NVML has these functions; the others fail as unsupported ones do."""

    def unsupported(*arguments):
        raise NoSuchValue

    names = ("nvmlDeviceGetHandleByUUID", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates",
             "nvmlDeviceGetTemperature")  # fmt: skip
    nvml = {"NVMLError": NoSuchValue, "NVML_TEMPERATURE_GPU": 0, "nvmlInit": lambda: None}
    nvml |= dict.fromkeys(names, unsupported) | functions
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**nvml))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))


def test_a_gpu_is_asked_by_its_own_name(monkeypatch):
    fake_nvml(
        monkeypatch,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(free=25, total=100),
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=97 if gpu == "GPU-12-34" else 0),
        nvmlDeviceGetTemperature=lambda gpu, sensor: 61,
    )
    read = RankSampler(torch.device("cuda", 1)).read()
    assert (read["memory_used"], read["utilisation"], read["temperature"]) == (75, 0.97, 61)


def test_what_a_gpu_does_not_tell_is_not_invented(monkeypatch):
    fake_nvml(monkeypatch)
    read = RankSampler(torch.device("cuda", 0)).read()
    assert (read["memory_used"], read["memory_total"]) == (70, 100), "torch knows the memory"
    assert read["utilisation"] is None and read["temperature"] is None


def test_rank_0_reads_the_others_and_their_events_once():
    store = Store()
    first, second = Monitor(manager(0, 2, store), engine()), Monitor(manager(1, 2, store), engine())
    first._tick()
    assert [report["rank"] for report in first.reports()] == [0], "a rank that has said nothing is not waited for"
    second.events.add("warning", "from rank 1", rank=1)
    second._tick()
    first._tick()
    first._tick()
    assert [report["rank"] for report in first.reports()] == [0, 1]
    (event,) = first.events.as_list()
    assert (event["text"], event["ranks"], event["count"]) == ("from rank 1", [1], 1)
    json.dumps(first.reports())


def test_a_rank_that_is_silent_grows_old():
    store = Store()
    first, second = Monitor(manager(0, 2, store), engine()), Monitor(manager(1, 2, store), engine())
    second._tick()
    first._tick()
    first._arrived[1] -= 10
    first._tick()
    ages = {report["rank"]: report["age"] for report in first.reports()}
    assert ages[0] < 1 and ages[1] >= 10


def test_the_thread_ticks_at_once_when_woken():
    monitor = Monitor(manager(), engine())
    ticks = []
    done = threading.Event()
    monitor.on_tick = lambda: (ticks.append(time.monotonic()), len(ticks) == 2 and done.set())
    monitor.start()
    monitor.wake()
    assert done.wait(5) and 0.2 < ticks[1] - ticks[0] < 0.9


def test_metrics_can_be_read_by_prometheus():
    reports = [
        {"rank": 0, "device": "cuda:0", "memory_used": 5, "memory_total": 10, "utilisation": 0.5, "temperature": 61,
         "ever": {"calls": 3, "total": 30.0, "exchange": 12.0, "compute": 18.0}},
        {"rank": 1, "device": "cpu", "memory_used": 6, "memory_total": 10, "utilisation": 0.25, "temperature": None},
    ]  # fmt: skip
    metrics = Metrics(lambda: reports, lambda: 4)
    metrics.prompt("done")
    metrics.prompt("failed", 1)
    metrics.step(40.0)
    samples = {
        (sample.name, *(v for k, v in sample.labels.items() if k != "device")): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }
    assert samples["taco_dit_ranks",] == 2 and samples["taco_dit_queue_length",] == 4
    assert samples["taco_dit_rank_memory_used_bytes", "1"] == 6
    assert samples["taco_dit_rank_temperature_celsius", "0"] == 61
    assert ("taco_dit_rank_temperature_celsius", "1") not in samples, "what is not known is not invented"
    assert samples["taco_dit_prompts_total", "done"] == 1 and samples["taco_dit_prompts_total", "cancelled"] == 0
    assert samples["taco_dit_rank_failures_total", "1"] == 1
    assert samples["taco_dit_rank_exchange_seconds_total", "0"] == pytest.approx(0.012)
    assert samples["taco_dit_rank_steps_total", "0"] == 3 and samples["taco_dit_rank_steps_total", "1"] == 0
    assert samples["taco_dit_step_seconds_count",] == 1
    assert (
        samples["taco_dit_step_seconds_bucket", "0.035"] == 0 and samples["taco_dit_step_seconds_bucket", "0.05"] == 1
    )
