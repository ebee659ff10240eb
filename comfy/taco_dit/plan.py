"""Explain how a model would run on some GPUs, without them: layouts, plans, predicted times and memory.

    python -m comfy.taco_dit.plan --model flux-dev --size 1024 --gpus 6 --link pcie4
    python -m comfy.taco_dit.plan --model wan-14b --size 1280x720 --frames 81 --cfg 5 --gpus 8 --gpu a100 --link nvlink3
    python -m comfy.taco_dit.plan --model flux-dev --gpu 4090,4090,3090 --link pcie4 --batch 4 --json

Exit status: 0, or 2 for flags that cannot be.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from comfy.taco_dit.core import hardware
from comfy.taco_dit.core.config_manager import ConfigError, TacoConfig, load_config, validate_for
from comfy.taco_dit.core.degrees import Workload
from comfy.taco_dit.core.layout_choice import Weighed, weigh_layouts
from comfy.taco_dit.core.machine_profile import MachineProfile
from comfy.taco_dit.core.network_cost import KNOWN, NetworkCost, known
from comfy.taco_dit.core.plan import Plan, choose_plan

_PATCH = 16
"""Pixels of a token on each axis: the VAE's factor 8, patches of 2."""
_FRAMES = 4
"""Frames of a video that become one in the latent, after the first."""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return _positive(width), _positive(height or width)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m comfy.taco_dit.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, choices=list(KNOWN), help="a known model")
    add("--size", type=_size, default=(1024, 1024), metavar="N or WxH", help="pixels; default 1024")
    add("--frames", type=_positive, default=1, help="of a video; default 1")
    add(
        "--gpus", type=_positive, default=None, metavar="N", help="number of GPUs; default 1, or as many as --gpu names"
    )
    add(
        "--gpu",
        default="h100",
        metavar="NAME[,NAME...]",
        help=f"one for all, or one for each: {', '.join(hardware.GPUS)}",
    )
    add("--link", default="nvlink", choices=list(hardware.LINKS), help="between the GPUs of a host; default nvlink")
    add("--hosts", type=_positive, default=1, help="over which the GPUs are spread evenly; default 1")
    add("--network", type=float, default=100.0, metavar="GBITS", help="of each host, Gb/s; default 100")
    add("--cfg", type=float, default=1.0, help="above 1 a call has two conditionings; default 1")
    add("--batch", type=_positive, default=1, help="pictures; default 1")
    add("--taco-config", metavar="FILE", help="a configuration, whose degrees hold")
    add("--json", action="store_true", help="as JSON")
    return parser


def machine(options: argparse.Namespace) -> MachineProfile:
    """The profile that the flags describe. Raises ValueError."""
    names = options.gpu.split(",")
    count = options.gpus or len(names)
    if len(names) == 1:
        names *= count
    if len(names) != count:
        raise ValueError(f"--gpu names {len(names)} GPUs, but --gpus is {count}")
    if count % options.hosts:
        raise ValueError(f"{count} GPUs cannot be spread evenly over {options.hosts} hosts")
    if options.network <= 0:
        raise ValueError(f"--network is {options.network:g}; it must be above 0")
    return hardware.profile(names, options.link, count // options.hosts, options.network)


def workload(options: argparse.Namespace, network: NetworkCost, text: int) -> Workload:
    """One denoiser call of the prompt that the flags describe."""
    width, height = options.size
    frames = 1 + -(-(options.frames - 1) // _FRAMES)
    tokens = frames * -(-width // _PATCH) * -(-height // _PATCH) + text
    return Workload(2 if options.cfg > 1 else 1, options.batch, tokens, network.heads, network.hidden)


def _memory(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def explain(work: Workload, network: NetworkCost, profile: MachineProfile, found: list[Weighed], plan: Plan) -> str:
    """The whole text. found: as from `weigh_layouts`; plan: of the layout that keeps all weights on each device."""
    best = found[0]
    lines = [
        f"{network.name}: {network.weight_bytes / 2e9:.1f} billion weights, {network.blocks} blocks, {work.tokens} tokens, "
        f"{work.conds} conditioning{'s'[: work.conds > 1]}, {work.pictures} picture{'s'[: work.pictures > 1]}",
        f"machine: {profile.describe()}",
        "",
    ]
    rows = [("weights", "plan", "predicted", "of it", "memory", "")]
    for one in found:
        mark = "chosen" if one is best and not one.objection else one.objection
        rows.append((one.name, one.plan, f"{one.predicted.total:.1f} ms", one.predicted.parts(), _memory(one.memory.total),
                     mark))  # fmt: skip
    lines += _table(rows)
    if len(plan.considered) > 1:
        others = [(c.plan, c.impossible or f"{c.predicted_ms:.1f} ms") for c in plan.considered]
        lines += ["", "plans with whole weights on each GPU:", *(f"  {line}" for line in _table(others))]
    lines += ["", _conclusion(best, network, work, profile)]
    return "\n".join(lines)


def _conclusion(best: Weighed, network: NetworkCost, work: Workload, profile: MachineProfile) -> str:
    if best.objection:
        return f"Nothing can be chosen: {best.name} {best.objection}. Use more or larger GPUs, or a smaller picture or batch."
    text = f"Chosen: weights {best.name}, {best.plan}"
    if best.reason != best.plan:
        text += f" ({best.reason})"
    text += f". A step is predicted to take {best.predicted.total:.1f} ms"
    if len(profile.devices) > 1:
        alone = MachineProfile(profile.devices[:1], ((profile.links[0][0],),), profile.host_gbs, profile.launch_us,
                               source=profile.source)  # fmt: skip
        single = weigh_layouts(TacoConfig().parallel, network, work, alone)[0]
        if not single.objection:
            text += f", {single.predicted.total / best.predicted.total:.2f} times as fast as on one ({single.name})"
    return text + "."


def main(argv: list[str]) -> int:
    """Command line."""
    options = _parser().parse_args(argv)
    try:
        profile = machine(options)
        ranks = len(profile.devices)
        config = load_config(options.taco_config) if options.taco_config else TacoConfig()
        parallel = validate_for(config, ranks).parallel
        network, text = known(options.model)
        work = workload(options, network, text)
        found = weigh_layouts(parallel, network, work, profile)
        plan = choose_plan(parallel, work, ranks, profile=profile, network=network)
    except (ValueError, ConfigError) as error:
        print(f"comfy.taco_dit.plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        content = {"model": network.name, "tokens": work.tokens, "conds": work.conds, "pictures": work.pictures,
                   "machine": profile.describe(), "layouts": [one.as_dict() for one in found],
                   "plans": plan.considered_as_dicts()}  # fmt: skip
        print(json.dumps(content, indent=1))
    else:
        print(explain(work, network, profile, found, plan))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
