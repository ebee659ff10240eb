"""Which process is each rank's, and which of them take part in a prompt."""

from __future__ import annotations

from comfy.taco_dit.core.members import Members


def joined(rank: int, incarnation: int = 0) -> dict:
    return {"rank": rank, "incarnation": incarnation, "info": {"rank": rank, "device": "cpu"}}


def died(rank: int, incarnation: int = 0) -> dict:
    return {"rank": rank, "incarnation": incarnation, "how": "process ended by signal 9"}


def test_a_rank_that_is_replaced_while_a_prompt_runs_stays_lost_for_it() -> None:
    members = Members(0, 3)
    for rank in range(3):
        members.joined(joined(rank))
    members.begin(dict(members.incarnations))
    assert members.lost_ranks() == []
    assert members.died(died(2))
    assert members.lost_ranks() == [2] and members.missing() == [2]
    members.joined(joined(2, 1))
    assert members.lost_ranks() == [2], "it takes no part in the prompt that runs"
    assert members.missing() == [] and members.followers() == [1, 2]
    assert members.report(2)["detail"] == "process ended by signal 9"
    members.begin(dict(members.incarnations))
    assert members.lost_ranks() == []


def test_one_that_is_replaced_between_announcement_and_begin_is_lost() -> None:
    members = Members(1, 3)
    announced = dict(members.incarnations)
    members.died(died(2))
    members.joined(joined(2, 1))
    members.begin(announced)
    assert members.lost_ranks() == [2]


def test_a_replacement_does_not_know_who_was_replaced_before_it() -> None:
    members = Members(2, 3)  # itself the second process of rank 2
    members.begin({0: 0, 1: 4, 2: 1})
    assert members.lost_ranks() == []
    assert not members.died(died(1, 3)), "an older process of rank 1"
    assert members.died(died(1, 4))
    assert members.lost_ranks() == [1]
