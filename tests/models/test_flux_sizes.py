"""Flux: what a file's shapes do not tell."""

from __future__ import annotations

import pytest

from comfy.families.flux import rotary_axes


@pytest.mark.parametrize("head,axes", [(128, [16, 56, 56]), (24, [4, 10, 10]), (64, [8, 28, 28]), (16, [4, 6, 6])])
def test_rotary_axes_follow_the_usual_proportion(head: int, axes: list[int]) -> None:
    assert rotary_axes(head) == axes


def test_rotary_axes_of_impossible_head_size() -> None:
    with pytest.raises(ValueError, match="head size of 5"):
        rotary_axes(5)
