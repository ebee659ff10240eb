"""The configuration, and the plans it leads to on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from comfy.taco_dit.core.config_manager import ConfigError, TacoConfig
from comfy.taco_dit.core.launcher import read_config
from comfy.taco_dit.core.layout import NetworkFacts, choose_layout
from comfy.taco_dit.core.plan import Workload, choose_plan

from .findings import OK, PROBLEM, Finding

# Flux.1's sizes at 1024 x 1024: 4,096 picture tokens and 512 of text.
_CALLS = (
    ("one picture, cfg 1", Workload(1, 1, 4608, 24, 3072)),
    ("one picture, cfg above 1", Workload(2, 1, 4608, 24, 3072)),
    ("four pictures, cfg 1", Workload(1, 4, 4608, 24, 3072)),
)


# Its weights in bf16: 19 double and 38 single blocks, embeddings and head.
_FLUX = NetworkFacts("Flux.1", 23_802_816_640, (679_662_592,) * 19 + (283_183_616,) * 38, cuttable=True)


def configuration(args: argparse.Namespace, root: str, ranks: int) -> tuple[TacoConfig | None, list[Finding]]:
    """(the configuration if it is valid, findings about it)."""
    try:
        config = read_config(args, root, ranks)
    except ConfigError as error:
        remedy = "correct that key; docs/configuration.md lists each with its values"
        return None, [Finding(PROBLEM, "configuration", str(error), remedy)]
    return config, [Finding(OK, "configuration", config.source)]


def plans(config: TacoConfig, ranks: int) -> Iterator[Finding]:
    """What a Flux model at 1024 x 1024 would get."""
    layout, reason = choose_layout(config, _FLUX, None, ranks)
    yield Finding(OK, "weights", f"{layout.describe()}: {reason}" if reason else f"{layout.describe()} while they fit")
    for name, work in _CALLS:
        try:
            plan = choose_plan(config.parallel, work, ranks, layout)
        except ConfigError as error:
            yield Finding(PROBLEM, name, str(error), "set one of the degrees to auto (docs/configuration.md)")
            continue
        said = plan.dims.describe()
        yield Finding(OK, name, said if plan.reason == said else f"{said}: {plan.reason}")
