"""Flux and text encoders with layouts given by an engine, and what may be done to their weights, on several ranks."""

from __future__ import annotations

import dataclasses

import torch

import comfy.hooks
import comfy.model_management as management
from comfy import accounting, ops
from comfy.denoiser_batch import evaluate_serially
from comfy.ldm import dit
from comfy.model_patcher import ModelPatcher
from comfy.taco_dit import runtime
from comfy.taco_dit.core.config_manager import ParallelConfig, parse_config, validate_for
from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
from comfy.taco_dit.core.layout import Layout, Placement
from comfy.taco_dit.core.lockstep import RankLockstep
from comfy.taco_dit.core.plan import ParallelDims

from .cache_cases import Denoiser
from .engine_cases import CallsOnCpu, batch
from .test_flux_tokens import CASES
from .tiny import inputs, tiny_flux

CPU = torch.device("cpu")


class Model(torch.nn.Module):
    """What patcher and engine need of a model."""

    network_runner = None

    def __init__(self, **changes):
        super().__init__()
        self.diffusion_model = tiny_flux(**changes)

    def apply_model(self, x, t, context=None, y=None, guidance=None, transformer_options=None):
        options = transformer_options or {}
        network = self.network_runner or self.diffusion_model
        return network(x, t, context=context, y=y, guidance=guidance, transformer_options=options)


def lora(key, shape, seed):
    """A difference of a whole weight that is another for each entry."""
    return {key: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05,))}


def adapted(patcher, strength):
    """A clone with an adapter of several kinds of layers, biases included."""
    clone = patcher.clone()
    for i, (name, shape) in enumerate([
        ("double_blocks.0.img_attn.qkv.weight", (288, 96)), ("double_blocks.1.txt_mlp.2.weight", (96, 384)),
        ("single_blocks.1.linear1.weight", (672, 96)), ("single_blocks.2.linear2.weight", (96, 480)),
        ("single_blocks.0.linear2.bias", (96,)), ("double_blocks.1.img_mod.lin.weight", (576, 96)),
    ]):  # fmt: skip
        clone.add_patches(lora(f"diffusion_model.{name}", shape, i), strength)
    return clone


def own_arithmetic(network):
    """Replaced blocks that use layers of the blocks they replace by themselves, on whole tokens."""

    def double(args, extra):
        block = network.double_blocks[0]
        img = args["img"] + 0.1 * block.img_attn.proj(block.img_attn.qkv(args["img"])[..., :96])
        return extra["original_block"]({**args, "img": img + 0.1 * block.img_mlp(args["img"])})

    def single(args, extra):
        block = network.single_blocks[1]
        hidden = block.linear1(args["img"])
        shift, _ = block.modulation(args["vec"])
        out = block.linear2(torch.cat((hidden[..., :96], hidden[..., 288:].tanh()), dim=-1))
        return {"img": args["img"] + out * shift.gate}

    return {"patches_replace": {"dit": {("double_block", 0): double, ("single_block", 1): single}}}


def deviation(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def evaluated(model, engine=None, options=None):
    """The prediction of a call, through the engine of several ranks or serially."""
    work = batch(2, 10, 14, [0, 1], 1, options)
    with torch.inference_mode():
        return (evaluate_serially(model, [work], {}) if engine is None else engine.evaluate(model, [work], {}))[0]


def hook_of(patcher):
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)
    hook.weights = lora("diffusion_model.single_blocks.1.linear2.weight", (96, 480), 20)
    group = comfy.hooks.HookGroup()
    group.add(hook)
    patcher.add_hook_patches(hook, hook.weights, 0.5)
    return group


def weights_change(engine):
    """{change: deviation} of adapters that come, go and change, hooks, and foreign arithmetic, in this order."""
    whole, parts, found = ModelPatcher(Model(), CPU, CPU), ModelPatcher(Model(), CPU, CPU), {}

    def compare(name, options=lambda network: None):
        a, b = (p.model for p in (whole, parts))
        serial = evaluated(a, None, options(a.diffusion_model))
        found[name] = deviation(evaluated(b, engine, options(b.diffusion_model)), serial)

    def load(change=lambda patcher: patcher):
        for each, loading in ((change(whole), _load_whole), (change(parts), management.load_models_gpu)):
            loading([each])

    parts.weight_store.always_copy = True  # as on a GPU
    load()
    compare("plain")
    versions = parts.weight_store.layout_version
    for strength in (0.5, 1.0):
        load(lambda patcher, strength=strength: adapted(patcher, strength))
        compare(f"adapter {strength}")
    hooked = [adapted(patcher, 1.0) for patcher in (whole, parts)]
    _load_whole([hooked[0]])
    management.load_models_gpu([hooked[1]])
    for each in hooked:
        each.patch_hooks(hook_of(each))
    compare("hook on an adapter")
    for each in hooked:
        each.patch_hooks(None)
    compare("hook off")
    load()
    compare("adapter off")
    assert parts.weight_store.layout_version == versions, "values are written into the memory that is there"
    compare("own arithmetic", options=own_arithmetic)
    return found


