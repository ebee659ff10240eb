"""A cancelled prompt ends inside a long call of a network, an autoencoder or an attention, not only after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import comfy.model_management as management
from comfy.ldm.modules import attention, kernels
from comfy.ldm.pace import AHEAD, Pace, is_long
from comfy.sd import VAE
from tests import tiny_models

Interrupted = management.InterruptProcessingException


@pytest.fixture(autouse=True)
def nothing_cancelled() -> Iterator[None]:
    management.interrupt_current_processing(False)
    yield
    management.interrupt_current_processing(False)
    management.set_interrupt_check(None)


def cancels_after(monkeypatch: pytest.MonkeyPatch, kind: type[Any], calls: int) -> list[int]:
    """Let a prompt be cancelled during the given call of `kind.forward`; the list counts the calls."""
    count: list[int] = []
    forward = kind.forward

    def counting(self: Any, *arguments: Any, **more: Any) -> Any:
        count.append(1)
        if len(count) == calls:
            management.interrupt_current_processing()
        return forward(self, *arguments, **more)

    monkeypatch.setattr(kind, "forward", counting)
    return count


@pytest.fixture(scope="module")
def vae() -> VAE:
    return VAE(sd=tiny_models.random_weights(tiny_models.vae_shapes(), 4))


def actions(vae: VAE) -> dict[str, Callable[[], torch.Tensor]]:
    latent, picture = torch.randn(1, 16, 8, 8), torch.rand(1, 64, 64, 3)
    return {
        "decode": lambda: vae.decode(latent),
        "encode": lambda: vae.encode(picture),
        "decode tiled": lambda: vae.decode_tiled(latent, tile_x=8, tile_y=8, overlap=2),
        "encode tiled": lambda: vae.encode_tiled(picture, tile_x=64, tile_y=64, overlap=16),
    }


@pytest.mark.parametrize("name", ["decode", "encode", "decode tiled", "encode tiled"])
def test_an_autoencoder_ends_after_the_block_in_which_it_was_cancelled(
    monkeypatch: pytest.MonkeyPatch, vae: VAE, name: str
) -> None:
    from comfy.ldm.modules.diffusionmodules.model import ResnetBlock

    blocks = cancels_after(monkeypatch, ResnetBlock, 3)
    with pytest.raises(Interrupted):
        actions(vae)[name]()
    assert len(blocks) == 3
    actions(vae)[name]()  # and nothing of it is left


def test_attention_on_the_cpu_in_parts_is_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 700, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    masks = [None, torch.randn(2, 1, 700, 300), torch.rand(1, 1, 1, 300) > 0.3]
    whole = [kernels.run(q, k, v, mask, lse) for mask in masks for lse in (False, True)]
    monkeypatch.setattr(kernels, "LONGEST_CPU_CALL", 1)
    assert kernels._rows_at_once(q, k) == 256
    parts = [kernels.run(q, k, v, mask, lse) for mask in masks for lse in (False, True)]
    for (out, sums), (expected, expected_sums) in zip(parts, whole):
        torch.testing.assert_close(out, expected)
        assert (sums is None) == (expected_sums is None)
        if sums is not None:
            torch.testing.assert_close(sums, expected_sums)


def test_attention_of_usual_sizes_is_one_call() -> None:
    q = torch.empty(1, 24, 4096 + 512, 128, device="meta")
    assert kernels._rows_at_once(q, q) > 256
    small = torch.empty(1, 24, 1500, 128, device="meta")
    assert kernels._rows_at_once(small, small) >= 1500


@pytest.mark.parametrize("function", [attention.attention_pytorch, attention.attention_split])
def test_a_long_attention_ends_when_it_is_cancelled(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 3:
            raise Interrupted

    management.set_interrupt_check(check)
    monkeypatch.setattr(kernels, "LONGEST_CPU_CALL", 1)
    x = torch.zeros(1, 2000, 8)
    keys = x if function is attention.attention_pytorch else torch.zeros(1, 200_000, 8)
    with pytest.raises(Interrupted):
        function(x, keys, keys, 1)
    assert len(checks) == 3


class Event:
    """Stands for a CUDA event."""

    log: list[tuple[str, int]] = []
    made = 0

    def __init__(self) -> None:
        Event.made += 1
        self.number = Event.made

    def record(self, stream: Any) -> None:
        Event.log.append(("issued", self.number))

    def synchronize(self) -> None:
        Event.log.append(("waited for", self.number))


class OnGpu:
    is_cuda, device = True, torch.device("cuda", 0)


def paced(monkeypatch: pytest.MonkeyPatch, long: bool, capturing: bool = False) -> list[tuple[str, int]]:
    """What the host does in a call of five blocks on a GPU."""
    Event.log, Event.made = [], 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    pace = Pace(long)
    for _ in range(5):
        pace.step(OnGpu())  # type: ignore[arg-type]
    return Event.log


def test_the_host_stays_a_few_blocks_ahead_in_long_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    log = paced(monkeypatch, True)
    for at, (what, number) in enumerate(log):
        if what == "waited for":
            assert max(n for kind, n in log[:at] if kind == "issued") == number + AHEAD
    assert [n for kind, n in log if kind == "waited for"] == [1, 2, 3]
    assert paced(monkeypatch, False) == []


def test_nothing_is_asked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    management.interrupt_current_processing()
    assert paced(monkeypatch, True, capturing=True) == []
    assert management.processing_interrupted()


def test_long_calls_are_those_of_very_large_pictures() -> None:
    tokens = {side: (side // 16) ** 2 for side in (1024, 2048, 4096, 16384)}
    assert [is_long(1, count, count) for count in tokens.values()] == [False, False, True, True]
    assert not is_long(1, tokens[4096] // 8, tokens[4096])
    assert is_long(1, tokens[16384] // 8, tokens[16384])
    assert is_long(2, tokens[4096] // 2, tokens[4096])
