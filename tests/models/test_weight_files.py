"""Weight files that change under a running process: an error before their weights are used, never other weights."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import comfy.model_management as management
import comfy.utils
from comfy import weight_files
from comfy.lora import load_lora
from comfy.model_patcher import ModelPatcher
from comfy.weight_files import WeightFileChangedError
from tests.models.test_patcher import CPU, Network, X


def written(path: Path, value: float) -> str:
    """A file with weights of `Network`."""
    torch.manual_seed(int(value))
    save_file({key: torch.randn_like(weight) for key, weight in Network().state_dict().items()}, str(path))
    return str(path)


def loaded(path: str, always_copy: bool = True) -> ModelPatcher:
    network = Network()
    network.load_state_dict(comfy.utils.load_torch_file(path), assign=True)
    patcher = ModelPatcher(network, CPU, CPU)
    patcher.weight_store.always_copy = always_copy
    return patcher


def rewrite(path: str, other: str) -> None:
    """Another content of the same length, in place."""
    with open(other, "rb") as source, open(path, "r+b") as file:
        file.write(source.read())
    os.utime(path, ns=(1, 1))  # a clock tick may not have passed


def truncate(path: str, other: str) -> None:
    os.truncate(path, 100)


def replace(path: str, other: str) -> None:
    """Another file by the same name, of the same size and time."""
    before = os.stat(path)
    copied = shutil.copy(other, f"{path}.new")
    os.utime(copied, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(copied, path)


def remove(path: str, other: str) -> None:
    os.remove(path)


CHANGES = pytest.mark.parametrize(
    ("change", "said"),
    [(rewrite, "written to"), (truncate, "to 100 bytes"), (replace, "replaced"), (remove, "removed")],
)


@CHANGES
@pytest.mark.parametrize("always_copy", [True, False], ids=["copied", "used from the file"])
def test_a_change_is_noticed_before_weights_are_placed_again(
    tmp_path: Path, change: Any, said: str, always_copy: bool
) -> None:
    path, other = written(tmp_path / "a.safetensors", 1), written(tmp_path / "b.safetensors", 2)
    patcher = loaded(path, always_copy)
    management.load_models_gpu([patcher])
    patcher.detach()
    change(path, other)
    with pytest.raises(WeightFileChangedError, match=said) as raised:
        management.load_models_gpu([patcher])
    assert path in str(raised.value) and "queue the prompt again" in str(raised.value)


@CHANGES
def test_a_change_is_noticed_when_a_lora_is_taken_away(tmp_path: Path, change: Any, said: str) -> None:
    """The unpatched weights would be read from the file."""
    path, other = written(tmp_path / "a.safetensors", 1), written(tmp_path / "b.safetensors", 2)
    patcher = loaded(path)
    patched = patcher.clone()
    patched.add_patches({"first.weight": ("diff", (torch.ones(16, 8),))}, 1.0)
    management.load_models_gpu([patched])
    patcher.weight_store.release_pristine()
    before = patched.model.first.weight.clone()
    change(path, other)
    with pytest.raises(WeightFileChangedError, match=said):
        management.load_models_gpu([patcher])
    assert torch.equal(patched.model.first.weight, before), "nothing was read"


@CHANGES
def test_a_change_of_a_lora_file_is_noticed(tmp_path: Path, change: Any, said: str) -> None:
    torch.manual_seed(1)
    contents = [{"x.lora_up.weight": torch.randn(16, 2), "x.lora_down.weight": torch.randn(2, 8)} for _ in range(2)]
    paths = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for path, content in zip(paths, contents):
        save_file(content, path)
    patches = load_lora(comfy.utils.load_torch_file(paths[0]), {"x": "first.weight"})
    patcher = ModelPatcher(Network(), CPU, CPU)
    patched = patcher.clone()
    patched.add_patches(patches, 1.0)
    management.load_models_gpu([patched])
    change(*paths)
    with pytest.raises(WeightFileChangedError, match=said):
        management.load_models_gpu([patched])
    management.load_models_gpu([patcher])  # without the adapter its file does not matter


def test_a_change_during_the_computation_is_noticed_after_it(tmp_path: Path) -> None:
    path, other = written(tmp_path / "a.safetensors", 1), written(tmp_path / "b.safetensors", 2)
    patcher = loaded(path, always_copy=False)
    management.load_models_gpu([patcher])
    management.check_weight_files([patcher])
    rewrite(path, other)
    patcher.model(X)
    with pytest.raises(WeightFileChangedError, match="written to"):
        management.check_weight_files([patcher])


def test_a_change_while_weights_are_copied_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.weights.store as store

    path, other = written(tmp_path / "a.safetensors", 1), written(tmp_path / "b.safetensors", 2)
    patcher, fetch = loaded(path), store.fetch

    def slow(pairs: Any) -> None:
        fetch(pairs)
        rewrite(path, other)

    monkeypatch.setattr(store, "fetch", slow)
    with pytest.raises(WeightFileChangedError, match="written to"):
        management.load_models_gpu([patcher])


def test_a_change_during_loading_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.checkpoint_files as checkpoint_files

    path, other = written(tmp_path / "a.safetensors", 1), written(tmp_path / "b.safetensors", 2)
    load = checkpoint_files._load_safetensors

    def slow(*arguments: Any) -> Any:
        rewrite(path, other)
        return load(*arguments)

    monkeypatch.setattr(checkpoint_files, "_load_safetensors", slow)
    with pytest.raises(WeightFileChangedError):
        comfy.utils.load_torch_file(path)


def test_what_was_converted_still_belongs_to_its_file(tmp_path: Path) -> None:
    """Ranks that loaded two versions of a file in the same instant must not go on together."""
    path, other = written(tmp_path / "a.safetensors", 1), written(tmp_path / "b.safetensors", 2)
    weights = comfy.utils.load_torch_file(path)
    network = Network()
    network.load_state_dict({key: value.double() for key, value in weights.items()}, assign=True)
    patcher = ModelPatcher(network, CPU, CPU)
    patcher.weight_store.loaded_from |= weight_files.files_in(weights)
    management.load_models_gpu([patcher])
    replace(path, other)
    with pytest.raises(WeightFileChangedError):
        management.load_models_gpu([patcher])


def test_the_file_of_a_tensor(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", 1)
    weights = comfy.utils.load_torch_file(path)
    file = weight_files.WeightFile(path, weight_files.state_of(path))
    weight = torch.nn.Parameter(weights.pop("first.weight"))
    assert weight_files.file_of(weight) == weight_files.file_of(weight[2:4]) == file
    assert weight_files.file_of(weight.detach().clone()) is None
    assert weight_files.file_of(copy.deepcopy(weight)) is None
    assert weight_files.files_in([("diff", (weight,)), {"x": [3.0, None]}]) == {file}
    assert weight_files.files_in({"first.weight": [(1.0, ("diff", (weight,)), 1.0, None, None)]}) == {file}


def test_a_copy_of_a_network_does_not_depend_on_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", 1)
    patcher = loaded(path)
    management.load_models_gpu([patcher])
    patcher.detach()
    own = copy.deepcopy(patcher)
    os.remove(path)
    management.load_models_gpu([own])


def test_looking_at_files_costs_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks for each file and placement, whatever the number of weights."""
    patcher = loaded(written(tmp_path / "a.safetensors", 1))
    management.load_models_gpu([patcher])
    looks: list[str] = []
    state_of = weight_files.state_of
    monkeypatch.setattr(weight_files, "state_of", lambda path: looks.append(path) or state_of(path))
    management.load_models_gpu([patcher])
    assert len(looks) == 2
