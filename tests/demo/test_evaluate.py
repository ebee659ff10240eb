"""Evaluation asks what training never saw, draws the same in this process and through servers, and counts right."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from demo.evaluate import Outcome, cases, evaluate, in_process, scores, sheet, through_server, workflow
from demo.judge import Verdict
from demo.render import render, to_arrays
from demo.scenes import place
from tests.e2e.server import Server
from tests.tiny_models import write_flux

CHECKPOINT = "tiny_flux_schnell.safetensors"


def test_cases():
    chosen = cases(60, seed=3)
    assert [sum(case.spec.kind == kind for case in chosen) for kind in ("single", "pair", "count", "triple")] == [
        20, 20, 10, 10,
    ]  # fmt: skip
    assert all(case.spec.held_out for case in chosen)
    assert chosen == cases(60, seed=3)
    assert chosen != cases(60, seed=4)
    assert len({case.text for case in chosen}) > 55


def test_the_truth_scores_fully_and_the_wrong_pictures_nothing():
    import random

    todo = cases(36)
    by_text = {case.text: case for case in todo}

    def truth(prompt):
        case = by_text[prompt["2"]["inputs"]["text"]]
        scene = place(case.spec, random.Random(case.seed), case.width, case.height)
        return render(to_arrays([scene]), case.width, case.height)[0].permute(1, 2, 0).numpy()

    table = scores(evaluate(truth, todo, 1, 1.0))
    assert list(table) == ["single", "pair", "count", "triple"]
    assert all(row["right"] == 1.0 and row["background"] == 1.0 for row in table.values())
    empty = scores(evaluate(lambda prompt: np.full((128, 128, 3), 0.9), todo, 1, 1.0))
    assert all(row["right"] == 0.0 for row in empty.values())


def test_scores_are_shares():
    case = next(case for case in cases(12) if case.spec.kind == "pair")
    right, wrong = Verdict(True, True, True, True, True), Verdict(True, False, True, False, True)
    outcomes = [Outcome(case, np.zeros((8, 8, 3)), verdict) for verdict in (right, right, wrong, right)]
    table = scores(outcomes)
    assert list(table) == ["pair"]
    assert (table["pair"]["pictures"], table["pair"]["right"], table["pair"]["size"]) == (4, 0.75, 0.75)
    assert table["pair"]["objects"] == 1.0


def test_the_sheet_marks_wrong_pictures(tmp_path):
    case = cases(12)[0]
    picture = np.ones((128, 128, 3), dtype=np.float32)
    verdicts = Verdict(True, True, True, True, True), Verdict(False, False, False, False, True)
    sheet([Outcome(case, picture, verdict) for verdict in verdicts], str(tmp_path / "sheet.png"), columns=2)
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    red = (page == (255, 0, 0)).all(-1)
    half = page.shape[1] // 2
    assert not red[:, :half].any() and red[:, half:].any()


@pytest.mark.timeout(180)
def test_the_same_picture_here_and_through_servers(tmp_path):
    write_flux(str(tmp_path / "models"))
    case = next(case for case in cases(24, seed=1) if (case.width, case.height) == (160, 112))
    prompt = workflow(case, steps=2, cfg=2.5, name=CHECKPOINT)
    here = in_process(os.path.join(tmp_path, "models", "checkpoints", CHECKPOINT))(prompt)
    assert here.shape == (112, 160, 3)
    with Server(str(tmp_path), ranks=2) as server:
        server.wait_ready()
        draw = through_server(f"http://127.0.0.1:{server.port}/")
        assert np.abs(draw(prompt) - here).max() <= 1.01 / 255
        with pytest.raises(RuntimeError, match="refuses the workflow.*not_there.safetensors"):
            draw(workflow(case, name="not_there.safetensors"))
