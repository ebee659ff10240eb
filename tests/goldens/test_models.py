"""Goldens 06: every recorded network, the model around it, and what it makes of conditioning fields."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import golden
from .models import INDEX, arguments, model, parameters, tensors

TOPIC = "06 models"
CASES = {
    (family, case): family for family, facts in INDEX.get("families", {}).items() for case in facts["cases"]
}  # fmt: skip
EXTRA = golden.load_json("06_models/extra_conds.json")
EXTRA_CASES = {name: name.split("/")[0] for name in EXTRA.get("cases", EXTRA)}


@pytest.mark.parametrize("case", parameters(CASES))
def test_network_and_model(case: tuple[str, str]) -> None:
    family, name = case
    facts = INDEX["families"][family]["cases"][name]
    values = arguments(facts)
    sigma = values.pop("sigma", None)
    x, t = values.pop("x"), values.pop("t")
    built = model(family)
    with torch.no_grad():
        golden.check(
            TOPIC, f"{family}/{name}", built.diffusion_model(x, t, **values), tensors()[facts["raw_out"]], 1e-4
        )
    if "apply_out" in facts and sigma is not None:
        context = values.pop("context")
        with torch.no_grad():
            got = built.apply_model(x * facts["apply_x_scale"], sigma, c_crossattn=context, **values)
        golden.check(TOPIC, f"{family}/{name}/apply", got, tensors()[facts["apply_out"]], 1e-4)


@pytest.mark.parametrize("family", parameters({family: family for family in INDEX.get("families", {})}))
def test_sampling_type_and_settings(family: str) -> None:
    facts, built = INDEX["families"][family], model(family)
    assert built.model_type.name == facts["model_type"]
    assert built.model_config.sampling_settings == facts["sampling_settings"]
    told = {name: value if name != "dtype" else str(value) for name, value in built.model_config.unet_config.items()}
    told = {name: str(value) if isinstance(value, torch.dtype) else value for name, value in told.items()}
    wanted = facts["effective_unet_config"]
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in told.items()} == wanted


def _values(described: dict[str, Any], recorded: golden.Tensors) -> Any:
    """A recorded field or result: a tensor, a list of them, or a plain value."""
    if "tensor" in described:
        return recorded[described["tensor"]]
    if "tensors" in described:
        return [recorded[key] for key in described["tensors"]]
    return described["value"]


@pytest.mark.parametrize("name", parameters(EXTRA_CASES))
def test_conditioning_fields(name: str) -> None:
    recorded = golden.load_tensors("06_models/extra_conds.safetensors")
    case = EXTRA.get("cases", EXTRA)[name]
    fields = {field: _values(value, recorded) for field, value in case["fields"].items()}
    noise = torch.zeros(case["noise_shape"])
    got = model(EXTRA_CASES[name]).extra_conds(noise=noise, device=torch.device("cpu"), **fields)
    assert sorted(got) == sorted(case["result"])
    for field, described in case["result"].items():
        assert type(got[field]).__name__ == described["kind"]
        want, have = _values(described, recorded), got[field].cond
        if not isinstance(want, (list, torch.Tensor)):
            assert have == want, field
            continue
        pairs = zip(have, want, strict=True) if isinstance(want, list) else [(have, want)]
        for value, expected in pairs:
            golden.check(TOPIC, f"extra_conds {name}", value, expected, 1e-5)
