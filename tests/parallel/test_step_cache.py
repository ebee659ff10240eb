"""The step cache: when it reuses, that ranks decide alike, and that what it must not reuse is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from comfy.ldm import dit
from comfy.taco_dit.core.distributed_manager import RankInfo, TACODiTDistributedManager
from comfy.taco_dit.fast.captured_calls import Recording
from comfy.taco_dit.fast.step_cache import CacheSettings, Slot
from comfy_execution.lockstep import Lockstep

from .cache_cases import SAMPLERS, SIGMAS, Denoiser, deviation, engine, sampled
from .engine_cases import Model
from .ranks import run_ranks
from .tiny import inputs, tiny_flux

MANAGER = TACODiTDistributedManager(RankInfo(), torch.device("cpu"))


def serial(**cache: Any) -> Any:
    """An engine of one rank."""
    return engine(MANAGER, Lockstep(), False, **cache)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_decide_alike_and_as_one_rank_does(world: int) -> None:
    answers = run_ranks(world, sampled)
    for name in SAMPLERS:
        for answer in answers:
            off, many, one, lossy = answer[name]
            assert many == one == answers[0][name][1], name
            assert off < 1e-4 and (lossy > 1e-3) == any(one)
        assert answers[0][name][1][0] is False and answers[0][name][1][-1] is False
    assert all(any(answers[0][name][1]) for name in ("euler", "dpm_2", "uni_pc"))
    plan, _, off = answers[0]["guided"]
    assert ("cfg" in plan) == (world == 2) and off < 1.0 and any(answers[0]["guided"][1])
    assert all(answer["guided"][2] == off for answer in answers), "all ranks have the same picture"
    assert all(answer["zero"] == (True, [False] * len(answer["zero"][1])) for answer in answers)
    assert answers[0]["interval"] == [False, False, True, True] + [False, True, True] * 3 + [False]


def test_a_run_reuses_nothing_of_another() -> None:
    """So a LoRA, other prompts and other seeds are seen at once."""
    made, model = serial(cache_threshold=0.7, cache_warm_up_steps=2), Model()
    first = Denoiser(made, model, 1).run("euler")
    steps = list(made.step_cache.steps)
    assert torch.equal(Denoiser(made, model, 1).run("euler"), first) and made.step_cache.steps == steps
    weight = model.diffusion_model.single_blocks[1].linear1.weight
    weight.mul_(1.5)
    fresh = serial(cache_threshold=0.7, cache_warm_up_steps=2)
    assert torch.equal(Denoiser(made, model, 1).run("euler"), Denoiser(fresh, model, 1).run("euler"))


def test_networks_and_sizes_are_kept_apart() -> None:
    made = serial(cache_mode="interval", cache_interval=2, cache_warm_up_steps=1)
    other = Model()
    other.diffusion_model = tiny_flux(seed=7)
    kinds = [Denoiser(made, Model(), 1), Denoiser(made, other, 1), Denoiser(made, other, 1, height=12)]
    alone = []
    for kind in kinds:
        made.begin_run()
        alone.append([kind(torch.ones(1, 16, kind.height, 13) * (1 - s), s[None]) for s in SIGMAS[:5]])
    made.begin_run()
    for i, sigma in enumerate(SIGMAS[:5]):
        for kind, outs in zip(kinds, alone, strict=True):
            out = kind(torch.ones(1, 16, kind.height, 13) * (1 - sigma), sigma[None])
            torch.testing.assert_close(out, outs[i], rtol=0, atol=0)
    assert made.step_cache.steps == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3


def calls(slot: Slot, *sigmas: float, tag: Any = "prompt", last: float = 0.0) -> list[bool]:
    """What a slot decides at these sigmas, of a state that stays the same."""
    network, found = tiny_flux(), []
    for sigma in sigmas:
        slot.begin(tag, sigma, sigma <= last)
        call = dit.DenoiserCall(cache=slot)
        network(**inputs(6, 6, 5), transformer_options=call.within({}))
        found.append(slot.reused)
    return found


@pytest.mark.parametrize("mode", ["first_block", "interval"])
def test_samplers_that_go_back(mode: str) -> None:
    network = tiny_flux()
    slot = Slot(CacheSettings(mode, 0.1, 100, 2), network)
    assert calls(slot, 9, 8, 7, 6) == [False, False, True, True]
    assert calls(slot, 8) == [False], "sigma grew: what was kept is dropped"
    assert calls(slot, 7, 6) == [False, True]
    assert calls(slot, 6) == [False], "the same sigma again"
    assert calls(slot, 5) == [mode == "first_block"], "windows at one sigma differ in their tokens"
    assert calls(slot, 4, tag="another prompt") == [False]
    assert calls(slot, 3, 2, 1, tag="another prompt", last=1.0) == [False, True, False], "the last step is computed"


def test_foreign_code_between_blocks_gets_all_blocks() -> None:
    network = tiny_flux()
    slot = Slot(CacheSettings("interval", 0.0, 100, 1), network)
    seen = []
    options = {"patches": {"double_block": [lambda args: seen.append(args["block_index"]) or args]}}
    for sigma in (3.0, 2.0, 1.0):
        slot.begin("prompt", sigma, False)
        network(**inputs(6, 6, 5), transformer_options=dit.DenoiserCall(cache=slot).within(options))
    assert seen == [0, 1] * 3 and slot.reused is None


def test_blocks_that_may_not_be_skipped_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    network, ran = tiny_flux(), []
    blocks = network.block_list()
    marked = tuple(dataclasses.replace(b, cacheable=b.name != "single_blocks.1") for b in blocks)
    monkeypatch.setattr(network, "block_list", lambda: marked)
    slot = Slot(CacheSettings("interval", 0.0, 100, 1), network)

    def note(block: Any, state: Any, run: Any) -> Any:
        ran.append(block.name)
        return run(state)

    for sigma in (2.0, 1.0):
        slot.begin("prompt", sigma, False)
        call = dit.DenoiserCall(cache=slot, around=(note,))
        out = network(**inputs(6, 6, 5), transformer_options=call.within({}))
    assert ran == [b.name for b in blocks] + ["double_blocks.0", "single_blocks.1"]
    torch.testing.assert_close(out, network(**inputs(6, 6, 5)))


def test_what_is_said_of_a_run() -> None:
    made = serial(cache_mode="interval", cache_interval=2, cache_warm_up_steps=2)
    Denoiser(made, Model(), 1).run("euler")
    assert made.last_run.computed == 8 and made.last_run.calls == 14
    said = "step cache (interval, one of 2 computed): 8 of 14 steps computed"
    assert made.last_run.lossy == [said] and said in made.summary() and made.status()["lossy"] == [said]
    made.step_cache.release_memory()
    assert not made.step_cache._slots


class _Graph:
    """Stands in for a CUDA graph: remembers what was done while it was open."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.done: list[str] = []

    def replay(self) -> None:
        self.log += self.done

    def reset(self) -> None:
        self.done = []