def _load_whole(patchers):
    for patcher in patchers:
        patcher.patch_model(CPU)


def bytes_held(engine, depth=12, singles=24):
    """(bytes of blocks that this rank has on its device, bytes of the whole blocks)."""
    patcher = ModelPatcher(Model(depth=depth, depth_single_blocks=singles), CPU, CPU)
    blocks = [block.module for block in patcher.model.diffusion_model.block_list()]
    whole = sum(p.nbytes for block in blocks for p in block.parameters())
    size, total = patcher.model_size(), management.module_size(patcher.model)
    assert size == total
    management.load_models_gpu([patcher])
    evaluated(patcher.model, engine)
    weights = patcher.weight_store.arrangement.weights
    buffers = sum(buffer.nbytes for buffer in getattr(weights, "_buffers", []))
    absent = {key for key, weight in patcher.weight_store.weights.items() if weight.absent}
    held = buffers + sum(
        p.nbytes for key, p in patcher.model.named_parameters() if "_blocks." in key and key not in absent
    )
    assert patcher.loaded_size() == patcher.model_size() == held + total - whole
    patcher.detach()
    assert not getattr(weights, "_buffers", []) and patcher.loaded_size() == 0
    return held, whole


def scaled_fp8(engine, precision="bf16"):
    """Deviation of a network whose linears are stored in fp8 with a scale, with an adapter."""
    patchers = []
    for loading in (_load_whole, management.load_models_gpu):
        operations = ops.scaled_fp8_ops()
        patcher = ModelPatcher(Model(operations=operations), CPU, CPU)
        patcher.weight_store.linear_precision = precision
        for module in patcher.model.modules():
            if isinstance(module, operations.Linear):
                scale = module.weight.abs().max() / 448
                module.scale_weight.data.copy_(scale)
                module.weight = torch.nn.Parameter((module.weight.data / scale).to(torch.float8_e4m3fn), False)
        patchers.append(adapted(patcher, 1.0))
        loading([patchers[-1]])
    whole, parts = patchers
    return deviation(evaluated(parts.model, engine), evaluated(whole.model))


def scaled_fp8_multiplied(engine):
    """The same, multiplied in fp8."""
    return scaled_fp8(engine, "fp8")


def eight_bit(engine):
    """{(format, adapter's strength or hook): (deviation of whole weights in eight bits from full precision, of parts, of
    one from the other)}, and whether a rank has on its device what it says it needs."""
    full, found, sizes = ModelPatcher(Model(), CPU, CPU), {}, []
    for precision in ("fp8", "int8"):
        whole, parts = ModelPatcher(Model(), CPU, CPU), ModelPatcher(Model(), CPU, CPU)
        whole.weight_store.linear_precision = parts.weight_store.linear_precision = precision
        versions = set()
        for name, strength in (("0.5", 0.5), ("hook", 0.5), ("off", 0.0)):
            patchers = [adapted(each, strength) if strength else each for each in (full, whole, parts)]
            _load_whole(patchers[:2])
            management.load_models_gpu(patchers[2:])
            versions.add(parts.weight_store.layout_version)
            for each in patchers if name == "hook" else ():
                each.patch_hooks(hook_of(each))
            exact, one, many = (evaluated(each.model, engine if each is patchers[2] else None) for each in patchers)
            for each in patchers if name == "hook" else ():
                each.patch_hooks(None)
            found[precision, name] = deviation(one, exact), deviation(many, exact), deviation(many, one)
        sizes.append(parts.loaded_size() == parts.model_size())
    return found, all(sizes)


def cached(engine):
    """(deviation of a run with the step cache from the same on one rank, decisions here and there, whether a layout whose
    ranks compute the same blocks may use it)."""
    parts = ModelPatcher(Model(), CPU, CPU)
    management.load_models_gpu([parts])
    many = Denoiser(engine, parts.model, 1).run("euler")
    settings = dataclasses.replace(engine.config, parallel=ParallelConfig(enabled=False))
    alone = TACODiTExecutionEngine(settings, engine.manager, engine.lockstep)
    one = Denoiser(alone, ModelPatcher(Model(), CPU, CPU).model, 1).run("euler")
    refused = engine._may_reuse(Layout(Placement.SHARDED), None)
    return deviation(many, one), engine.step_cache.steps, alone.step_cache.steps, refused


