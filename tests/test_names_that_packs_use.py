"""What names do that three packs or more use, called as packs call them, where no test of the part itself does so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import comfy.missing
import comfy.model_management as management
import comfy.samplers
import comfy.utils
import folder_paths

HERE = Path(__file__).parent
CPU = torch.device("cpu")
SHOWN: set[str] = set()


def shows(module: str, *names: str) -> Callable[[Any], Any]:
    """What a test shows the behaviour of."""
    SHOWN.update(f"{module}.{name}" for name in names)
    return lambda test: test


def used_by_three() -> list[str]:
    """Names of tests/imported_names.txt that three packs or more use; what is gone before ComfyUI 0.3.64 left out."""
    found = []
    for line in (HERE / "imported_names.txt").read_text().splitlines()[2:]:
        module, _, entries = line.partition(": ")
        for name, _, count in (entry.rpartition("=") for entry in entries.split()):
            if int(count) >= 3 and name != "(module)" and not name.startswith("-"):
                found.append(f"{module}.{name.lstrip('+').partition('[')[0]}")
    return found


def test_each_has_a_test() -> None:
    """Here, or, by its last name, in a test of the part it belongs to."""
    others = "\n".join(
        path.read_text(encoding="utf-8") for path in HERE.rglob("*.py")
        if path != Path(__file__) and path.name != "test_imported_names.py"
    )  # fmt: skip
    words = set(re.findall(r"\w+", others))
    names = used_by_three()
    shown = tuple(SHOWN)
    untested = [
        name for name in names
        if not any(name == known or name.startswith((f"{known}.", f"{known}(", f"{known}[")) for known in shown)
        and re.findall(r"\w+", name)[-1] not in words
    ]  # fmt: skip
    assert len(names) > 350 and untested == []


@shows(
    "folder_paths", "models_dir", "get_temp_directory", "get_annotated_filepath", "get_input_directory",
    "supported_pt_extensions", "output_directory", "exists_annotated_filepath", "annotated_filepath",
    "get_directory_by_type", "input_directory", "get_user_directory",
)  # fmt: skip
def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("input", "output", "temp", "user"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    (tmp_path / "output" / "a.png").touch()
    get = {name: getattr(folder_paths, f"get_{name}_directory")() for name in ("input", "output", "temp", "user")}
    assert get == {name: str(tmp_path / name) for name in get}
    assert folder_paths.get_directory_by_type("temp") == folder_paths.temp_directory
    assert folder_paths.get_directory_by_type("models") is None
    assert folder_paths.annotated_filepath("a.png [output]") == ("a.png", folder_paths.output_directory)
    assert folder_paths.annotated_filepath("a.png") == ("a.png", None)
    assert folder_paths.get_annotated_filepath("a.png [output]") == str(tmp_path / "output" / "a.png")
    assert folder_paths.get_annotated_filepath("b.png") == str(tmp_path / "input" / "b.png")
    assert folder_paths.exists_annotated_filepath("a.png [output]") and not folder_paths.exists_annotated_filepath(
        "a.png"
    )
    assert isinstance(folder_paths.models_dir, str)
    assert {".safetensors", ".ckpt", ".pt"} <= folder_paths.supported_pt_extensions


@shows(
    "comfy.model_management", "unet_offload_device", "intermediate_device", "unet_dtype", "load_model_gpu",
    "should_use_fp16", "get_autocast_device", "cast_to_device", "is_device_mps", "text_encoder_offload_device",
    "unet_manual_cast", "device_supports_non_blocking", "text_encoder_device", "vae_device", "loaded_models",
    "xformers_enabled", "cast_to", "cleanup_models_gc", "get_torch_device_name", "is_intel_xpu", "vae_dtype",
    "vae_offload_device",
)  # fmt: skip
def test_management_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy.model_patcher import ModelPatcher

    monkeypatch.setattr(management, "_bound_device", CPU)
    devices = ("unet_offload", "intermediate", "text_encoder_offload", "text_encoder", "vae", "vae_offload")
    assert {getattr(management, f"{name}_device")() for name in devices} == {CPU}
    assert management.get_torch_device_name(CPU) == management.get_autocast_device(CPU) == "cpu"
    assert not management.should_use_fp16(CPU) and not management.device_supports_non_blocking(CPU)
    assert not management.is_device_mps(CPU) and not management.is_intel_xpu() and not management.xformers_enabled()
    dtypes = {"supported_dtypes": [torch.bfloat16, torch.float32]}
    assert (
        management.unet_dtype(CPU, model_params=10, weight_dtype=torch.bfloat16, **dtypes) in dtypes["supported_dtypes"]
    )
    assert management.unet_manual_cast(torch.float32, CPU) is None
    assert management.vae_dtype(CPU, [torch.float32]) == torch.float32
    tensor = torch.ones(2)
    assert management.cast_to(tensor, torch.float32, CPU) is tensor
    half = management.cast_to_device(tensor, CPU, torch.float16, copy=True)
    assert half.dtype == torch.float16 and half is not tensor
    patcher = ModelPatcher(torch.nn.Linear(2, 2), CPU, CPU)
    management.load_model_gpu(patcher)
    assert patcher in management.loaded_models(only_currently_used=True)
    del patcher
    management.cleanup_models_gc()
    assert not [entry for entry in management.current_loaded_models if entry.is_dead()]


@shows("comfy.utils", "get_attr", "set_attr", "set_attr_param", "copy_to_param")
def test_dotted_paths() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    weight = comfy.utils.get_attr(network, "0.weight")
    comfy.utils.copy_to_param(network, "0.weight", torch.ones(2, 2))
    assert weight.sum() == 4 and network[0].weight is weight
    assert comfy.utils.set_attr_param(network, "0.weight", torch.zeros(2, 2)) is weight
    assert isinstance(network[0].weight, torch.nn.Parameter) and not network[0].weight.requires_grad
    comfy.utils.set_attr(network, "1.inplace", True)
    assert network[1].inplace


@shows("comfy.utils", "calculate_parameters", "state_dict_prefix_replace", "PROGRESS_BAR_ENABLED")
def test_state_dicts() -> None:
    weights = {"a.x": torch.ones(3), "a.y": torch.ones(2), "b.x": torch.ones(1)}
    assert comfy.utils.calculate_parameters(weights) == 6 and comfy.utils.calculate_parameters(weights, "a.") == 5
    taken = comfy.utils.state_dict_prefix_replace(weights, {"a.": "c."}, filter_keys=True)
    assert set(taken) == {"c.x", "c.y"} and set(weights) == {"b.x"}
    assert set(comfy.utils.state_dict_prefix_replace(taken, {"c.x": "d.x"})) == {"d.x", "c.y"}
    assert comfy.utils.PROGRESS_BAR_ENABLED in (True, False)


@shows("comfy.utils", "tiled_scale", "get_tiled_scale_steps", "bislerp", "lanczos", "repeat_to_batch_size")
def test_scaling() -> None:
    picture = torch.rand(1, 3, 24, 40)
    bar = SimpleNamespace(steps=0, update=lambda n: setattr(bar, "steps", bar.steps + n))
    double = lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)  # noqa: E731
    out = comfy.utils.tiled_scale(picture, double, tile_x=16, tile_y=16, overlap=4, upscale_amount=2, pbar=bar)
    torch.testing.assert_close(out, double(picture))
    assert bar.steps == comfy.utils.get_tiled_scale_steps(40, 24, tile_x=16, tile_y=16, overlap=4)
    assert comfy.utils.bislerp(picture, 20, 12).shape == comfy.utils.lanczos(picture, 20, 12).shape == (1, 3, 12, 20)
    rows = torch.arange(2.0).view(2, 1)
    assert comfy.utils.repeat_to_batch_size(rows, 3).flatten().tolist() == [0, 1, 0]
    assert comfy.utils.repeat_to_batch_size(rows, 1).flatten().tolist() == [0]


@shows("comfy.utils", "pack_latents", "unpack_latents")
@shows("comfy.nested_tensor", "NestedTensor")
def test_latents_of_several_kinds() -> None:
    from comfy.nested_tensor import NestedTensor

    picture, sound = torch.rand(2, 4, 3, 5), torch.rand(2, 8, 7)
    packed, shapes = comfy.utils.pack_latents([picture, sound])
    assert packed.shape == (2, 1, 4 * 15 + 56)
    assert all(map(torch.equal, comfy.utils.unpack_latents(packed, shapes), (picture, sound)))
    assert [part.shape[0] for part in comfy.utils.unpack_latents(packed[:1], shapes)] == [1, 1]
    nested = NestedTensor((picture, sound))
    assert nested.is_nested and nested.shape == picture.shape and nested.device == CPU
    doubled = (nested.clone() + nested).to(torch.float64) / 2
    assert [part.dtype for part in doubled.unbind()] == [torch.float64] * 2
    assert torch.equal(doubled.unbind()[1].float(), sound) and torch.equal(
        (nested - nested)[0].unbind()[0], 0 * picture[0]
    )
    with pytest.raises(ValueError, match="2 and 1 parts"):
        nested * NestedTensor(picture)


@shows("server", "PromptServer.instance.app", "PromptServer.instance.app.router")
@shows("comfy.comfy_types.node_typing", "IO")
@shows("comfy.ldm.flux.layers", "DoubleStreamBlock")
def test_classes_that_packs_ask_for() -> None:
    from comfy.comfy_types.node_typing import IO
    from comfy.ldm.flux.layers import DoubleStreamBlock

    assert IO.ANY == "*" and IO.MODEL == "MODEL" and str(IO.IMAGE.value) == "IMAGE"
    block = DoubleStreamBlock(48, 2, 4.0, device="cpu", operations=comfy.ops.disable_weight_init)
    assert isinstance(block, torch.nn.Module) and block.num_heads == 2
    block.__class__ = type("Mine", (DoubleStreamBlock,), {"forward": lambda self, *args, **kwargs: "mine"})
    assert block() == "mine"


@shows(
    "comfy.samplers",
    "KSAMPLER",
    "cfg_function",
    "KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS",
    "beta_scheduler",
    "ksampler",
)
@shows("comfy.k_diffusion.sampling", "to_d", "get_ancestral_step")
def test_sampling_parts() -> None:
    from comfy.k_diffusion.sampling import get_ancestral_step, to_d
    from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow

    assert {"dpm_2", "uni_pc"} <= comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
    sampler = comfy.samplers.ksampler("euler", {"s_churn": 0.5})
    assert isinstance(sampler, comfy.samplers.KSAMPLER) and sampler.extra_options == {"s_churn": 0.5}
    own = comfy.samplers.KSAMPLER(print, extra_options={"a": 1}, inpaint_options={"random": True})
    assert own.sampler_function is print and own.inpaint_options == {"random": True}
    schedule = type("Schedule", (ModelSamplingDiscreteFlow, CONST), {})()
    sigmas = comfy.samplers.beta_scheduler(schedule, 6)
    assert sigmas[-1] == 0 and (sigmas[:-1] > sigmas[1:]).all()
    cond, uncond, x = torch.full((1, 1), 3.0), torch.ones(1, 1), torch.zeros(1, 1)
    guide = {"sampler_post_cfg_function": [lambda arguments: arguments["denoised"] + arguments["cond_denoised"]]}
    out = comfy.samplers.cfg_function(
        None, cond, uncond, 2.0, x, torch.ones(1), model_options=guide, cond=[], uncond=[]
    )
    assert out.item() == (1 + 2 * 2) + 3
    assert to_d(x, torch.tensor([2.0]), cond).item() == -1.5
    down, up = get_ancestral_step(torch.tensor(2.0), torch.tensor(1.0), eta=1.0)
    torch.testing.assert_close(down**2 + up**2, torch.tensor(1.0))
    assert get_ancestral_step(2.0, 1.0, eta=0.0) == (1.0, 0.0)


@shows("comfy.model_patcher", "set_model_options_patch_replace", "create_model_options_clone", "CoreModelPatcher")
@shows("comfy.patcher_extension", "WrappersMP", "CallbacksMP")
def test_options_and_callbacks() -> None:
    import comfy.model_patcher as patching
    from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP

    options: dict[str, Any] = {"transformer_options": {}}
    assert patching.set_model_options_patch_replace(options, print, "attn2", "input", 4, 1) is options
    copy = patching.create_model_options_clone(options)
    patching.set_model_options_patch_replace(copy, len, "dit", "double_block", 0)
    assert options["transformer_options"]["patches_replace"] == {"attn2": {("input", 4, 1): print}}
    assert copy["transformer_options"]["patches_replace"]["dit"] == {("double_block", 0): len}
    assert patching.CoreModelPatcher is patching.ModelPatcher
    patcher, seen = patching.CoreModelPatcher(torch.nn.Linear(2, 2), CPU, CPU), []
    for kind in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP, CallbacksMP.ON_LOAD):
        patcher.add_callback_with_key(kind, "mine", lambda patcher, *rest, kind=kind: seen.append(kind))
    management.load_models_gpu([patcher])
    patcher.pre_run()
    patcher.cleanup()
    assert seen == [CallbacksMP.ON_LOAD, CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP]
    wrapped = WrapperExecutor.new_executor(lambda x: x + 1, [lambda execute, x: execute(x) * 10])
    assert wrapped.execute(1) == 20
    kinds = ("DIFFUSION_MODEL", "OUTER_SAMPLE", "SAMPLER_SAMPLE", "APPLY_MODEL")
    assert all(isinstance(getattr(WrappersMP, kind), str) for kind in kinds)


@shows("comfy.ops", "manual_cast", "cast_to", "pick_operations")
@shows("comfy.ldm.modules.attention", "optimized_attention_masked", "BasicTransformerBlock", "CrossAttention")
@shows("comfy.ldm.modules.diffusionmodules.openaimodel", "Downsample", "Upsample", "apply_control", "ResBlock")
def test_layers_of_unets() -> None:
    import comfy.ops
    from comfy.ldm.modules import attention
    from comfy.ldm.modules.diffusionmodules import openaimodel as unet

    ops = comfy.ops.manual_cast
    assert comfy.ops.pick_operations(torch.float32, None) is comfy.ops.disable_weight_init
    assert issubclass(comfy.ops.pick_operations(torch.bfloat16, torch.float32).Linear, ops.Linear)
    linear, table = ops.Linear(4, 4, dtype=torch.bfloat16), ops.Embedding(3, 4, dtype=torch.bfloat16)
    assert linear(torch.ones(2, 4)).dtype == torch.float32 and table.bias is None
    weight = torch.ones(2)
    assert comfy.ops.cast_to(weight, torch.float32, CPU) is weight
    weight, bias, stream = comfy.ops.cast_bias_weight(linear, torch.ones(1, 4), offloadable=True)
    assert weight.dtype == torch.float32 and comfy.ops.uncast_bias_weight(linear, weight, bias, stream) is None
    q = torch.randn(1, 3, 8)
    mask = torch.tensor([[True, True, False]])
    only = attention.optimized_attention_masked(q, q[:, :2], q[:, :2], 2)
    torch.testing.assert_close(attention.optimized_attention_masked(q, q, q, 2, mask=mask.expand(3, 3)), only)
    for function in (attention.attention_sage, attention.attention_flash):  # without their packages: torch's kernels
        torch.testing.assert_close(function(q, q, q, 2), attention.attention_pytorch(q, q, q, 2))
    place = {"operations": ops, "device": "cpu", "dtype": torch.float32}
    block = attention.BasicTransformerBlock(8, 2, 4, context_dim=6, **place)
    assert isinstance(block.attn2, attention.CrossAttention)
    assert block(q, context=torch.randn(1, 5, 6)).shape == q.shape
    assert "forward" in vars(attention.BasicTransformerBlock) and "forward" in vars(unet.UNetModel)
    x = torch.randn(1, 32, 4, 4)
    assert unet.Downsample(32, True, **place)(x).shape[-1] == 2 and unet.Upsample(32, True, **place)(x).shape[-1] == 8
    assert unet.ResBlock(32, 16, 0.0, out_channels=64, **place)(x, torch.randn(1, 16)).shape == (1, 64, 4, 4)
    control = {"input": [torch.ones(1), torch.full((1,), 2.0)]}
    assert unet.apply_control(torch.zeros(1), control, "input").item() == 2 and len(control["input"]) == 1


@shows("comfy.sampler_helpers", "convert_cond", "cleanup_additional_models", "get_additional_models", "prepare_mask")
@shows("comfy.samplers", "process_conds")
@shows("node_helpers", "conditioning_set_values", "pillow")
def test_conditionings(tmp_path: Path) -> None:
    from PIL import Image

    import comfy.sampler_helpers as helpers
    import node_helpers
    from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow

    cond = [[torch.ones(1, 2, 3), {"hooks": [1]}]]
    changed = node_helpers.conditioning_set_values(cond, {"hooks": [2], "strength": 0.5}, append=True)
    assert changed[0][1] == {"hooks": [1, 2], "strength": 0.5} and cond[0][1] == {"hooks": [1]}
    (entry,) = helpers.convert_cond([[cond[0][0], {"control": None, "mine": 1}]])
    assert entry["cross_attn"] is cond[0][0] and entry["mine"] == 1 and entry["model_conds"] == {} and "uuid" in entry
    freed = []
    control = SimpleNamespace(
        get_models=lambda: ["net"], inference_memory_requirements=lambda dtype: 5, previous_controlnet=None,
        cleanup=lambda: freed.append("control"), extra_hooks=None,
    )  # fmt: skip
    models, memory = helpers.get_additional_models(
        {"positive": [{"control": control}], "negative": [{}]}, torch.float32
    )
    assert models == ["net"] and memory == 5
    helpers.cleanup_additional_models([control, "plain"])
    assert freed == ["control"]
    assert helpers.prepare_mask(torch.ones(8, 8), (2, 4, 4, 4), CPU).shape[-2:] == (4, 4)
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 60).save(path)
    path.write_bytes(path.read_bytes()[:-600])

    def size(path: Path) -> tuple[int, int]:
        with Image.open(path) as picture:
            return picture.convert("L").size

    assert node_helpers.pillow(size, path) == (64, 64)
    schedule = type("Schedule", (ModelSamplingDiscreteFlow, CONST), {})()
    model = SimpleNamespace(extra_conds=lambda **kwargs: {"seen": sorted(kwargs)}, model_sampling=schedule)
    made = comfy.samplers.process_conds(
        model, torch.zeros(1, 4, 8, 8), {"positive": helpers.convert_cond([[cond[0][0], {}]])}, CPU, seed=3
    )  # fmt: skip
    assert {"noise", "device", "cross_attn"} <= set(made["positive"][0]["model_conds"]["seen"])


@shows("nodes", "ConditioningZeroOut", "ConditioningAverage", "ConditioningConcat", "ConditioningSetTimestepRange",
       "MAX_RESOLUTION", "KSamplerAdvanced", "ControlNetApplyAdvanced")  # fmt: skip
def test_nodes_that_packs_call() -> None:
    import nodes

    one = [[torch.ones(1, 2, 3), {"pooled_output": torch.ones(1, 4)}]]
    other = [[torch.zeros(1, 2, 3), {"pooled_output": torch.zeros(1, 4)}]]
    (zero,) = nodes.ConditioningZeroOut().zero_out(one)
    assert not zero[0][0].any() and not zero[0][1]["pooled_output"].any() and one[0][0].all()
    (mean,) = nodes.ConditioningAverage().addWeighted(one, other, 0.25)
    assert mean[0][0].unique().tolist() == [0.25] and mean[0][1]["pooled_output"].unique().tolist() == [0.25]
    (long,) = nodes.ConditioningConcat().concat(one, other)
    assert long[0][0].shape == (1, 4, 3)
    (part,) = nodes.ConditioningSetTimestepRange().set_range(one, 0.25, 0.5)
    assert (part[0][1]["start_percent"], part[0][1]["end_percent"]) == (0.25, 0.5)
    assert nodes.MAX_RESOLUTION == 16384
    assert nodes.ControlNetApplyAdvanced().apply_controlnet(one, other, None, None, 0.0, 0.0, 1.0) == (one, other)
    assert "noise_seed" in nodes.KSamplerAdvanced.INPUT_TYPES()["required"]


@shows("comfy.cli_args", "args", "LatentPreviewMethod")
@shows("latent_preview", "prepare_callback", "get_previewer")
@shows("comfy.sample", "sample_custom")
def test_previews_follow_the_live_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.latent_formats
    import comfy.sample
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.NoPreviews)
    assert latent_preview.get_previewer(CPU, comfy.latent_formats.SD15()) is None
    for method in (LatentPreviewMethod.Latent2RGB, LatentPreviewMethod.Auto):
        monkeypatch.setattr(args, "preview_method", method)
        previewer = latent_preview.get_previewer(CPU, comfy.latent_formats.SD15())
        kind, picture, _ = previewer.decode_latent_to_preview_image("JPEG", torch.zeros(1, 4, 8, 8))
        assert kind == "JPEG" and picture.size == (8, 8)
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *given, **more: seen.append(given[:2]))
    model = SimpleNamespace(load_device=CPU, model=SimpleNamespace(latent_format=comfy.latent_formats.SD15()))
    latent_preview.prepare_callback(model, 4)(1, torch.zeros(1, 4, 8, 8), None, 4)
    assert seen == [(2, 4)]
    monkeypatch.setattr(comfy.samplers, "sample", lambda *given, **more: torch.full((1, 4, 2, 2), 7.0))
    latent = torch.zeros(1, 4, 2, 2)
    made = comfy.sample.sample_custom(
        SimpleNamespace(load_device=CPU, model_options={}), latent, 3.0, "sampler", "sigmas", [], [], latent, seed=1
    )
    assert made.unique().tolist() == [7.0]


@shows("comfy.model_base", "Anima")
@shows("comfy.sd", "CLIPType.STABLE_DIFFUSION")
@shows("comfy.controlnet", "T2IAdapter", "ControlLora")
@shows("comfy.clip_vision", "ClipVisionModel")
@shows("comfy_extras.nodes_lt", "LTXVAddGuide")
@shows("comfy.ldm.cosmos.predict2", "Attention")
@shows("comfy.ldm.wan.model", "WanI2VCrossAttention", "WanT2VCrossAttention")
def test_what_packs_test_for() -> None:
    """Asked with isinstance, subclassed or wrapped; what is missing says so when it is made or called."""
    comfy.missing.provide_modules()
    from comfy.ldm.cosmos.predict2 import Attention

    from comfy.clip_vision import ClipVisionModel
    from comfy.controlnet import ControlBase, ControlLora, ControlNet, T2IAdapter
    from comfy.ldm.wan.model import WanI2VCrossAttention, WanT2VCrossAttention
    from comfy.model_base import Anima, BaseModel
    from comfy.sd import CLIPType
    from comfy_extras.nodes_lt import LTXVAddGuide, SymmetricPatchifier

    assert issubclass(WanI2VCrossAttention, WanT2VCrossAttention) and CLIPType.STABLE_DIFFUSION.value == 1
    assert issubclass(ControlLora, ControlNet) and issubclass(T2IAdapter, ControlBase)
    nothing: Any = object()
    assert not isinstance(nothing, (Anima, Attention, BaseModel, ClipVisionModel, ControlLora))
    assert callable(ClipVisionModel.encode_image)

    class Mine(LTXVAddGuide):
        pass

    assert Mine.get_latent_index([["", {}]], 4, 1, 9, (8, 32, 32)) == (9, 2)
    for wrong in (SymmetricPatchifier, Attention):
        with pytest.raises(comfy.missing.FeatureMissingError):
            wrong()


@shows("comfy.ldm.lightricks.model", "apply_rotary_emb", "LTXVModel", "precompute_freqs_cis")
@shows("comfy.ldm.lightricks.symmetric_patchifier", "latent_to_pixel_coords")
@shows("comfy.ldm.wan.model", "sinusoidal_embedding_1d")
def test_positions_of_video_models() -> None:
    from comfy.ldm.lightricks import model as ltx
    from comfy.ldm.lightricks.symmetric_patchifier import latent_to_pixel_coords
    from comfy.ldm.wan.model import sinusoidal_embedding_1d

    cells = torch.tensor([[[0, 1, 2], [0, 1, 0], [3, 0, 1]]])
    assert latent_to_pixel_coords(cells, (8, 32, 32)).tolist() == [[[0, 8, 16], [0, 32, 0], [96, 0, 32]]]
    assert latent_to_pixel_coords(cells, (8, 32, 32), causal_fix=True)[0, 0].tolist() == [0, 1, 9]
    dim, heads = 40, 2
    cos, sin = ltx.precompute_freqs_cis(cells.float(), dim, torch.float32)
    x = torch.randn(1, 3, dim)
    turned = ltx.apply_rotary_emb(x, (cos, sin))
    table = ltx.rotary_table(cells.float(), dim, heads, 10000.0, (20, 2048, 2048))
    pairs = x.unflatten(-1, (heads, -1, 2)).transpose(1, 2)
    want = (table @ pairs.unsqueeze(-1)).squeeze(-1).transpose(1, 2).flatten(2)
    torch.testing.assert_close(turned, want)
    assert (cos[..., : dim % 6] == 1).all() and issubclass(ltx.LTXVModel, torch.nn.Module)
    assert ltx.LTXRopeType.from_dict({"rope_type": "split"}) is ltx.LTXRopeType.SPLIT
    wave = sinusoidal_embedding_1d(8, torch.tensor([0.0, 2.0]))
    assert wave.shape == (2, 8) and wave[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


@shows("comfy.sdxl_clip", "SDXLClipG", "SDXLRefinerClipModel")
@shows("comfy.text_encoders.sd3_clip", "SD3ClipModel", "T5XXLModel")
@shows("comfy_extras.nodes_clip_sdxl", "CLIPTextEncodeSDXL", "CLIPTextEncodeSDXLRefiner")
@shows("comfy.sd1_clip", "escape_important", "token_weights", "unescape_important")
def test_prompts_and_encoders() -> None:
    import comfy.sd1_clip as texts
    from comfy.sdxl_clip import SDXLClipG, SDXLClipModel, SDXLRefinerClipModel
    from comfy.text_encoders.sd3_clip import SD3ClipModel, T5XXLModel
    from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL, CLIPTextEncodeSDXLRefiner

    escaped = texts.escape_important(r"a \(plain\) (strong:1.5)")
    weighted = texts.token_weights(escaped, 1.0)
    assert [(texts.unescape_important(text), weight) for text, weight in weighted] == [
        ("a (plain) ", 1.0),
        ("strong", 1.5),
    ]
    assert all(issubclass(kind, texts.SDClipModel) for kind in (SDXLClipG, T5XXLModel))
    assert all(issubclass(kind, torch.nn.Module) for kind in (SDXLClipModel, SDXLRefinerClipModel, SD3ClipModel))
    clip = SimpleNamespace(
        tokenize=lambda text: {"g": [text], "l": [text]},
        encode_from_tokens_scheduled=lambda tokens, add_dict: [[tokens, add_dict]],
    )
    sizes = {"width": 8, "height": 16, "crop_w": 0, "crop_h": 0, "target_width": 8, "target_height": 16}
    ((made,),) = (CLIPTextEncodeSDXL().encode(clip=clip, text_g="a", text_l="b", **sizes)[0],)
    assert made[0] == {"g": ["a"], "l": ["b"]} and made[1] == sizes
    ((made,),) = (CLIPTextEncodeSDXLRefiner().encode(clip=clip, ascore=6.0, width=8, height=16, text="a")[0],)
    assert made[1] == {"aesthetic_score": 6.0, "width": 8, "height": 16}


@shows("comfy_api.latest", "io.Mask", "io.Sigmas")
def test_types_of_v3_nodes() -> None:
    from comfy_api.latest import io

    assert io.Mask.Input("m").get_io_type() == "MASK" and io.Sigmas.Output().get_io_type() == "SIGMAS"
