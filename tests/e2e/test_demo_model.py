"""The demo model's pictures are what its prompts say, on one rank and on three; they tell when a strategy is broken."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from app import demo
from demo.evaluate import Case, Outcome, cases, evaluate, scores, through_server

from .server import Server

HERE = os.path.dirname(os.path.abspath(__file__))
DEMO_FILE = os.path.join(demo.MODELS, "checkpoints", demo.CHECKPOINT)
EACH = 4  # pictures of each kind; `python -m demo.evaluate` draws 300
STEPS, CFG = 12, 3.0
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not os.path.isfile(DEMO_FILE), reason=f"needs {DEMO_FILE}: python -m demo.train"),
]


def _prompts() -> list[Case]:
    """Held-out prompts with one object and with two."""
    every = cases(6 * EACH, seed=7)
    return [case for kind in ("single", "pair") for case in [c for c in every if c.spec.kind == kind][:EACH]]


def _drawn(base: str, ranks: int, todo: list[Case]) -> list[Outcome]:
    with Server(base, ranks) as server:
        outcomes = evaluate(through_server(f"http://127.0.0.1:{server.port}"), todo, STEPS, CFG)
        run = server.json("/taco_dit/status")["last_run"]
        assert run["world_size"] == ranks
        return outcomes


@pytest.fixture(scope="module")
def by_three(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return _drawn(str(tmp_path_factory.mktemp("three")), 3, _prompts())


def test_three_ranks_draw_what_is_asked(by_three: list[Outcome]) -> None:
    wrong = [(o.case.text, o.verdict.wrong) for o in by_three if not o.verdict.right]
    assert all(row["right"] >= 1 - 1 / EACH for row in scores(by_three).values()), wrong  # one of each may be wrong


def test_one_rank_draws_the_same_pictures(by_three: list[Outcome], tmp_path: os.PathLike[str]) -> None:
    alone = _drawn(str(tmp_path), 1, _prompts()[::2])
    assert [o.case for o in alone] == [o.case for o in by_three[::2]]
    for one, three in zip(alone, by_three[::2]):
        assert np.abs(one.picture - three.picture).max() <= 1.01 / 255, one.case.text


def test_a_broken_exchange_shows_in_the_pictures(tmp_path: os.PathLike[str]) -> None:
    shutil.copytree(os.path.join(HERE, "deaf_pack"), os.path.join(tmp_path, "custom_nodes", "deaf_pack"))
    outcomes = _drawn(str(tmp_path), 3, _prompts()[::2])
    assert sum(o.verdict.right for o in outcomes) < 0.5 * len(outcomes)
