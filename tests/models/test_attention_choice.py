"""Which attention kernel is used: kept measurements, names, and what is said of a kernel that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from comfy.ldm.modules import attention_choice, kernels
from comfy.ldm.modules.attention_choice import Kernel, choose, measured

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_a_measurement_is_kept_until_something_changes(tmp_path: Path) -> None:
    path, asked = str(tmp_path / "taco_dit" / "attention.json"), []

    def measure(name: str, size: int) -> float | None:
        asked.append((name, size))
        return None if name == "broken" else len(name) * size / 100

    first = measured(["cudnn", "sdpa", "broken"], ["GPU", "2.11"], path, measure)
    assert first == {64: {"cudnn": 3.2, "sdpa": 2.56}, 128: {"cudnn": 6.4, "sdpa": 5.12}} and len(asked) == 6
    assert measured(["cudnn", "sdpa", "broken"], ["GPU", "2.11"], path, measure) == first and len(asked) == 6
    measured(["cudnn", "sdpa"], ["GPU", "2.12"], path, measure)
    assert len(asked) == 10
    Path(path).write_text("[]")
    measured(["cudnn", "sdpa"], ["GPU", "2.12"], path, measure)
    assert len(asked) == 14


def test_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / "attention.json")
    assert choose(CPU, "auto", path) == ({}, "")
    with pytest.raises(ValueError, match="'sage', which needs an NVIDIA GPU"):
        choose(CPU, "sage", path)
    installed = {name: Kernel(name, lambda q, k, v: q, name == "sage") for name in ("sdpa", "cudnn", "flash", "sage")}
    monkeypatch.setattr(attention_choice, "available", lambda: dict(installed))
    monkeypatch.setattr(attention_choice, "identity", lambda device, names: names)
    times = {("flash", 64): 1.0, ("cudnn", 128): 1.0}
    monkeypatch.setattr(attention_choice, "_milliseconds", lambda kernel, device, size: times.get((kernel.name, size), 2.0))
    chosen, why = choose(GPU, "auto", path)
    assert {size: kernel.name for size, kernel in chosen.items()} == {64: "flash", 128: "cudnn"}
    assert "head size 128: cudnn 1.00 ms, sdpa 2.00 ms" in why and "sage" not in why, "what is lossy is not chosen"
    assert {kernel.name for kernel in choose(GPU, "pytorch", path)[0].values()} <= {"sdpa", "cudnn"}
    assert {kernel.name for kernel in choose(GPU, "sage", path)[0].values()} == {"sage"}
    del installed["sage"]
    with pytest.raises(ValueError, match="sageattention must be installed; allowed here: auto, sdpa, cudnn, flash"):
        choose(GPU, "sage", path)


def test_the_chosen_kernel_is_used_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 5, 48)
    kernels.use_kernels({64: Kernel("other", lambda q, k, v: v * 2, True)}, "as configured")
    try:
        monkeypatch.setattr(kernels, "_fits_half_kernels", lambda q, k, v, mask: mask is None)
        monkeypatch.setattr(kernels, "_prefers_cudnn", lambda index: False)
        assert torch.equal(kernels.run(q, q[:, :2], q[:, :2])[0], q[:, :2].repeat_interleave(2, 1) * 2)
        want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.testing.assert_close(kernels.run(q, q, q, torch.ones(1, 1, 5, 5, dtype=torch.bool))[0], want)
        learning = q.clone().requires_grad_()
        torch.testing.assert_close(kernels.run(learning, learning, learning)[0], want)
        wide = torch.randn(1, 2, 5, 96)
        assert not torch.equal(kernels.run(wide, wide, wide)[0], wide * 2)
        assert kernels.lossy_kernel() == "other"
        said = kernels.describe_backend(GPU)
        assert said == "attention: other where it fits (lossy), else torch's choice (as configured)"
    finally:
        kernels.use_kernels({})
    assert kernels.lossy_kernel() is None
