"""The recorded networks of topic 06, as every topic that uses them builds them."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch

import comfy.families
import comfy.supported_models
from comfy.families import Family

from . import golden

INDEX = golden.load_json("06_models/index.json")
_LISTED = re.compile(r"(.+)\.(\d+)$")


def tensors() -> golden.Tensors:
    """The recorded tensors of the topic."""
    return golden.load_tensors("06_models/tensors.safetensors")


def record(configuration: str) -> Family | None:
    """The record with a configuration class of this name, or None while there is none."""
    return next((family for family in comfy.families.records() if configuration in family.configurations), None)


def known(family: str) -> bool:
    """Whether a recorded family has a record."""
    facts = INDEX.get("families", {}).get(family)
    return facts is not None and record(facts["model_config_class"]) is not None


def parameters(cases: dict[Any, str]) -> list[Any]:
    """Parameters of a test from `{case: recorded family}`; cases of families without a record are skipped."""
    return [
        pytest.param(
            case,
            id="/".join(case) if isinstance(case, tuple) else case,
            marks=[] if known(family) else pytest.mark.skip(reason=f"there is no record of {family} yet"),
        )
        for case, family in cases.items()
    ]  # fmt: skip


def configuration(family: str) -> Any:
    """The configuration of a recorded network, which computes in fp32."""
    facts = INDEX["families"][family]
    config = getattr(comfy.supported_models, facts["model_config_class"])(dict(facts["config"]))
    config.set_inference_dtype(torch.float32, None)
    return config


@functools.lru_cache(maxsize=1)
def _weights(family: str) -> dict[str, torch.Tensor]:
    return golden.make_weights(INDEX["families"][family]["recipe"], INDEX["set_seed"])


def model(family: str) -> Any:
    """A recorded network with its sampling type and latent format, new each time."""
    built = configuration(family).get_model({}, device=torch.device("cpu"))
    built.diffusion_model.load_state_dict({key: value.clone() for key, value in _weights(family).items()})
    return built.eval().requires_grad_(False)


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a recorded call; `name.0`, `name.1` are entries of a list."""
    out: dict[str, Any] = {}
    listed: dict[str, dict[int, torch.Tensor]] = {}
    for name, key in case["inputs"].items():
        entry = _LISTED.match(name)
        if entry is None:
            out[name] = tensors()[key]
        else:
            listed.setdefault(entry[1], {})[int(entry[2])] = tensors()[key]
    out.update({name: [entries[i] for i in sorted(entries)] for name, entries in listed.items()})
    return {**out, **case["literals"]}
