"""Captured calls never replay what is no longer true, whatever changes between them.

Without a GPU a graph is emulated: "capturing" runs the network once and remembers its modules as they are, on the memory
they have; "replaying" runs those again on the argument buffers, as the kernels of a real graph would.
"""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import comfy.taco_dit.fast.captured_calls as captured_calls
from comfy import accounting
from comfy.model_patcher import ModelPatcher
from comfy.taco_dit.core.data_plane import DataPlane, NcclGroup
from comfy.taco_dit.fast.captured_calls import Captured, CapturedCalls
from comfy.taco_dit.fast.signature import flatten
from tests.parallel.tiny import inputs, tiny_flux

CPU = torch.device("cpu")


class _EmulatedGraph:
    def __init__(self, network: Any, arguments: dict[str, Any], options: Any) -> None:
        memo = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        frozen = copy.deepcopy(network, memo)
        self._run = lambda: frozen(**arguments, **options)
        self.output: Any = self._run()

    def replay(self) -> None:
        self.output.copy_(self._run())

    def reset(self) -> None:
        self._run = None  # type: ignore[assignment]


class _EmulatedCapture(Captured):
    def __init__(self, network: Any, arguments: dict[str, Any], options: Any, pool: Any, keep: Any) -> None:
        tensors: list[torch.Tensor] = []
        flatten(arguments, tensors)
        self.keep = keep
        self.buffers = [tensor.clone() for tensor in tensors]
        own = captured_calls.rebuild(arguments, list(self.buffers))
        self.graph = _EmulatedGraph(network, own, options)
        self.output = self.graph.output


class Calls:
    """A tiny Flux, called through `CapturedCalls` in runs; every call is compared with a plain one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gather: Any = lambda topic, value: [value]) -> None:
        monkeypatch.setattr(captured_calls, "Captured", _EmulatedCapture)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        self.calls = CapturedCalls(False, True, gather)
        self.calls.device_type = "cpu"
        self.model: Any = torch.nn.Module()
        self.model.diffusion_model = tiny_flux()
        self.patcher = ModelPatcher(self.model, CPU, CPU)
        self.patcher.weight_store.always_copy = True
        self.patcher.patch_model(CPU)

    def run(self, count: int = 3, height: int = 9, **more: Any) -> dict[str, int]:
        """A sampling run of `count` calls of different values; what was captured and replayed in it."""
        accounting.begin("test")
        self.calls.begin_run()
        with torch.inference_mode():
            for seed in range(count):
                arguments = {**inputs(height, 13, 11, seed=seed), **more}
                plain = self.model.diffusion_model(**arguments)
                fast = self.calls.bound(self.model, None)(arguments.pop("x"), arguments.pop("timestep"), **arguments)
                torch.testing.assert_close(fast, plain)
        self.calls.end_run()
        return {kind: accounting.current().counts.get(f"calls_{kind}", 0) for kind in ("plain", "captured", "replayed")}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Calls of one rank."""
    return Calls(monkeypatch)


def test_the_first_call_is_plain_the_second_captured_the_others_replayed(calls: Calls) -> None:
    assert calls.run() == {"plain": 1, "captured": 1, "replayed": 2}
    assert calls.run() == {"plain": 0, "captured": 0, "replayed": 3}
    assert calls.run(height=12) == {"plain": 1, "captured": 1, "replayed": 2}
    assert calls.run()["replayed"] == 3, "back to an earlier size"


def test_nested_inputs_are_copied_in(calls: Calls) -> None:
    first, second = torch.randn(1, 16, 6, 5), torch.randn(1, 16, 6, 5)
    calls.run(ref_latents=[first])
    assert calls.run(ref_latents=[second])["replayed"] == 3
    assert calls.run(ref_latents=[second, first])["captured"] == 1, "another structure is another call"


def test_a_replaced_block_list_is_not_replayed(calls: Calls) -> None:
    calls.run()
    calls.model.diffusion_model.double_blocks = calls.model.diffusion_model.double_blocks[:1]
    assert calls.run()["captured"] == 1


def test_a_replaced_forward_of_a_block_is_not_replayed(calls: Calls) -> None:
    calls.run()
    block = calls.model.diffusion_model.single_blocks[0]
    block.forward = lambda x, **arguments: x * 0.5
    calls.run()
    del block.forward
    calls.run()


