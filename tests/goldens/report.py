"""Run the tests against recorded figures and print a table by topic.

    python -m tests.goldens.report [pytest arguments]

The exit status is 1 when a test failed, or when there are no figures to compare with.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.goldens import golden

HERE = Path(__file__).parent


@dataclasses.dataclass
class Row:
    """What happened to the cases of one topic."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    worst: float = 0.0
    worst_case: str = ""


class Collector:
    """A pytest plugin that counts outcomes by test file and keeps the errors that `golden.check` measured."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = collections.defaultdict(Row)
        self.seen: set[tuple[str, str]] = set()
        self.failures: list[str] = []

    @staticmethod
    def _name(nodeid: str) -> str:
        return Path(nodeid.split("::")[0]).stem.removeprefix("test_").replace("_", " ")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a case once: when it was called, or when it did not get that far."""
        if report.when != "call" and report.passed:
            return
        row = self.rows[self._name(report.nodeid)]
        if report.skipped:
            row.skipped += 1
        elif report.failed:
            row.failed += 1
            self.failures.append(report.nodeid)
        else:
            row.passed += 1
        for key, error in golden.WORST.items():
            if key not in self.seen:
                self.seen.add(key)
                if error >= row.worst:
                    row.worst, row.worst_case = error, key[1]


def print_table(rows: dict[str, Row]) -> None:
    """One line a topic, and a sum."""
    width = max([len(name) for name in rows] + [len("topic")])
    print(f"\n{'topic':<{width}}  cases  passed  failed  skipped  worst relative error")
    total = Row()
    for name, row in sorted(rows.items()):
        cases = row.passed + row.failed + row.skipped
        worst = f"{row.worst:.2e}  ({row.worst_case})" if row.worst_case else "-"
        print(f"{name:<{width}}  {cases:>5}  {row.passed:>6}  {row.failed:>6}  {row.skipped:>7}  {worst}")
        total.passed += row.passed
        total.failed += row.failed
        total.skipped += row.skipped
    cases = total.passed + total.failed + total.skipped
    print(f"{'all':<{width}}  {cases:>5}  {total.passed:>6}  {total.failed:>6}  {total.skipped:>7}")


def main(arguments: list[str]) -> int:
    """Run, print, and return the exit status."""
    if golden.folder() is None:
        print("recorded figures not found: set TACO_GOLDENS to their folder", file=sys.stderr)
        return 1
    collector = Collector()
    status = pytest.main(["-p", "no:cacheprovider", "-q", "--no-header", str(HERE), *arguments], plugins=[collector])
    print_table(collector.rows)
    for nodeid in collector.failures:
        print(f"FAILED {nodeid}")
    return 1 if status != pytest.ExitCode.OK or collector.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
