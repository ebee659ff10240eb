"""Every family with a tiny configuration (`tests.tiny_families`): parallel sampling equals serial sampling.

All families share one set of ranks for each number of ranks. Sizes are odd, so that latents are padded and no number of
ranks divides the tokens.
"""

from __future__ import annotations

import pytest

from tests.tiny_families import TINY, UNETS

from . import family_cases
from .family_cases import ALL, Run
from .ranks import run_ranks

TOLERANCE = 1e-5
GUIDED = "guidance, mask and LoRA"
DITS = tuple(TINY)
SOME = ("flux", "sd35_medium", "pixart_sigma", "lumina2", "ltxv", "wan_vace", "hunyuan_video", "qwen_image_edit")
WITH_AREAS = tuple(name for name in DITS if name not in family_cases.OF_THE_WHOLE_VIDEO)
STAGED = tuple(name for name in WITH_AREAS if not name.startswith("hunyuan_dit"))  # its skips go past stages

# {name: (ranks, runs)}; each is one set of ranks.
RUNS = {
    "tokens on 2": (2, [
        Run("one picture", "ulysses 2"), Run(GUIDED, "ring 2"), Run("replaced block", "ulysses 2"),
    ]),
    "rows on 2": (2, [Run(GUIDED, "cfg 2"), Run("pictures", "data 2")]),
    "weights on 2": (2, [
        Run(GUIDED, "one rank", "tensor 2", DITS), Run("replaced block", "one rank", "tensor 2", SOME),
        Run("areas", "one rank", "pipeline 2", STAGED),
    ]),
    "rows of pictures on 2": (2, [Run(case, "spatial 2", "whole", tuple(UNETS)) for case in family_cases.CASES]),
    "on 3": (3, [
        Run(GUIDED, "ulysses 3"), Run("areas", "one rank", "tensor 3", WITH_AREAS),
        Run("replaced block", "spatial 3", "whole", tuple(UNETS)),
    ]),
    "on 4": (4, [
        Run(GUIDED, "cfg 2 x ulysses 2"), Run(GUIDED, "cfg 2", "tensor 2", SOME),
        Run(GUIDED, "cfg 2 x spatial 2", "whole", tuple(UNETS)),
    ]),
}  # fmt: skip
# UNets have their rows dealt and their cells whole: where others share tokens, their ranks repeat the call.
AS_UNET = {
    "ulysses 2": "replicas 2", "ulysses 3": "replicas 3", "cfg 2 x ulysses 2": "cfg 2 x replicas 2", "ring 2": "cfg 2",
}  # fmt: skip


def test_every_family_is_here():
    import comfy.families

    known = {tiny.family.name for tiny in ALL.values()}
    assert {family.name for family in comfy.families.records()} - known <= {"svd", "pebble"}


@pytest.mark.parametrize("name", RUNS)
def test_parallel_equals_serial(name):
    (world, runs), serial = RUNS[name], family_cases.serial()
    wanted = {(family, run.case): serial[family, run.case] for run in runs for family in run.families}
    for found in run_ranks(world, family_cases.compare, runs, wanted):
        assert not {key: value for key, value in found.items() if not value[2] < TOLERANCE}
        assert len(found) == sum(len(run.families) for run in runs)
        for (run, family), (plan, layout, _) in found.items():
            expected = AS_UNET.get(run.plan, run.plan) if family in UNETS else run.plan
            assert (plan, layout) == (expected, run.layout), (family, run)


def test_residuals_of_controlnets_on_shards():
    for found in run_ranks(2, family_cases.with_residuals):
        assert all(deviation < TOLERANCE for deviation, _ in found.values()), found
        taking = {family for family, (_, change) in found.items() if change > 1e-3}
        assert {"flux", "sd3", "sd35_medium", "hunyuan_dit", "chroma", "hunyuan_video", "qwen_image"} <= taking
