"""Which of the official workflow templates this version can run.

    python -m tools.template_coverage            a summary by model family, and the most wanted missing node types
    python -m tools.template_coverage --list     also each template with what it lacks
    python -m tools.template_coverage --json     the same as one JSON object
    python -m tools.template_coverage --run      run every template that should work, on one rank and on two
    python -m tools.template_coverage --run NAME ...

A template counts as covered when every node type in it, sub-graphs included, exists here or in the page, and as runnable
when the families of its model files are here, too (`app.template_requirements`). Templates that call remote, paid services
(`openSource: false` in the index) are left out. `--run` needs Chromium and the official page: it runs runnable templates
(or those that are named) on small stand-in files with random weights, at reduced sizes and steps (`tools.template_run`),
and says of all others what they lack. A whole run takes about an hour on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.template_requirements import FRONT_END_TYPES, active_nodes, missing_of


@dataclass
class Template:
    """A template: its node types (those that run) and the models it was made for."""

    name: str
    title: str
    families: list[str]
    types: set[str] = field(default_factory=set)
    graph: Mapping[str, Any] = field(default_factory=dict)

    def missing(self, known: frozenset[str] | set[str]) -> list[str]:
        """Node types that do not exist."""
        return sorted(self.types - known - FRONT_END_TYPES)


def node_types(graph: Mapping[str, Any]) -> set[str]:
    """Types of a workflow's nodes, sub-graphs taken apart, nodes that are switched off left out."""
    return {str(node["type"]) for node in active_nodes(graph)}


def load_templates() -> list[Template]:
    """The official templates that need no remote service. Raises FileNotFoundError when they are not installed."""
    from app.frontend_management import template_file

    index = template_file("index.json")
    if index is None:
        raise FileNotFoundError("the templates are not installed; run pip install comfyui-workflow-templates-json")
    with open(index, encoding="utf-8") as file:
        groups = json.load(file)
    templates = {}
    for entry in (entry for group in groups for entry in group["templates"]):
        path = os.path.join(os.path.dirname(index), entry["name"] + ".json")
        if entry.get("openSource", True) is False or not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8") as file:
            graph = json.load(file)
        families = entry.get("models") or ["no model"]
        templates[entry["name"]] = Template(entry["name"], entry.get("title", ""), families, node_types(graph), graph)
    return list(templates.values())


def known_types() -> set[str]:
    """All node types of this program, and those of its own pack in custom_nodes."""
    import nodes

    async def load() -> None:
        failed = await nodes.init_builtin_extra_nodes()
        if failed:
            raise RuntimeError(f"these node files do not load: {', '.join(failed)}")
        own = os.path.join(os.path.dirname(os.path.abspath(nodes.__file__)), "custom_nodes", "websocket_image_save.py")
        await nodes.load_custom_node(own)

    asyncio.run(load())
    return set(nodes.NODE_CLASS_MAPPINGS)


def report(templates: list[Template], known: set[str]) -> dict[str, Any]:
    """Counts, by family, and what is missing most."""
    families: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    wanted: collections.Counter[str] = collections.Counter()
    alone: collections.Counter[str] = collections.Counter()
    lacking: dict[str, list[str]] = {}
    needs: dict[str, list[dict[str, str]]] = {}
    for template in templates:
        needed = missing_of(template.graph, known)
        if needed:
            needs[template.name] = needed
        missing = template.missing(known)
        for family in template.families:
            families[family][0] += not missing
            families[family][1] += 1
        wanted.update(missing)
        if missing:
            lacking[template.name] = missing
        if len(missing) == 1:
            alone.update(missing)
    return {
        "templates": len(templates),
        "covered": len(templates) - len(lacking),
        "runnable": len(templates) - len(needs),
        "families": {
            family: {"covered": covered, "templates": count}
            for family, (covered, count) in sorted(families.items(), key=lambda item: (-item[1][1], item[0]))
        },
        "wanted": [
            {"type": name, "templates": count, "last_missing_of": alone[name]}
            for name, count in sorted(wanted.items(), key=lambda item: (-item[1], item[0]))
        ],
        "missing": lacking,
        "needs": needs,
    }


def print_report(result: Mapping[str, Any], every: bool, most: int = 25) -> None:
    """The report for people."""
    print(f"{result['covered']} of {result['templates']} templates have every node type")
    print(f"{result['runnable']} of {result['templates']} have every model family as well")
    print("\nby model:")
    for family, counts in result["families"].items():
        print(f"  {counts['covered']:3} of {counts['templates']:3}  {family}")
    print("\nmost wanted node types (templates that need it; those that lack nothing else):")
    for entry in result["wanted"][:most]:
        print(f"  {entry['templates']:3} {entry['last_missing_of']:3}  {entry['type']}")
    if every:
        print("\ntemplates and what they lack:")
        for name, needed in sorted(result["needs"].items()):
            print(f"  {name}: {', '.join(entry['name'] for entry in needed)}")


def run(templates: list[Template], known: set[str], names: list[str], ranks: list[int]) -> dict[str, Any]:
    """Run templates: those named, else all that lack nothing. See `tools.template_run`."""
    from tools.template_run import LIMITS, run_templates

    graphs = {template.name: template.graph for template in templates}
    chosen = names or [name for name in graphs if not missing_of(graphs[name], known)]
    limits = ", ".join(f"{name} {value:g}" for name, value in LIMITS.items())
    print(f"{len(chosen)} templates on {' and '.join(map(str, ranks))} rank(s); at most {limits}", flush=True)
    with tempfile.TemporaryDirectory(prefix="templates_") as base:
        reports = run_templates(
            {name: graphs[name] for name in chosen}, base, ranks, lambda line: print(line, flush=True)
        )
    return {
        "run": len(reports),
        "ranks": ranks,
        "limits": LIMITS,
        "succeeded": sum(report.state == "runs" for report in reports),
        "reports": [dataclasses.asdict(report) for report in reports],
    }


def print_run(result: Mapping[str, Any]) -> None:
    """The outcome of `run` for people."""
    print(f"\n{result['succeeded']} of {result['run']} templates ran to their results, equal on all numbers of ranks")
    for report in result["reports"]:
        if report["state"] != "runs":
            print(f"  {report['state']:13} {report['name']}: {report['why'] or report['difference']}")


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="also list each template with what it lacks")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--run", nargs="*", metavar="NAME", help="run templates: those named, or all that should work")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to run on")
    options = parser.parse_args(arguments)
    try:
        templates = load_templates()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    known = known_types()
    unknown = sorted({*(options.run or ())} - {template.name for template in templates})
    if unknown:
        print(f"there is no template {', '.join(unknown)}; --list names those that lack something", file=sys.stderr)
        return 2
    result = report(templates, known)
    if not options.json:
        print_report(result, options.list)
    ran = None
    if options.run is not None:
        try:
            ran = run(templates, known, options.run, options.ranks)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        print_run(ran)
    if options.json:
        print(json.dumps({**result, **({} if ran is None else {"outcome": ran})}))
    return 0 if ran is None or ran["succeeded"] == ran["run"] else 1


if __name__ == "__main__":
    sys.exit(main())