class _Emulated(Recording):
    """A recording whose graphs replay names."""

    def __init__(self) -> None:
        super().__init__(None)
        self.log: list[str] = []

    def _begin(self) -> None:
        self._open = _Graph(self.log)

    def _end(self, *error: Any) -> Any:
        graph, self._open = self._open, None
        return graph


def test_a_captured_call_forks_where_it_is_decided() -> None:
    made, choice = _Emulated(), [False]
    with made:
        made._open.done.append("first block")
        made.fork(lambda: choice[0], lambda: made._open.done.append("blocks"), lambda: made._open.done.append("kept"))
        made._open.done.append("head")
    made.replay()
    choice[0] = True
    made.replay()
    assert made.log == ["first block", "blocks", "head", "first block", "kept", "head"]
    made.reset()
    made.replay()
    assert len(made.log) == 6


def test_a_slot_records_both_ways() -> None:
    """While a call is captured, both ways write the tokens that the rest of the network reads."""
    network = tiny_flux()
    slot = Slot(CacheSettings("interval", 0.0, 100, 1), network)
    plain = network(**inputs(6, 6, 5))
    calls(slot, 3.0)

    class Recorder:
        """Runs one way at once, as replaying its graph would."""

        way = 0

        def fork(self, decide: Any, otherwise: Any, chosen: Any) -> None:
            (otherwise, chosen)[self.way]()

    for way in (0, 1):
        Recorder.way, slot.recorder = way, Recorder()
        slot.begin("prompt", 2.0, False)
        out = network(**inputs(6, 6, 5), transformer_options=dit.DenoiserCall(cache=slot).within({}))
        assert deviation(plain, out) < 1e-5
