"""Is a node pack right, also on several GPUs?

    python -m tools.try_pack PATH                a pack's folder (or .py file), on one rank and on two
    python -m tools.try_pack PATH --only 'My*'   some of its nodes
    python -m tools.try_pack PATH --family sdxl  with another family's tiny model than Flux's
    python -m tools.try_pack PATH --json         the results as one JSON object

The pack is copied into a scratch folder with tiny models and loaded by two servers of its own on the CPU, with one rank and
with two. A small workflow is built around each of its nodes (`graphs`) and run on both. What the node returns is compared:
between the ranks, which must have the same, and with the server of one rank. Nothing of an installation is read or written,
but the pack's code runs: try packs that you trust.

Exit status: 0 when the pack was loaded and nothing depends on the number of ranks; 1 otherwise; 2 for a PATH that is no
pack. Nodes that fail on one rank too (a service that is not reachable, a model that is not there) are listed, and are no
reason for 1. `docs/custom_nodes.md` says what packs have to observe.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tools.try_pack.graphs import FAMILIES, NoGraph, around, empty_lists
from tools.try_pack.importing import problems, undescribed
from tools.try_pack.trial import Run, Trial, difference, make_base, make_models, pack_name

SAME, VARIES, FAILS, REFUSED, UNTRIED = "same", "varies", "fails", "refused", "not run"
DIFFERS, BREAKS = "DIFFERS", "BREAKS"
MEANING = {
    SAME: "the same on one rank and on several",
    VARIES: "the ranks agree; each run gives something else, also on one rank",
    FAILS: "fails, on one rank too",
    REFUSED: "the values chosen here are refused",
    UNTRIED: "no workflow could be built",
    DIFFERS: "another result with several ranks, or ranks that disagree",
    BREAKS: "fails with several ranks only",
}


@dataclasses.dataclass
class Verdict:
    """What was found about a node."""

    node: str
    outcome: str
    detail: str = ""


@dataclasses.dataclass
class Report:
    """What was found about a pack."""

    pack: str
    ranks: int
    loaded: bool
    problems: list[str]
    empty: dict[str, list[str]]
    nodes: list[Verdict]

    @property
    def good(self) -> bool:
        return self.loaded and not any(verdict.outcome in (DIFFERS, BREAKS) for verdict in self.nodes)


def judge(name: str, prompt: dict[str, Any], one: Trial, several: Trial, tolerance: float) -> Verdict:
    """Run a node's workflow on both servers."""
    alone, together = one.run(prompt), several.run(prompt)
    if alone.problem:
        outcome = REFUSED if alone.refused else FAILS
        return Verdict(name, outcome, alone.problem)
    if together.problem:
        return Verdict(name, BREAKS, together.problem)
    for rank in range(1, several.ranks):
        gap = difference(together.parts[0], together.parts[rank], tolerance)
        if gap:
            return Verdict(name, DIFFERS, f"rank 0 and rank {rank}: {gap}")
    gap = difference(alone.parts[0], together.parts[0], tolerance)
    if not gap:
        return Verdict(name, SAME)
    return Verdict(name, *_why_another(prompt, alone, one, gap, tolerance))


def _why_another(prompt: dict[str, Any], first: Run, one: Trial, gap: str, tolerance: float) -> tuple[str, str]:
    """Whether one rank gives another result each time, so that the difference says nothing of the ranks."""
    for _ in range(2):  # once more where the second run failed, which the first did not
        one.forget()
        again = one.run(prompt)
        if not again.problem:
            break
    varies = again.problem or difference(first.parts[0], again.parts[0], tolerance)
    return (VARIES, gap) if varies else (DIFFERS, f"one rank and several: {gap}")


def examine(name: str, one: Trial, several: Trial, arguments: argparse.Namespace, say: Any) -> Report:
    """Try all nodes of the pack."""
    infos = one.infos()
    mine = [node for node, info in infos.items() if info.get("python_module") == f"custom_nodes.{name}"]
    found = problems(one.server.log, name)
    known = set(several.infos())
    lost = [node for node in mine if node not in known]
    if lost:
        found.append(f"with {several.ranks} ranks these nodes are missing: {', '.join(sorted(lost))}")
    verdicts = [
        Verdict(node, UNTRIED, f"it cannot be described: {why}") for node, why in undescribed(one.server.log).items()
    ]
    for number, node in enumerate(sorted(fnmatch.filter(mine, arguments.only)), 1):
        say(f"\r{number}/{len(mine)} {node:60.60}")
        try:
            prompt = around(node, infos, set(mine), arguments.family)
        except NoGraph as error:
            verdicts.append(Verdict(node, UNTRIED, str(error)))
            continue
        verdicts.append(judge(node, prompt, one, several, arguments.tolerance))
    say("\r" + " " * 72 + "\r")
    empty = {node: lists for node in sorted(mine) if (lists := empty_lists(infos[node]))}
    return Report(name, several.ranks, bool(mine) or not found, found, empty, verdicts)


def try_pack(path: str, folder: str, arguments: argparse.Namespace, say: Any) -> Report:
    """Load the pack at `path` in two scratch servers below `folder` and examine it."""
    name = pack_name(path)
    models = make_models(os.path.join(folder, "models"), arguments.family)
    trials: list[Trial] = []
    try:
        for ranks in (1, arguments.ranks):
            base = make_base(os.path.join(folder, f"{ranks}_ranks"), path, models)
            trials.append(Trial(base, ranks, arguments.flag, arguments.timeout))
        for trial in trials:
            try:
                trial.wait_ready()
            except AssertionError as error:
                problem = f"a server with {trial.ranks} ranks did not start with it: {error}"
                return Report(name, arguments.ranks, False, [problem], {}, [])
        return examine(name, trials[0], trials[1], arguments, say)
    finally:
        for trial in trials:
            trial.close()


def show(report: Report) -> None:
    """The table."""
    print(f"{report.pack}: {len(report.nodes)} nodes, 1 and {report.ranks} ranks")
    for problem in report.problems:
        print(f"  {problem}")
    for node, names in report.empty.items():
        print(f"  {node}: nothing to choose for {', '.join(names)}; put files into the folder that it lists")
    width = max((len(verdict.node) for verdict in report.nodes), default=0)
    for verdict in report.nodes:
        print(f"  {verdict.node:{width}}  {verdict.outcome:8} {verdict.detail:.160}".rstrip())
    for outcome, count in Counter(verdict.outcome for verdict in report.nodes).most_common():
        print(f"{count:5} {outcome}: {MEANING[outcome]}")


def as_json(report: Report, seconds: float) -> Mapping[str, Any]:
    """The report as plain data."""
    return {**dataclasses.asdict(report), "good": report.good, "seconds": round(seconds, 1)}


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m tools.try_pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="PATH", help="folder or .py file of the pack")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="number of ranks to compare with one (2)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="nodes to run, by class name")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="flux", help="whose tiny model is used (flux)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="as part of the largest number (0.001)")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for each workflow (60)")
    parser.add_argument("--flag", action="append", default=[], help="another flag for the servers, --flag=--fast")
    parser.add_argument("--keep", metavar="FOLDER", help="use this empty folder for scratch files, and leave it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    try:
        pack_name(arguments.path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    folder = arguments.keep or tempfile.mkdtemp(prefix="try_pack_")
    say = (lambda text: print(text, end="", file=sys.stderr, flush=True)) if sys.stderr.isatty() else lambda text: None
    began = time.monotonic()
    try:
        report = try_pack(arguments.path, folder, arguments, say)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        print(json.dumps(as_json(report, time.monotonic() - began), indent=1))
    else:
        show(report)
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
