"""Goldens 11: families recognised by keys and shapes, in files of real sizes, in tiny ones and in smallest key sets."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

import comfy.families
import comfy.model_detection
import comfy.supported_models

from . import golden
from .models import INDEX, record

DETECTION = golden.load_json("11_detection/detection.json")
PREFIX = "model.diffusion_model."


def _cases(section: str) -> list[Any]:
    """Names of a section's entries, skipped where there is no record."""
    out = []
    for name, facts in DETECTION.get(section, {}).items():
        kind = facts["class"]
        if kind is None and section == "tiny":
            kind = INDEX["families"][name]["model_config_class"]
        reason = None if kind is None or record(kind) else f"there is no record of {kind} yet"
        out.append(pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else []))
    return out


def _digest(layout: dict[str, list[int]]) -> str:
    lines = [f"{key} {'x'.join(map(str, shape))}" for key, shape in sorted(layout.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A configuration as JSON has it."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, torch.dtype) else value


def _check(state_dict: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """The configuration and class of a state dict, with and without a prefix."""
    for prefix in ("", PREFIX):
        keys = {prefix + key: value for key, value in state_dict.items()}
        assert _plain(comfy.model_detection.detect_unet_config(keys, prefix)) == facts["config"]
        found = comfy.model_detection.model_config_from_unet(keys, prefix)
        assert (None if found is None else type(found).__name__) == facts["class"]


@pytest.mark.parametrize("name", _cases("full_size"))
def test_real_files(name: str) -> None:
    """The network of the recorded configuration has the real layout, and is recognised by it."""
    facts = DETECTION["full_size"][name]
    family = record(facts["class"])
    assert family is not None
    config = getattr(comfy.supported_models, facts["class"])(dict(facts["config"])).unet_config
    state_dict = family.network_class()(**config, device="meta").state_dict()
    layout = {key: list(value.shape) for key, value in state_dict.items()}
    assert len(layout) == facts["n_keys"]
    assert sum(value.numel() for value in state_dict.values()) == facts["n_numbers"]
    assert layout == facts.get("layout", layout)
    assert _digest(layout) == facts["layout_digest"]
    _check(state_dict, facts)


@pytest.mark.parametrize("name", _cases("tiny"))
def test_tiny_files(name: str) -> None:
    recipe = INDEX["families"][name]["recipe"]
    _check({key: torch.empty(shape, device="meta") for key, (shape, _) in recipe.items()}, DETECTION["tiny"][name])


@pytest.mark.parametrize("name", _cases("minimal"))
def test_minimal_key_sets(name: str) -> None:
    facts = DETECTION["minimal"][name]
    _check({key: torch.empty(shape, device="meta") for key, shape in facts["keys"].items()}, facts)


class _Shaped:
    """What recognition may know of a tensor; notes that its shape was read."""

    def __init__(self, key: str, shape: list[int], read: set[str]) -> None:
        self._key, self._shape, self._read = key, shape, read

    @property
    def shape(self) -> torch.Size:
        """The recorded shape."""
        self._read.add(self._key)
        return torch.Size(self._shape)


@pytest.mark.parametrize("name", _cases("minimal"))
def test_only_some_shapes_are_read(name: str) -> None:
    """Quantised files have other shapes for most tensors: recognition reads those that are never quantised."""
    facts, read = DETECTION["minimal"][name], set[str]()
    keys = {key: _Shaped(key, shape, read) for key, shape in facts["keys"].items()}
    assert _plain(comfy.model_detection.detect_unet_config(keys, "")) == facts["config"]
    assert sorted(read) == facts["keys_whose_shape_is_read"]


@pytest.mark.parametrize("name", sorted(DETECTION.get("prefix_choice", {})))
def test_prefix(name: str) -> None:
    facts = DETECTION["prefix_choice"][name]
    assert comfy.model_detection.unet_prefix_from_state_dict(dict.fromkeys(facts["keys"])) == facts["prefix"]


def _tables() -> list[Any]:
    return [
        pytest.param(name, marks=[] if record(name) else [pytest.mark.skip(reason=f"there is no record of {name} yet")])
        for name in DETECTION.get("class_tables", {})
    ]


@pytest.mark.parametrize("name", _tables())
def test_what_a_class_declares(name: str) -> None:
    facts, kind = DETECTION["class_tables"][name], getattr(comfy.supported_models, name)
    assert _plain(kind.unet_config) == facts["must_match"]
    assert sorted(kind.required_keys) == sorted(facts["required_keys"])
    assert _plain(kind.unet_extra_config) == facts["added_config"]
    assert kind.sampling_settings == facts["sampling_settings"]
    assert kind.vae_key_prefix == facts["vae_key_prefix"]
    assert kind.text_encoder_key_prefix == facts["text_encoder_key_prefix"]
    assert kind.clip_vision_prefix == facts["clip_vision_prefix"]
    assert [str(dtype) for dtype in kind.supported_inference_dtypes] == facts["inference_dtypes_in_order"]
    assert kind.memory_usage_factor == pytest.approx(facts["memory_usage_factor"])


def test_classes_are_tried_in_the_recorded_order() -> None:
    golden.require()
    order = DETECTION["match_order"]
    own = [name for family in comfy.families.records() for name in family.configurations if name in order]
    assert own == sorted(own, key=order.index)
