"""Goldens 06, 08, 09 and 11 for UNets: networks, models, conditioning fields, sampling, adapters, recognition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import comfy.lora
import comfy.lora_convert
import comfy.model_detection
import comfy.model_management
import comfy.supported_models
import nodes
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.unet import keys
from comfy.model_patcher import ModelPatcher
from comfy.taco_dit import TACODiTModelPatcher
from comfy_extras import nodes_custom_sampler, nodes_model_advanced
from comfy_nodes.sampler_choice import KSamplerSelect

from . import golden

FAMILIES = ("sdxl_unet", "sd15_unet")
INDEX = golden.load_json("06_models/index.json")
MODELS = {name: facts for name, facts in INDEX.get("families", {}).items() if name in FAMILIES}
EXTRA = golden.load_json("06_models/extra_conds.json")
EXTRA_CASES = {name: case for name, case in EXTRA.get("cases", EXTRA).items() if name.split("/")[0] in FAMILIES}
SAMPLING = golden.load_json("08_ksampler/index.json")
RUNS = {name: run for name, run in SAMPLING.get("runs", {}).items() if run.get("family") in FAMILIES}
NODE_RUNS = {name: run for name, run in RUNS.items() if "scheduler" in run}
GUIDER_RUNS = {name: run for name, run in RUNS.items() if "sigmas" in run}
LORA = golden.load_json("09_lora/index.json")
LORA_CASES = {name: case for name, case in LORA.get("cases", {}).items() if name.split("/")[0] in FAMILIES}
DETECTION = golden.load_json("11_detection/detection.json")


def model(family: str) -> Any:
    """A family's recorded network with its sampling type and latent format."""
    facts = MODELS[family]
    config = getattr(comfy.supported_models, facts["model_config_class"])(dict(facts["config"]))
    config.set_inference_dtype(torch.float32, None)
    built = config.get_model({}, device=torch.device("cpu"))
    built.diffusion_model.load_state_dict(golden.make_weights(facts["recipe"], INDEX["set_seed"]))
    return built.eval().requires_grad_(False)


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a recorded call."""
    tensors = golden.load_tensors("06_models/tensors.safetensors")
    return {name: tensors[key] for name, key in case["inputs"].items()} | case["literals"]


@pytest.mark.parametrize(
    "name", golden.cases({f"{f}/{c}": None for f, facts in MODELS.items() for c in facts["cases"]})
)
def test_network_and_model(name: str) -> None:
    tensors = golden.load_tensors("06_models/tensors.safetensors")
    family, _, which = name.partition("/")
    case, built = MODELS[family]["cases"][which], model(family)
    values = arguments(case)
    sigma, x, t = values.pop("sigma"), values.pop("x"), values.pop("t")
    with torch.no_grad():
        golden.check("06 models", name, built.diffusion_model(x, t, **values), tensors[case["raw_out"]], 1e-4)
        context = values.pop("context")
        got = built.apply_model(x * case["apply_x_scale"], sigma, c_crossattn=context, **values)
    golden.check("06 models", f"{name}/apply", got, tensors[case["apply_out"]], 1e-4)


@pytest.mark.parametrize("name", golden.cases(EXTRA_CASES))
def test_conditioning_fields(name: str) -> None:
    recorded, case = golden.load_tensors("06_models/extra_conds.safetensors"), EXTRA_CASES[name]
    fields = {k: recorded[v["tensor"]] if "tensor" in v else v["value"] for k, v in case["fields"].items()}
    noise = torch.zeros(case["noise_shape"])
    got = model(name.split("/")[0]).extra_conds(noise=noise, device=torch.device("cpu"), **fields)
    assert sorted(got) == sorted(case["result"])
    for field, want in case["result"].items():
        assert type(got[field]).__name__ == want["kind"]
        golden.check("06 models", f"extra_conds {name}", got[field].cond, recorded[want["tensor"]], 1e-5)


# --- sampling ----------------------------------------------------------------------------------------------------------


def recorded(name: str) -> torch.Tensor:
    """A tensor of topic 08."""
    return golden.load_tensors("08_ksampler/tensors.safetensors")[name]


def conditioning(family: str, sign: str, pooled: str | None = None, **more: Any) -> list[Any]:
    """[[context, {"pooled_output": vector}]]."""
    vector = recorded(f"{family}/{pooled or sign}_pooled")
    return [[recorded(f"{family}/{sign}_context"), {"pooled_output": vector, **more}]]


def latent_of(run: dict[str, Any]) -> dict[str, Any]:
    """The LATENT that a run starts from."""
    family = run["family"]
    given = run["latent"] == "latent"
    shape = SAMPLING["families"][family]["shape"]
    out: dict[str, Any] = {"samples": recorded(f"{family}/latent") if given else torch.zeros(shape)}
    if "noise_mask" in run:
        out["noise_mask"] = recorded(f"{family}/noise_mask")
    if "batch_index" in run:
        out["batch_index"] = run["batch_index"]
    return out


@pytest.mark.parametrize("name", golden.cases(NODE_RUNS))
def test_sampler_node(name: str) -> None:
    run = RUNS[name]
    family, _, kind = name.partition("/")
    used: Any = TACODiTModelPatcher(model(family), torch.device("cpu"), torch.device("cpu"))
    if kind == "v_prediction_zsnr":
        (used,) = nodes_model_advanced.ModelSamplingDiscrete().patch(used, "v_prediction", True)
    if kind == "rescale_cfg":
        (used,) = nodes_model_advanced.RescaleCFG().patch(used, run.get("multiplier", 0.7))
    positive = conditioning(family, "pos", **run.get("positive_size_fields", {}))
    with torch.inference_mode():
        (out,) = nodes.common_ksampler(
            used, SAMPLING["seed"], run["steps"], run["cfg"], run["sampler"], run["scheduler"], positive,
            conditioning(family, "neg"), latent_of(run), denoise=run.get("denoise", 1.0),
            disable_noise=run.get("disable_noise", False), start_step=run.get("start_step"),
            last_step=run.get("last_step"), force_full_denoise=run.get("force_full_denoise", False),
        )  # fmt: skip
    tolerance = 2e-3 if kind == "v_prediction_zsnr" else 3e-4
    golden.check("08 sampler node", name, out["samples"], recorded(run["out"]), tolerance)


@pytest.mark.parametrize("name", golden.cases(GUIDER_RUNS))
def test_custom_sampling(name: str) -> None:
    run = RUNS[name]
    family, _, kind = name.partition("/")
    used = TACODiTModelPatcher(model(family), torch.device("cpu"), torch.device("cpu"))
    positive, negative = conditioning(family, "pos"), conditioning(family, "neg")
    if kind == "custom_basic_guider":
        (guider,) = nodes_custom_sampler.BasicGuider().get_guider(used, positive)
    elif kind == "custom_cfg_guider":
        (guider,) = nodes_custom_sampler.CFGGuider().get_guider(used, positive, negative, run["cfg"])
    else:
        (guider,) = nodes_custom_sampler.DualCFGGuider().get_guider(
            used, positive, conditioning(family, "mid", "pos"), negative, run["cfg_conds"],
            run["cfg_cond2_negative"], kind.removeprefix("dual_cfg_"),
        )  # fmt: skip
    (noise,) = nodes_custom_sampler.RandomNoise().get_noise(SAMPLING["seed"])
    (sampler,) = KSamplerSelect().get_sampler(run.get("sampler", "euler"))
    with torch.inference_mode():
        out, denoised = nodes_custom_sampler.SamplerCustomAdvanced().sample(
            noise, guider, sampler, torch.tensor(run["sigmas"]), latent_of(run)
        )
    golden.check("08 sampler node", name, out["samples"], recorded(name), 3e-4)
    if f"{name}_denoised" in golden.load_tensors("08_ksampler/tensors.safetensors"):
        golden.check("08 sampler node", name, denoised["samples"], recorded(f"{name}_denoised"), 3e-4)


# --- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.cases(LORA_CASES))
def test_adapters(name: str) -> None:
    case, figures = LORA_CASES[name], golden.load_tensors("09_lora/tensors.safetensors")
    family = name.split("/")[0]
    patcher = ModelPatcher(model(family), torch.device("cpu"), torch.device("cpu"))
    before = {key: value.clone() for key, value in patcher.model.state_dict().items()}
    file = dict(golden.load_tensors(f"09_lora/{case['file']}"))
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {})
    adapter = comfy.lora.load_lora(comfy.lora_convert.convert_lora(file), key_map, log_missing=False)
    patcher.add_patches(adapter, float(name.rpartition("strength")[2]))
    assert sorted(patcher.patches) == sorted(case["patches"])
    comfy.model_management.load_models_gpu([patcher])
    weights = patcher.model.state_dict()
    assert {key for key in before if not before[key].equal(weights[key])} == set(case["changed"])
    for key, facts in case["changed"].items():
        samples = weights[key].flatten()[:: facts["samples_every"]]
        golden.check("09 adapters", f"{name} weights", samples, figures[facts["samples"]], 1e-5)
    values = arguments(MODELS[family]["cases"]["even"])
    values.pop("sigma")
    with torch.no_grad():
        out = patcher.model.diffusion_model(values.pop("x"), values.pop("t"), **values)
    golden.check("09 adapters", name, out, figures[case["forward_out"]], 1e-4)


@pytest.mark.parametrize("family", [name for name in LORA.get("key_maps", {}) if name in FAMILIES])
def test_every_adapter_key_is_understood(family: str) -> None:
    assert comfy.lora.model_lora_keys_unet(model(family), {}) == LORA["key_maps"][family]


# --- recognition -------------------------------------------------------------------------------------------------------

SIZES = {
    name: facts
    for name, facts in DETECTION.get("full_size", {}).items()
    if "model_channels" in facts["config"]
}  # fmt: skip


@pytest.mark.parametrize("name", golden.cases(SIZES))
def test_full_size_files_are_recognised(name: str) -> None:
    facts = SIZES[name]
    made = getattr(comfy.supported_models, facts["class"])(facts["config"])
    with torch.device("meta"):
        state_dict = UNetModel(**made.unet_config).state_dict()
    assert len(state_dict) == facts["n_keys"]
    assert sum(t.numel() for t in state_dict.values()) == facts["n_numbers"]
    if "layout" in facts:
        assert {key: list(t.shape) for key, t in state_dict.items()} == facts["layout"]
    for prefix in ("", "model.diffusion_model."):
        prefixed = {prefix + key: value for key, value in state_dict.items()}
        assert comfy.model_detection.detect_unet_config(prefixed, prefix) == facts["config"]
        found = comfy.model_detection.model_config_from_unet(prefixed, prefix)
        assert type(found).__name__ == facts["class"]
    theirs = {
        their: state_dict[own] for their, own in keys.unet_to_diffusers(facts["config"]).items() if own in state_dict
    }
    back = comfy.model_detection.convert_diffusers_mmdit(theirs)
    assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in state_dict.items()}


@pytest.mark.parametrize("name", golden.cases(MODELS))
def test_tiny_files(name: str) -> None:
    facts = DETECTION["tiny"][name]
    state_dict = {key: torch.empty(shape, device="meta") for key, (shape, _) in MODELS[name]["recipe"].items()}
    config = comfy.model_detection.detect_unet_config(state_dict, "")
    assert config == facts["config"]
    assert comfy.model_detection.model_config_from_unet_config(config, state_dict) is None and facts["class"] is None


def test_classes_are_tried_in_the_recorded_order() -> None:
    golden.require()
    ours = [kind.__name__ for kind in comfy.supported_models.models]
    assert [name for name in DETECTION["match_order"] if name in ours] == [
        n for n in ours if n in DETECTION["match_order"]
    ]


UNET_CLASSES = [
    name for name, table in DETECTION.get("class_tables", {}).items() if "model_channels" in table["must_match"]
]


@pytest.mark.parametrize("name", UNET_CLASSES)
def test_class_tables(name: str) -> None:
    table, kind = DETECTION["class_tables"][name], getattr(comfy.supported_models, name)

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in values.items()}

    assert plain(kind.unet_config) == table["must_match"]
    assert plain(kind.unet_extra_config) == table["added_config"]
    assert sorted(kind.required_keys) == sorted(table["required_keys"])
    assert kind.sampling_settings == table["sampling_settings"]
    assert kind.vae_key_prefix == table["vae_key_prefix"]
    assert kind.text_encoder_key_prefix == table["text_encoder_key_prefix"]
    assert kind.clip_vision_prefix == table["clip_vision_prefix"]
    assert kind.memory_usage_factor == table["memory_usage_factor"]
    assert [str(dtype) for dtype in kind.supported_inference_dtypes] == table["inference_dtypes_in_order"]
