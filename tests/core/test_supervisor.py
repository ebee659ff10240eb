"""When ranks that end again and again end the job."""

from __future__ import annotations

import pytest

from comfy.taco_dit.core.control_plane import HEALTHY
from comfy.taco_dit.core.supervisor import MAX_REPLACEMENTS, GivingUp, Supervisor


@pytest.fixture
def supervisor(monkeypatch):
    made = Supervisor([], 2, {})
    values = {}
    monkeypatch.setattr(made._hub, "peek", lambda key: values.get(key, b""))
    return made, values


def ends(supervisor, count):
    for _ in range(count):
        supervisor._count_end(1, -9)


def test_a_series_without_a_success_ends_the_job(supervisor):
    made, _ = supervisor
    ends(made, MAX_REPLACEMENTS)
    with pytest.raises(GivingUp, match="4th end of a rank in a row"):
        ends(made, 1)


def test_a_prompt_that_succeeds_begins_a_new_series(supervisor):
    made, values = supervisor
    for number in range(5):
        values[HEALTHY] = str(number).encode()
        ends(made, MAX_REPLACEMENTS)


def test_a_new_start_of_all_ranks_is_no_success(supervisor):
    """The control plane is empty then, also of the number of the last prompt that succeeded."""
    made, values = supervisor
    values[HEALTHY] = b"7"
    ends(made, 1)
    values.clear()
    ends(made, MAX_REPLACEMENTS - 1)
    with pytest.raises(GivingUp):
        ends(made, 1)


def test_a_quiet_time_begins_a_new_series(supervisor, monkeypatch):
    made, _ = supervisor
    ends(made, MAX_REPLACEMENTS)
    made._last_end -= 121
    ends(made, MAX_REPLACEMENTS)
