"""Ranks capture and replay together, whatever happens to the graphs of one of them."""

from __future__ import annotations

from typing import Any

import torch

from comfy.taco_dit.core.network_runner import NetworkRunner


class _Model:
    """What the runner reads of a model."""

    def __init__(self, version: int = 1, lowvram: bool = False) -> None:
        self.diffusion_model = torch.nn.Identity()
        self.weights_version = version
        self.model_lowvram = lowvram


def _two_ranks() -> tuple[NetworkRunner, Any, list[list[object]], list[object]]:
    """A runner, a gather that sees two ranks' answers, what was gathered, and what rank 1 answers."""
    said: list[list[object]] = []
    other: list[object] = []

    def gather(topic: str, value: object) -> list[object]:
        said.append([topic, value])
        return [value, *other]

    return NetworkRunner(True, True), gather, said, other


def test_first_call_of_a_run_compares_and_later_ones_do_not() -> None:
    runner, gather, said, other = _two_ranks()
    other[:] = [(True, False)]
    model = _Model()
    runner.begin_run()
    call = (id(model.diffusion_model), None, ())
    assert runner._agreed(call, model, gather)
    runner._graphs[(1, *call)] = object()  # captured
    assert runner._agreed(call, model, gather)
    assert len(said) == 1


def test_a_missing_graph_elsewhere_makes_this_rank_capture_anew() -> None:
    runner, gather, _, other = _two_ranks()
    model = _Model()
    call = (id(model.diffusion_model), None, ())
    runner._graphs[(1, *call)] = object()
    other[:] = [(True, False)]
    runner.begin_run()
    assert runner._agreed(call, model, gather)
    assert not runner._graphs


def test_partly_loaded_weights_on_one_rank_keep_all_from_capturing() -> None:
    runner, gather, _, other = _two_ranks()
    model = _Model()
    call = (id(model.diffusion_model), None, ())
    other[:] = [(False, False)]
    runner.begin_run()
    assert not runner._agreed(call, model, gather)
    assert not runner._agreed(call, model, gather)


def test_weights_that_move_during_a_run_make_it_plain() -> None:
    runner, gather, _, other = _two_ranks()
    model = _Model()
    call = (id(model.diffusion_model), None, ())
    other[:] = [(True, True)]
    runner._graphs[(1, *call)] = object()
    runner.begin_run()
    assert runner._agreed(call, model, gather)
    model.weights_version = 2
    assert not runner._agreed(call, model, gather)


def test_memory_is_given_up_between_runs_only() -> None:
    runner = NetworkRunner(True, True)
    runner._graphs[(1, 2, None, ())] = object()
    runner.begin_run()
    runner.release_memory()
    assert runner._graphs
    runner.end_run()
    runner.release_memory()
    assert not runner._graphs
