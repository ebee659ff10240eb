"""Any number of ranks gives the picture of one rank, to 1/255."""

from __future__ import annotations

import functools

import pytest

from tests.e2e.compare import furthest
from tests.e2e.server import Server
from tests.e2e.workflows import (
    DEV,
    SCHNELL,
    TEXT,
    controlled,
    custom_sampling,
    flux,
    picture_to_picture,
    sd3,
    with_areas,
)

LONG = TEXT + ", " + "very detailed " * 130
CASES = {
    "tall": flux(),
    "wide": flux(width=112, height=80, text="cat"),
    "guidance": flux(cfg=4.5, seed=2),
    "guidance, wide, long": flux(width=112, height=80, cfg=4.5, text=LONG, seed=3),
    "three at once": flux(batch=3, seed=4),
    "three at once with guidance": flux(batch=3, cfg=4.5, width=112, height=80, seed=5),
    "schnell": flux(SCHNELL, seed=6),
    "schnell with guidance": flux(SCHNELL, cfg=4.5, width=112, height=80, seed=7),
    "smallest": flux(DEV, width=16, height=16, text="", seed=8),
    "one column": flux(DEV, width=16, height=264, seed=9),
    "custom sampling": custom_sampling(seed=10, steps=3),
    "areas": with_areas(cfg=4.5, seed=12),
    "from a picture": picture_to_picture("start.png", seed=11),
}


@pytest.fixture(scope="module")
def expected(serve):
    """`expected(case)`: one rank's pictures."""

    @functools.cache
    def render(case):
        return serve(1).pictures(CASES[case])

    return render


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_same_picture(serve, expected, ranks, case):
    picture = serve(ranks).pictures(CASES[case])
    assert picture.std() > 5, "a flat picture proves nothing"
    assert furthest(picture, expected(case)) <= 1


def test_same_picture_of_sd3(serve):
    """Every other family is compared without a server (tests/parallel/test_families.py)."""
    picture = serve(2).pictures(sd3(width=88))
    assert picture.std() > 5
    assert furthest(picture, serve(1).pictures(sd3(width=88))) <= 1


def test_same_picture_with_control(serve):
    """ControlNets, an image encoder, a style model and a patch network, with one conditioning and with two."""
    for more in ({"width": 88}, {"cfg": 4.5, "batch": 3}):
        picture = serve(2).pictures(controlled(**more))
        assert picture.std() > 5
        assert furthest(picture, serve(1).pictures(controlled(**more))) <= 1
        assert furthest(picture, serve(2).pictures(flux(**more))) > 20


def test_pictures_tell_cases_apart(expected):
    """Otherwise the comparison above could not fail."""
    a, b = expected("tall"), expected("from a picture")
    assert furthest(a, b) > 20
    batch = expected("three at once")
    assert furthest(batch[0], batch[1]) > 20


def test_the_work_is_really_spread(serve):
    server = serve(4)
    server.pictures(flux(cfg=4.5, seed=123))
    last = server.json("/taco_dit/status")["last_run"]
    assert last["world_size"] == 4
    assert "cfg 2" in last["plan"] and "ulysses 2" in last["plan"]


def test_same_picture_on_a_ring(base, expected, tmp_path):
    config = tmp_path / "taco.yaml"
    config.write_text("parallel:\n  ring_degree: 2\n")
    server = Server(base, 4, ["--taco-config", str(config)])
    try:
        server.wait_ready()
        plans = []
        for case in ("tall", "guidance", "three at once", "areas"):
            assert furthest(server.pictures(CASES[case]), expected(case)) <= 1
            plans.append(server.json("/taco_dit/status")["last_run"]["plan"])
    finally:
        server.stop()
    assert plans == ["ulysses 2 x ring 2", "cfg 2 x ring 2", "ulysses 2 x ring 2", "cfg 2 x ring 2"]
