"""Numbers for Prometheus. Counters change when something happens; the rest is read from the ranks' last reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from comfy import accounting

RESULTS = ("done", "failed", "cancelled")
_STEP_BUCKETS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PROMPT_BUCKETS = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0)
# (name, what, key of a rank's report)
_GAUGES = (
    ("taco_dit_rank_memory_used_bytes", "Memory in use: of the GPU, or of the process on the CPU", "memory_used"),
    ("taco_dit_rank_memory_total_bytes", "Memory there is: of the GPU, or of the machine on the CPU", "memory_total"),
    ("taco_dit_rank_utilisation_ratio", "How busy the GPU is, or this process's share of all cores", "utilisation"),
    ("taco_dit_rank_temperature_celsius", "Temperature of the GPU", "temperature"),
)


class _Ranks:
    """Collects the ranks' latest reports."""

    def __init__(self, reports: Callable[[], list[dict[str, Any]]], queue_length: Callable[[], int]) -> None:
        self._reports = reports
        self._queue_length = queue_length

    def collect(self) -> Iterable[Metric]:
        reports = self._reports()
        yield GaugeMetricFamily("taco_dit_ranks", "Ranks of this program", len(reports))
        yield GaugeMetricFamily("taco_dit_queue_length", "Prompts that wait or run", self._queue_length())
        for name, what, key in _GAUGES:
            gauge = GaugeMetricFamily(name, what, labels=["rank", "device"])
            for report in reports:
                if report.get(key) is not None:
                    gauge.add_metric([str(report["rank"]), str(report["device"])], report[key])
            yield gauge
        for key in ("calls", "compute", "exchange"):
            unit = "steps" if key == "calls" else f"{key}_seconds"
            what = {
                "calls": "Denoiser calls",
                "compute": "Time in denoiser calls without exchange",
                "exchange": "Time in exchanges, waiting for other ranks included",
            }[key]
            counter = CounterMetricFamily(f"taco_dit_rank_{unit}", what, labels=["rank"])
            for report in reports:
                value = report.get("ever", {}).get(key, 0)
                counter.add_metric([str(report["rank"])], value if key == "calls" else value / 1e3)
            yield counter


class Metrics:
    """The program's metrics, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, reports: Callable[[], list[dict[str, Any]]], queue_length: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._prompts = Counter("taco_dit_prompts", "Prompts that ended", ["result"], registry=self.registry)
        for result in RESULTS:
            self._prompts.labels(result)
        self._failures = Counter(
            "taco_dit_rank_failures", "Prompts that failed on this rank first", ["rank"], registry=self.registry
        )
        self._steps = Histogram(
            "taco_dit_step_seconds", "Time of a denoiser call on rank 0", buckets=_STEP_BUCKETS, registry=self.registry
        )
        self._prompt_seconds = Histogram(
            "taco_dit_prompt_seconds", "Time of a whole prompt", buckets=_PROMPT_BUCKETS, registry=self.registry
        )
        self._phases = Counter(
            "taco_dit_phase_seconds", "Time of prompts by phase, on rank 0", ["phase"], registry=self.registry
        )
        self._counts = Counter(
            "taco_dit_work", "What prompts moved and captured, on rank 0", ["kind"], registry=self.registry
        )
        for name in accounting.PHASES:
            self._phases.labels(name)
        for name in accounting.COUNTS:
            self._counts.labels(name)
        self.registry.register(_Ranks(reports, queue_length))

    def step(self, milliseconds: float) -> None:
        """A denoiser call is over."""
        self._steps.observe(milliseconds / 1e3)

    def times(self, record: dict[str, Any]) -> None:
        """Where the time of a prompt that is over went: `accounting.Record.as_dict()`."""
        self._prompt_seconds.observe(record["total"])
        for name, seconds in record["phases"].items():
            self._phases.labels(name).inc(max(0.0, seconds))
        for name, number in record["counts"].items():
            self._counts.labels(name).inc(number)

    def prompt(self, result: str, failed_rank: int | None = None) -> None:
        """A prompt is over: one of `RESULTS`, and where it failed."""
        self._prompts.labels(result).inc()
        if failed_rank is not None:
            self._failures.labels(str(failed_rank)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