def unequal_rows(engine):
    """Deviation of a call whose row groups would call the network unequally often: whole picture and areas."""
    whole, parts = ModelPatcher(Model(), CPU, CPU), ModelPatcher(Model(), CPU, CPU)
    management.load_models_gpu([parts])
    worst = 0.0
    for _ in range(2):
        batches = [batch(1, 12, 12, [1]), batch(1, 12, 6, [0]), batch(1, 6, 6, [0])]
        with torch.inference_mode():
            one, many = evaluate_serially(whole.model, batches, {}), engine.evaluate(parts.model, batches, {})
        worst = max(worst, *(deviation(b, a) for a, b in zip(one, many)))
    return worst


def text_encoder(engine):
    """(deviation of features, bytes of T5's blocks held, bytes of the whole blocks)."""
    from tests.text.test_clip_object import encode, flux

    texts, active = ["a fox", "two (green:1.2) bottles"], runtime.active()
    runtime.activate(None)
    serial = [encode(flux(), text)[0] for text in texts]
    runtime.activate(active)
    clip = flux()
    blocks = clip.cond_stage_model.t5xxl.transformer.encoder.block
    whole = sum(p.nbytes for p in blocks.parameters())
    worst = max(deviation(encode(clip, text)[0], want) for text, want in zip(texts, serial))
    return worst, sum(p.nbytes for p in blocks.parameters()), whole


def flux_cases(engine):
    """{case: deviation} of what custom nodes do to Flux, on all ranks' tokens by Ulysses."""
    found = {}
    for case in CASES:
        patcher = ModelPatcher(Model(), CPU, CPU)
        management.load_models_gpu([patcher])
        layout = engine.arranger.layout_of(patcher.model)
        dims = ParallelDims(ulysses_degree=layout.copies(engine.manager.world_size))
        call = dit.DenoiserCall(engine.token_plan(dims, layout))
        with torch.inference_mode():
            serial = case(tiny_flux(), inputs(9, 13, 11), {})
            with dit.fallback_call(call):
                parallel = case(patcher.model.diffusion_model, inputs(9, 13, 11), call.within({}))
        found[case.__name__] = deviation(parallel, serial)
    return found


def captured(engine):
    """(worst deviation, kinds of calls captured, calls replayed) in several runs, with an adapter that comes."""
    engine.runner = CallsOnCpu(engine.lockstep.gather)
    whole, parts = ModelPatcher(Model(), CPU, CPU), ModelPatcher(Model(), CPU, CPU)
    parts.weight_store.always_copy = True
    accounting.begin("captured")
    worst = 0.0
    for strength in (0.0, 0.0, 0.5):
        management.load_models_gpu([adapted(parts, strength)])
        _load_whole([adapted(whole, strength)])
        engine.begin_run()
        for _ in range(2):
            worst = max(worst, deviation(evaluated(parts.model, engine), evaluated(whole.model)))
        engine.end_run()
    return worst, engine.runner.kinds, accounting.current().counts.get("calls_replayed", 0)


def replaced_layers(engine):
    """What is said when a node replaces a layer that is cut, wraps a weight at use, or saves the weights."""
    said = []
    for change in ("layer", "wrapper"):
        patcher = ModelPatcher(Model(), CPU, CPU)
        if change == "layer":
            patcher.add_object_patch("diffusion_model.double_blocks.0.img_attn.qkv", torch.nn.Linear(96, 288))
        else:
            patcher.add_weight_wrapper("diffusion_model.single_blocks.0.linear1.weight", lambda weight: weight)
        try:
            management.load_models_gpu([patcher])
            engine.begin_run()
            evaluated(patcher.model, engine)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    patcher = adapted(ModelPatcher(Model(), CPU, CPU), 0.5)
    management.load_models_gpu([patcher])
    management.load_models_gpu([patcher], force_patch_weights=True)
    other = adapted(ModelPatcher(Model(), CPU, CPU), 0.5)
    other.patch_model(CPU)
    saved, wanted = patcher.model.state_dict(), other.model.state_dict()
    said.append(all(torch.equal(saved[key], value) for key, value in wanted.items()))
    return said


def arranged(manager, configs, names):
    """{configuration: {case: result}} of some of the cases above."""
    lockstep, found = RankLockstep(manager), {}
    for key, content in configs.items():
        config = validate_for(parse_config(content, key), manager.world_size)
        engine = TACODiTExecutionEngine(config, manager, lockstep)
        runtime.activate(runtime.Runtime(config, manager, lockstep, engine))
        lockstep.begin(key)
        found[key] = {name: globals()[name](engine) for name in names}
        found[key]["status"] = engine.status()["layout"]
        lockstep.end()
    return found
