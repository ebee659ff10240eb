"""What a run writes down: JSON lines of everything, the list of what was wrong, and a summary as text and JSON."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from typing import Any


class Report:
    """Records go to `folder`/records.jsonl as they come; `finish` writes summary.json and summary.txt.

    A finding is something that was wrong: it is printed at once and makes the exit status 1.
    """

    def __init__(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        self.folder = folder
        self.begun = time.time()
        self.findings: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self._file = open(os.path.join(folder, "records.jsonl"), "a", encoding="utf-8")  # noqa: SIM115 - until close

    def record(self, what: str, **data: Any) -> None:
        """Write one line; `at` is seconds since the start."""
        line = {"what": what, "at": round(time.time() - self.begun, 3), **data}
        self._file.write(json.dumps(line, default=str) + "\n")
        self._file.flush()

    def say(self, text: str) -> None:
        """Print a line, with the time since the start, and record it."""
        print(f"[{time.time() - self.begun:7.1f} s] {text}", flush=True)
        self.record("said", text=text)

    def finding(self, kind: str, text: str, **data: Any) -> None:
        """Something was wrong."""
        at = round(time.time() - self.begun, 3)
        self.findings.append({"kind": kind, "text": text, "at": at, **data})
        self.record("finding", kind=kind, text=text, **data)
        print(f"[{at:7.1f} s] WRONG: {kind}: {text}", flush=True)

    def finish(self, summary: dict[str, Any], lines: list[str]) -> int:
        """Write and print the summary; the exit status: 0, or 1 when there are findings."""
        whole = {
            **summary,
            "seconds": round(time.time() - self.begun, 1),
            "counts": dict(sorted(self.counts.items())),
            "findings": self.findings,
        }
        text = [*lines, "", *_counted(self.counts), "", *_listed(self.findings)]
        with open(os.path.join(self.folder, "summary.json"), "w", encoding="utf-8") as file:
            json.dump(whole, file, indent=1, default=str)
        with open(os.path.join(self.folder, "summary.txt"), "w", encoding="utf-8") as file:
            file.write("\n".join(text) + "\n")
        print("\n".join(["", *text, f"records and summary: {self.folder}"]), flush=True)
        self._file.close()
        return 1 if self.findings else 0


def _counted(counts: Counter[str]) -> list[str]:
    return ["Counts:", *(f"  {name}: {number}" for name, number in sorted(counts.items()))]


def _listed(findings: list[dict[str, Any]]) -> list[str]:
    if not findings:
        return ["Nothing was wrong."]
    return [f"{len(findings)} findings:", *(f"  [{f['at']:7.1f} s] {f['kind']}: {f['text']}" for f in findings)]


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Lines of a table with columns of equal width."""
    cells = [head, *[[_shown(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells]


def _shown(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)