def test_patches_written_in_place_are_seen_without_capturing_again(calls: Calls) -> None:
    calls.run()
    key = "diffusion_model.single_blocks.0.linear1.weight"
    shape = calls.model.state_dict()[key].shape
    patched = calls.patcher.clone()
    patched.add_patches({key: ("diff", (torch.randn(shape),))}, 0.1)
    patched.patch_model(CPU)
    assert calls.run() == {"plain": 0, "captured": 0, "replayed": 3}
    calls.patcher.patch_model(CPU)
    assert calls.run() == {"plain": 0, "captured": 0, "replayed": 3}


def test_weights_that_moved_are_captured_anew(calls: Calls) -> None:
    calls.run()
    calls.patcher.unpatch_model(CPU)
    calls.patcher.patch_model(CPU)
    assert calls.run() == {"plain": 1, "captured": 1, "replayed": 2}
    assert calls.calls.status()["captured_calls"] == 1, "what read the old memory is gone"


def test_what_cannot_be_seen_is_not_captured(calls: Calls) -> None:
    assert calls.run(something=object()) == {"plain": 3, "captured": 0, "replayed": 0}
    patch = {"patches": {"double_block": [lambda args: args]}}
    assert calls.run(transformer_options=patch) == {"plain": 3, "captured": 0, "replayed": 0}
    handle = calls.model.diffusion_model.final_layer.register_forward_hook(lambda *_: None)
    assert calls.run() == {"plain": 3, "captured": 0, "replayed": 0}
    handle.remove()
    assert calls.run()["captured"] == 1


def test_long_calls_are_not_captured(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is cancelled can end inside them."""
    import comfy.ldm.pace as pace

    rows, tokens = len(inputs(9, 13, 11)["x"]), 9 * 13 // 4
    monkeypatch.setattr(pace, "LONG_PAIRS", rows * tokens**2)
    assert calls.run(height=9) == {"plain": 3, "captured": 0, "replayed": 0}
    monkeypatch.setattr(pace, "LONG_PAIRS", rows * tokens**2 + 1)
    assert calls.run(height=9)["captured"] == 1


def test_partly_loaded_weights_are_not_captured(calls: Calls) -> None:
    calls.patcher.patch_model(CPU, lowvram_model_memory=1000)
    assert calls.run() == {"plain": 3, "captured": 0, "replayed": 0}


def test_memory_is_given_up_between_runs_only(calls: Calls) -> None:
    calls.run()
    calls.calls.begin_run()
    calls.calls.release_memory()
    assert calls.calls.status()["captured_calls"] == 1
    calls.calls.end_run()
    calls.calls.release_memory()
    assert calls.calls.status()["captured_calls"] == 0


def test_where_one_rank_gave_up_its_graphs_all_capture_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [(0, False)]
    calls = Calls(monkeypatch, lambda topic, value: [value, *others])
    calls.run()
    assert calls.run()["replayed"] == 3
    others[0] = (1, False)
    assert calls.run()["captured"] == 1
    assert calls.run()["replayed"] == 3, "and only once"


def test_where_one_rank_cannot_capture_none_does(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [(0, False)]
    calls = Calls(monkeypatch, lambda topic, value: [value, *others])
    calls.run()
    others[0] = (0, True)
    assert calls.run() == {"plain": 3, "captured": 0, "replayed": 0}
    assert calls.calls.status() == {"cuda_graph": False, "captured_calls": 0}


def test_a_capture_that_fails_leaves_the_right_picture(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(captured_calls, "Captured", fail)
    assert calls.run() == {"plain": 3, "captured": 0, "replayed": 0}
    assert calls.calls.status()["cuda_graph"] is False


class _Stuck:
    """A backend whose abort ends only when graphs are gone, as NCCL's does."""

    def __init__(self) -> None:
        self.kernels_free, self.graphs_gone = threading.Event(), threading.Event()

    def abort(self) -> None:
        self.kernels_free.set()
        self.graphs_gone.wait(30)


def _plane(backend: _Stuck) -> DataPlane:
    plane = DataPlane(SimpleNamespace(poke=lambda: None), 0, 2, CPU)
    plane._groups[("cuda", (0, 1))] = NcclGroup(backend, (0, 1), 0)
    return plane


def test_groups_end_while_their_graphs_are_destroyed() -> None:
    backend = _Stuck()
    plane = _plane(backend)

    def destroy() -> None:  # as a graph whose kernels wait for a peer: it can go only once the abort has begun
        assert backend.kernels_free.wait(5)
        backend.graphs_gone.set()

    plane.before_groups_end(destroy)
    assert plane.abort(deadline_s=5)
    assert plane.aborted


def test_an_abort_that_does_not_end_is_told() -> None:
    backend = _Stuck()
    assert not _plane(backend).abort(deadline_s=0.2)
    backend.graphs_gone.set()
