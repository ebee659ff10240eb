"""Command line of the chaos tool; see the package."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tests.chaos import soak
from tests.chaos.prompts import Prompts
from tests.chaos.report import Report
from tests.chaos.run import Settings

Work = Callable[[Settings, Report], Awaitable[dict[str, Any]]]


def _common(parser: argparse.ArgumentParser, ranks: int) -> None:
    parser.add_argument("--ranks", type=int, default=ranks)
    parser.add_argument("--seed", type=int, help="default: a random one, printed first")
    parser.add_argument("--out", help="folder for records and summary (default: chaos_DATE in the current folder)")
    parser.add_argument("--without", default="", help="comma-separated: groups of actions, or persistence")
    parser.add_argument("--gpu", action="store_true", help="on CUDA instead of the CPU")
    parser.add_argument("--models", help="models folder to use instead of tiny models")
    parser.add_argument("--workflow", help="workflow in API form to use instead of the tiny ones; needs --models")
    parser.add_argument("--tolerance", type=int, default=1, help="largest difference of equal pictures, in 1/255")


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    from tests import chaos

    parser = argparse.ArgumentParser(
        "python -m tests.chaos", description=chaos.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _common(parser, 3)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--pace", type=float, default=2.0, help="mean pause between actions, s")
    parser.add_argument("--reference-every", type=int, default=50, help="a reference picture every so many prompts")
    parser.add_argument("--kills-until", type=float, help="minutes after which no rank is killed or restarted")
    return parser


def settings_of(arguments: argparse.Namespace, **more: Any) -> tuple[Settings, frozenset[str]]:
    """Settings, and the groups of actions that are left out. Raises ValueError for flags that do not fit together."""
    without = frozenset(word for word in arguments.without.split(",") if word)
    if arguments.ranks < 2:
        raise ValueError(f"--ranks {arguments.ranks}: one rank has no supervisor that replaces it; use 2 or more")
    if (arguments.models is None) != (arguments.workflow is None):
        raise ValueError("--models and --workflow belong together: give both, or neither for tiny models")
    if arguments.models is not None and not os.path.isdir(arguments.models):
        raise ValueError(f"--models {arguments.models} is not a folder")
    Prompts(arguments.workflow)  # a wrong file is told before anything starts
    out = arguments.out or time.strftime("chaos_%Y%m%d_%H%M%S")
    settings = Settings(
        arguments.ranks, out, arguments.gpu, arguments.models, arguments.workflow, "persistence" not in without,
        arguments.tolerance, start_s=900.0 if arguments.gpu else 120.0, **more,
    )  # fmt: skip
    return settings, without - {"persistence"}


def conduct(settings: Settings, seed: int, work: Work, text: Callable[[dict[str, Any]], list[str]]) -> int:
    """Run to the end or to Ctrl-C; the exit status."""
    report = Report(settings.out)
    report.say(f"seed {seed}; command: {' '.join(sys.argv[1:])}")
    summary: dict[str, Any] = {}

    async def whole() -> None:
        task = asyncio.current_task()
        assert task is not None
        told = False

        def end() -> None:
            """The first signal ends the run; further ones must not break its cleaning up."""
            nonlocal told
            if not told:
                task.cancel()
            told = True

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, end)
        summary.update(await work(settings, report))

    try:
        asyncio.run(whole())
    except asyncio.CancelledError:
        report.finding("tool", "ended by a signal before its time")
    except Exception as error:  # noqa: BLE001 - what is known by now is still written down
        report.finding("tool", f"{type(error).__name__}: {error}")
        report.record("traceback", text=traceback.format_exc())
    lines = text(summary) if summary else []
    return report.finish({"seed": seed, "command": sys.argv[1:], **summary}, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status: 0 when nothing was wrong, 1 with findings, 2 for wrong flags."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from tests.chaos import clients, kills

    mode: Any = {"kills": kills, "clients": clients}.get(argv[0]) if argv else None
    parser = build_parser() if mode is None else mode.build_parser(_common)
    arguments = parser.parse_args(argv if mode is None else argv[1:])
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    try:
        if mode is not None:
            settings, without = settings_of(arguments, **mode.SETTINGS)
            return conduct(settings, seed, mode.work_of(arguments, seed), mode.lines)
        if arguments.workflow is not None:
            raise ValueError("random prompts need the tiny models; --workflow is for kills and clients")
        settings, without = settings_of(
            arguments, small_disk="disk" not in arguments.without.split(","), keep_history=200
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))

    async def work(settings: Settings, report: Report) -> dict[str, Any]:
        return await soak.soak(
            settings, report, arguments.minutes, seed, arguments.pace, without, arguments.reference_every,
            arguments.kills_until,
        )  # fmt: skip

    return conduct(settings, seed, work, soak.lines)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(1)
