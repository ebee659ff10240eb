"""A short form of the chaos tool (docs/reliability.md) with fixed actions, and the rules by which it judges."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time

import numpy as np
import pytest
from PIL import Image

from tests.chaos.__main__ import main
from tests.chaos.actions import Actions
from tests.chaos.ledger import REMOVED, Ledger, judge, repeated
from tests.chaos.measure import Measurements, Sample, growth
from tests.chaos.pictures import Pictures
from tests.chaos.prompts import ERROR, INTERRUPTED, SUCCESS, Made, Prompts
from tests.chaos.report import Report
from tests.chaos.run import Run, Settings
from tests.chaos.soak import lines

MADE = Made("plain", {})


def history(outcome: str, start: float, end: float, text: str = "") -> dict[str, object]:
    """Status of an entry of the history."""
    kind = {SUCCESS: "execution_success", ERROR: "execution_error", INTERRUPTED: "execution_interrupted"}[outcome]
    return {
        "status_str": "success" if outcome == SUCCESS else "error",
        "messages": [
            ["execution_start", {"timestamp": start * 1000}],
            [kind, {"timestamp": end * 1000, "exception_message": text}],
        ],
    }


class TestRules:
    def test_an_error_without_a_fault_is_wrong(self):
        ledger, now = Ledger(), time.time()
        entry = ledger.new(MADE, "a")
        assert judge(ledger, entry, history(SUCCESS, now, now + 1)) == (SUCCESS, None)
        outcome, wrong = judge(ledger, entry, history(ERROR, now, now + 1, "no idea"))
        assert outcome == ERROR and "no idea" in wrong

    def test_an_error_during_a_fault_is_none_and_one_long_after_it_is(self):
        ledger, now = Ledger(), time.time()
        entry = ledger.new(MADE, "a")
        fault = ledger.fault("kill of rank 1", ends_prompts=True)
        fault.end = fault.start
        assert judge(ledger, entry, history(ERROR, now - 3, now + 3))[1] is None
        assert judge(ledger, entry, history(ERROR, now + 5, now + 6))[1] is not None

    def test_interrupted_only_when_cancelled(self):
        ledger, now = Ledger(), time.time()
        entry = ledger.new(MADE, "a")
        assert judge(ledger, entry, history(INTERRUPTED, now, now + 1))[1] is not None
        entry.cancelled = now
        assert judge(ledger, entry, history(INTERRUPTED, now, now + 1))[1] is None

    def test_a_deleted_prompt_that_runs_is_wrong(self):
        ledger, now = Ledger(), time.time()
        entry = ledger.new(MADE, "a")
        entry.removed, entry.surely_removed = now, True
        assert "taken out" in judge(ledger, entry, history(SUCCESS, now + 3, now + 4))[1]

    def test_the_error_on_purpose_must_be_that_error(self):
        ledger, now = Ledger(), time.time()
        entry = ledger.new(Made("raises", {}, ends=frozenset({ERROR}), text="on purpose"), "a")
        assert judge(ledger, entry, history(ERROR, now, now + 1, "on purpose, inside"))[1] is None
        assert judge(ledger, entry, history(ERROR, now, now + 1, "another"))[1] is not None
        assert judge(ledger, entry, history(SUCCESS, now, now + 1))[1] is not None

    def test_two_ends_are_wrong_unless_rank_0_ended_between_them(self):
        ledger, now = Ledger(), time.time()
        entry = ledger.new(MADE, "a")
        entry.outcome = SUCCESS
        entry.messages = [(now - 5, SUCCESS), (now + 5, SUCCESS)]
        assert "2 times" in repeated(ledger, entry)
        fault = ledger.fault("kill of rank 0", ends_prompts=True, forgets=True)
        fault.end = fault.start
        assert repeated(ledger, entry) is None

    def test_what_waited_when_rank_0_ended_must_run(self):
        ledger, now = Ledger(), time.time()
        entry = ledger.new(MADE, "a")
        never_ran = {"status_str": "error", "messages": []}
        fault = ledger.fault("kill of rank 0", ends_prompts=True, forgets=True)
        assert judge(ledger, entry, never_ran) == (ERROR, None)  # it may have been the one that ran
        fault.waiting = frozenset({entry.id})
        assert "never ran" in judge(ledger, entry, never_ran)[1]
        assert judge(ledger, entry, history(SUCCESS, now, now + 1)) == (SUCCESS, None)

    def test_a_removed_prompt_must_not_end(self):
        ledger = Ledger()
        entry = ledger.new(MADE, "a")
        entry.outcome, entry.messages = REMOVED, [(time.time(), SUCCESS)]
        assert "taken out" in repeated(ledger, entry)


class TestPictures:
    @staticmethod
    def saved(folder, ledger, pixels, name=None):
        """A prompt and the outputs of its history, with a picture in the folder."""
        entry = ledger.new(Made("plain", {}, "key"), "a")
        name = name or f"{entry.prefix}_00001_.png"
        Image.fromarray(pixels).save(folder / name)
        return entry, {"save": {"images": [{"filename": name, "subfolder": "", "type": "output"}]}}

    def test_another_picture_and_a_broken_and_a_foreign_file_are_wrong(self, tmp_path):
        pictures, ledger = Pictures(str(tmp_path), tolerance=1), Ledger()
        pixels = np.full((8, 8, 3), 100, np.uint8)
        assert pictures.check(*self.saved(tmp_path, ledger, pixels)) == []
        assert pictures.check(*self.saved(tmp_path, ledger, pixels + np.uint8(1))) == []
        assert "differs by 2/255" in pictures.check(*self.saved(tmp_path, ledger, pixels + np.uint8(2)))[0]
        assert "shape" in pictures.check(*self.saved(tmp_path, ledger, pixels[:4]))[0]
        assert "another prompt" in pictures.check(*self.saved(tmp_path, ledger, pixels, "other_00001_.png"))[0]
        entry, outputs = self.saved(tmp_path, ledger, pixels)
        (tmp_path / f"{entry.prefix}_00001_.png").write_bytes(b"")
        assert "cannot be read" in pictures.check(entry, outputs)[0]
        assert pictures.check(entry, {}) == ["succeeded without a picture"]
        assert pictures.compared == 3 and pictures.furthest == 2
        pictures.delete(entry)
        assert pictures.of(entry) == []


def test_growth_ignores_single_peaks():
    flat = [(float(t), 100.0 + (50 if t == 7 else 0)) for t in range(20)]
    assert growth(flat) == pytest.approx(0, abs=1e-6)
    assert growth([(float(t), 100 + t / 2) for t in range(21)]) == pytest.approx(10)
    assert growth(flat[:3]) is None


def test_growth_is_told_by_process_and_by_age():
    class NoRun:
        pass

    measurements = Measurements(NoRun())
    for minute in range(120):
        at = minute * 60.0
        size = int(2**30 * (1 + 0.0005 * max(0, minute - 60)))
        measurements.samples.append(Sample(at, "supervisor", 1, at + 5, size, size, 20, 3))
        # a rank that is replaced every ten minutes, by one that is a tenth bigger in the last quarter
        size = 2**30 if minute < 90 else int(1.1 * 2**30)
        measurements.samples.append(Sample(at, "rank 1", 100 + minute // 10, at % 600, size, size, 20, 3))
        measurements.keys.append((at, 40))
    summary = measurements.summary(7200.0)
    supervisor = next(row for row in summary["same_process"] if row["process"] == "supervisor")
    assert supervisor["minutes"] == 59 and supervisor["rss_growth_percent"] == pytest.approx(2.95, abs=0.01)
    assert supervisor["files_growth_percent"] == 0
    by_age = {row["age_s"]: row["rss_growth_percent"] for row in summary["same_age"]}
    assert by_age["120-300"] == pytest.approx(10) and by_age["300-900"] == pytest.approx(10)
    assert summary["store_keys"]["growth_percent_second_half"] == 0
    text = lines({"actions": 1, "pictures_compared": 2, "furthest_picture": 0, "slowest_http_answer_s": 0.1,
                  "faults": {"kill": {"times": 1, "right_picture_s": None, "http_away_s": None}}, **summary})  # fmt: skip
    assert any("supervisor" in line and "2.95" in line for line in text)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--ranks", "1"], "use 2 or more"),
        (["--models", "here"], "--models and --workflow belong together"),
        (["kills", "--models", "docs", "--workflow", "demo/nothing.json"], "nothing.json"),
        (["kills", "--phases", "asleep"], "use some of idle, loading"),
        (["clients", "--clients", "5", "--prompts", "2"], "must be at least --clients 5"),
    ],
)
def test_wrong_flags_are_refused_before_anything_starts(flags, reason, capsys):
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == 2 and reason in capsys.readouterr().err


def test_the_seed_gives_the_actions():
    class NoRun:
        prompts = Prompts()

    def names(seed, without=frozenset()):
        actions = Actions(NoRun(), seed, without)
        return [actions.draw(number)[0] for number in range(60)]

    assert names(5) == names(5) != names(6)
    assert "kill" in names(5) and "kill" not in names(5, frozenset({"kills"}))
    with pytest.raises(ValueError, match="--without does not know 'nothing'; it knows prompts"):
        names(5, frozenset({"nothing"}))


def test_prompts_of_a_key_are_equal_but_for_labels():
    prompts = Prompts()
    by_key: dict[str, str] = {}
    for number in range(200):
        made = prompts.random(random.Random(number))
        content = {k: v for k, v in made.prompt.items() if not k.startswith("renew")}
        if made.key is not None:
            assert by_key.setdefault(made.key, json.dumps(content)) == json.dumps(content), made.key
    assert len(by_key) > 20


async def fixed_actions(settings: Settings, report: Report) -> Run:
    """Each kind of action that needs no long wait, then a kill of the follower."""
    async with Run(settings, report) as run:
        run.add_page()
        actions = Actions(run, 3, frozenset())
        rng = random.Random(3)
        for action in (
            actions.prompt, actions.prompt, actions.cancel_running, actions.delete_queued, actions.bad_upload,
            actions.deaf_page,
            actions.vanishing_page, actions.replace_lora, actions.stop_follower, actions.full_disk, actions.free,
            actions.delete_history,
        ):  # fmt: skip
            await action(rng)
        fault = await run.kill(1)
        await run.right_picture(fault, 60)
        await run.finish(60)
        actions.close()
        return run


@pytest.mark.timeout(150)
def test_fixed_actions(tmp_path):
    report = Report(str(tmp_path))
    run = asyncio.run(fixed_actions(Settings(2, str(tmp_path), small_disk=True), report))
    assert report.findings == [], run.program.tail()
    assert run.pictures.compared >= 3 and run.pictures.furthest <= 1
    assert all(entry.outcome for entry in run.ledger.entries.values())
    assert not os.path.exists(run.base)
    assert report.finish({}, []) == 0
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {"post", "ended", "recovered"} <= {record["what"] for record in records}
