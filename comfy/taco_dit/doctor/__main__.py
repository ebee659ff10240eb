"""Examine this machine, installation and configuration.

    python -m comfy.taco_dit.doctor                        as the program would start without flags
    python -m comfy.taco_dit.doctor --gpus 0,1 --taco-config my.yaml      with the flags you start it with
    python -m comfy.taco_dit.doctor --doctor-json report.json             the report as a file too
    python -m comfy.taco_dit.doctor --doctor-quick                        without starting ranks

Exit status: 0 when nothing is wrong, 1 when there is a problem, 2 for flags that cannot be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


def main(argv: list[str]) -> int:
    """Command line."""
    own = argparse.ArgumentParser(prog="python -m comfy.taco_dit.doctor", description=__doc__, add_help=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    own.add_argument("--doctor-json", metavar="FILE")
    own.add_argument("--doctor-quick", action="store_true")
    own.add_argument("-h", "--help", action="store_true")
    mine, flags = own.parse_known_args(argv)
    if mine.help:
        print(__doc__)
        return 0
    from comfy.cli_args import parse_command_line
    from comfy.taco_dit.core import launcher

    args = parse_command_line(flags)
    try:
        plan = launcher.plan_launch(args, os.environ, launcher.list_gpus())
    except launcher.LaunchError as error:
        print(f"problem: {error}", file=sys.stderr)
        return 1
    os.environ.update(launcher.worker_environment(plan, os.environ))
    return examine_all(args, plan, mine.doctor_json, mine.doctor_quick)


def examine_all(args: argparse.Namespace, plan: object, file: str | None, quick: bool) -> int:
    """Run every check, print, and return the exit status."""
    import torch

    import folder_paths
    from comfy.taco_dit.core import step_records
    from comfy.taco_dit.core.launcher import LaunchPlan

    from . import machine, plans, ranks
    from .findings import Finding, Section, as_json, as_text, examine, problems

    assert isinstance(plan, LaunchPlan)
    folder_paths.configure(args)
    folders = {
        "base": folder_paths.base_path,
        "output": folder_paths.get_output_directory(),
        "temp": folder_paths.get_temp_directory(),
        "input": folder_paths.get_input_directory(),
        "user": folder_paths.get_user_directory(),
    }
    config, said = plans.configuration(args, ROOT, plan.ranks)
    device = torch.device("cpu" if plan.cpu or not torch.cuda.is_available() else "cuda")
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("versions", lambda: machine.versions(os.path.join(ROOT, "requirements.txt"))),
        ("devices", lambda: machine.devices(plan.gpus, plan.cpu, plan.messages)),
    ]
    if device.type == "cuda" and len(plan.gpus) > 1:
        checks.append(("topology", lambda: machine.topology(plan.gpus)))
    checks.append(("memory and disk", lambda: machine.resources(folders)))
    checks.append(("configuration", lambda: said))
    checks.append(("attention", lambda: ranks.attention_findings(device)))
    numbers: list[dict[str, Any]] = []  # what each rank measured
    if plan.ranks > 1 and not quick:
        title, environ = f"groups and links of {plan.ranks} ranks", dict(os.environ)
        checks.append((title, lambda: ranks.run_ranks(plan.ranks, device.type == "cpu", environ, numbers=numbers)))
    if config is not None:
        counted = "1 rank" if plan.ranks == 1 else f"{plan.ranks} ranks"
        title = f"plans for {counted}, Flux.1 at 1024 x 1024"
        alone = device if plan.ranks == 1 and not quick else None
        checks.append(
            (title, lambda: plans.plans(config, plan.ranks, ranks.machine_profile(numbers, plan.ranks, alone)))
        )
    records = os.path.join(folders["user"], step_records.FILE)
    if step_records.read(records):
        checks.append((f"steps that were run on {plan.ranks} rank{'s'[: plan.ranks > 1]}",
                       lambda: plans.steps(records, plan.ranks)))  # fmt: skip
    sections: list[Section] = []
    for title, check in checks:
        sections.append(examine(title, check))
    print(as_text(sections), end="")
    if file:
        with open(file, "w", encoding="utf-8") as out:
            json.dump(as_json(sections), out, indent=1)
    return 1 if problems(sections) else 0


if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    sys.exit(main(sys.argv[1:]))
