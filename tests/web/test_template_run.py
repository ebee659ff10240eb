"""Templates run on stand-ins, as `python -m tools.template_coverage --run` runs them."""

from __future__ import annotations

from tools import template_coverage

from .test_page import pytestmark  # noqa: F401 (the mark applies to this module too)

# a plain one; one whose sub-graph has switches, primitives and nodes that are off
NAMES = ["flux_schnell_full_text_to_image", "image_qwen_image"]


def test_templates_run_on_one_rank_and_on_two(capsys) -> None:
    assert template_coverage.main(["--run", *NAMES]) == 0
    out = capsys.readouterr().out
    assert f"{len(NAMES)} of {len(NAMES)} templates ran to their results" in out
    assert "2 templates on 1 and 2 rank(s); at most width 96, height 64" in out


def test_a_name_that_does_not_exist(capsys) -> None:
    assert template_coverage.main(["--run", "nonsense"]) == 2
    assert "there is no template nonsense" in capsys.readouterr().err
