"""Whole denoiser calls through the engine on several ranks, against the same calls on one."""

from __future__ import annotations

import functools
import logging
import types

import torch

from comfy.denoiser_batch import DenoiserBatch, evaluate_serially
from comfy.ldm import dit
from comfy.ldm.modules import attention as attention_module
from comfy.taco_dit import runtime
from comfy.taco_dit.core.config_manager import ParallelConfig, TacoConfig
from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
from comfy.taco_dit.core.lockstep import RankLockstep
from comfy.taco_dit.core.spread import spread, spread_batch
from comfy.taco_dit.fast.captured_calls import CapturedCalls, evaluate

from .tiny import tiny_flux, tiny_unet


class Model:
    """What the engine and the runner need of a model."""

    def __init__(self):
        self.weight_store = types.SimpleNamespace(
            partly_loaded=False, layout_version=1, multiplies_in=None, rewritten=0
        )
        self.diffusion_model = tiny_flux()
        self.network_runner = None

    def apply_model(self, x, t, context=None, y=None, guidance=None, transformer_options=None):
        network = self.network_runner or self.diffusion_model
        return network(x, t, context=context, y=y, guidance=guidance, transformer_options=transformer_options or {})


def batch(conds, height, width, who, pictures=1, options=None):
    generator = torch.Generator().manual_seed(height * 100 + width)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    rows = conds * pictures
    conditioning = {
        "context": draw(rows, 7, 40), "y": draw(rows, 24), "guidance": torch.full((rows,), 3.5),
        "transformer_options": {} if options is None else options,
    }  # fmt: skip
    return DenoiserBatch(draw(rows, 16, height, width), torch.full((rows,), 0.5), conditioning, who, pictures)


def override(original, q, k, v, heads, **kwargs):
    """Every picture also looks at the first one's values."""
    return original(q, k, v * 0.5 + v[:1] * 0.5, heads, **kwargs)


def replaced(args, extra):
    """A block that takes away the mean over the batch."""
    out = extra["original_block"](args)
    out["img"] = out["img"] - 0.3 * out["img"].mean(dim=0, keepdim=True)
    return out


def by_row(args, extra):
    out = extra["original_block"](args)
    out["img"] = out["img"] - 0.3 * out["img"].mean(dim=1, keepdim=True)
    return out


by_row.rows_independent = True


def wrapper(executor, *args, **kwargs):
    """A wrapper that drops transformer_options, and mixes rows."""
    kwargs.pop("transformer_options", None)
    out = executor(*args[:7], {}, *args[8:], **kwargs)
    return out + 0.1 * out.mean(dim=0, keepdim=True)


OPTIONS = {
    "plain": {},
    "override": {"optimized_attention_override": override},
    "replaced": {"patches_replace": {"dit": {("double_block", 0): replaced}}},
    "patched": {"patches": {"double_block": [lambda args: {"img": args["img"].flip(0), "txt": args["txt"]}]}},
    "wrapped": {"wrappers": {"diffusion_model": {"pack": [wrapper]}}},
    "declared": {"patches_replace": {"dit": {("double_block", 0): by_row}}},
}


def coupled_rows(engine):
    """{case: (plan, deviation from one rank)} for patches that do and do not couple rows."""
    out, model = {}, Model()
    for name, options in OPTIONS.items():
        work = batch(1, 12, 12, [0], 6, options)
        with torch.inference_mode():
            one = evaluate_serially(model, [work], {})[0]
            many = engine.evaluate(model, [work], {})[0]
        out[name] = (engine._plan.dims.describe(), ((one - many).abs().max() / one.abs().max()).item())
    return out


def replaced_parts(engine):
    """The same for what is replaced in the network itself or in modules."""
    out = {}
    before = attention_module.optimized_attention

    def mixing(q, k, v, heads, *args, **kwargs):
        return override(before, q, k, v, heads, *args, **kwargs)

    class Mixed(type(Model().diffusion_model.double_blocks[0])):
        def forward(self, img, txt, vec, pe, **kwargs):
            return super().forward(img - 0.3 * img.mean(dim=0, keepdim=True), txt, vec, pe, **kwargs)

    for name in ("attention", "block"):
        model = Model()
        if name == "block":
            model.diffusion_model.double_blocks[1].__class__ = Mixed
        else:
            attention_module.optimized_attention = mixing
        work = batch(1, 12, 12, [0], 6)
        try:
            with torch.inference_mode():
                one = evaluate_serially(model, [work], {})[0]
                many = engine.evaluate(model, [work], {})[0]
        finally:
            attention_module.optimized_attention = before
        out[name] = (engine._plan.dims.describe(), ((one - many).abs().max() / one.abs().max()).item())
    return out


class Replayed:
    """A captured call that is made again instead."""

    def __init__(self, network, options):
        self._network, self._options = network, options

    def replay(self, call):
        return evaluate(self._network, call, self._options)

    def destroy(self):
        """Nothing is held."""


class CallsOnCpu(CapturedCalls):
    """Captured calls as on CUDA, without graphs."""

    def __init__(self, gather):
        super().__init__(False, True, gather)
        self.device_type, self.kinds = "cpu", 0

    def _capture(self, key, network, call, options, keep):
        self.kinds += 1
        self._graphs[key] = Replayed(network, options)
        return self._graphs[key]


def area_prompts(engine):
    """Whole picture and areas: row groups make different numbers and kinds of calls. Largest deviation."""
    engine.runner = CallsOnCpu(engine.lockstep.gather)
    model, worst = Model(), 0.0
    for _ in range(3):
        batches = [batch(1, 12, 12, [1]), batch(5, 12, 6, [0, 1, 0, 1, 0])]
        with torch.inference_mode():
            one = evaluate_serially(model, batches, {})
            engine.begin_run()
            many = engine.evaluate(model, batches, {})
            engine.end_run()
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(one, many)))
    return engine._plan.dims.describe(), worst, engine.runner.kinds


def spread_items(manager):
    """`spread` gives what a loop gives, in order, and each item is worked on once."""
    done = []

    def work(i):
        done.append(i)
        value = torch.arange(i + 1, dtype=torch.float32) * i
        return value if i % 2 else (value, torch.full((i, 2), i, dtype=torch.int64), torch.tensor([i > 2]))

    counts = []
    for n in (0, 1, 2, 7):
        done.clear()
        results = spread(range(n), work, manager)
        counts.append(len(done))
        for i, result in enumerate(results):
            want = work(i)
            assert isinstance(result, tuple) is isinstance(want, tuple)
            torch.testing.assert_close(result, want, rtol=0, atol=0)
        assert len(results) == n
    return counts


def spread_batches(engine):
    """`spread_batch` gives what one call gives, works on a part of each batch, and waits for nobody in a node alone."""
    before = runtime.active()
    runtime.activate(runtime.Runtime(engine.config, engine.manager, engine.lockstep, engine))
    worked: dict[object, int] = {}

    def work(part):
        worked[what] = worked.get(what, 0) + part.shape[0]
        return part * 2 + 1

    try:
        for what in (1, 2, 5):
            size = what
            batch = torch.arange(size * 6, dtype=torch.float32).view(size, 2, 3)
            assert torch.equal(spread_batch(batch, work), batch * 2 + 1)
        if engine.manager.rank == 0:
            what = "alone"
            with engine.lockstep.alone():
                assert torch.equal(spread_batch(batch, work), batch * 2 + 1)
    finally:
        runtime.activate(before)
    return worked


class UNet(Model):
    """A model with a UNet, whose tokens stay whole."""

    def __init__(self):
        super().__init__()
        self.diffusion_model = tiny_unet()

    def apply_model(self, x, t, context=None, y=None, transformer_options=None):
        network = self.network_runner or self.diffusion_model
        return network(x[:, :4], t * 900, context=context[..., :24], y=y, transformer_options=transformer_options)


def unets(engine):
    """{case: (plan, deviation from one rank)} for prompts, pictures and areas of odd sizes, and a patch that couples rows."""
    patch = {"patches": {"attn1_patch": [lambda n, context, value, extra: (n, context, value.flip(0))]}}
    cases = {
        "prompts": [batch(2, 9, 13, [0, 1])],
        "pictures": [batch(1, 9, 13, [0], 5)],
        "areas": [batch(1, 9, 13, [1]), batch(3, 9, 7, [0, 1, 0])],
        "patched": [batch(2, 9, 13, [0, 1], options=patch)],
    }
    out, model = {}, UNet()
    for name, batches in cases.items():
        for work in batches:
            work.conditioning.pop("guidance")
            work.conditioning["y"] = work.conditioning["y"].repeat(1, 2)
            work.x = work.x[:, :4].contiguous()
        with torch.inference_mode():
            one = evaluate_serially(model, batches, {})
            many = engine.evaluate(model, batches, {})
        worst = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(one, many))
        out[name] = (engine._plan.dims.describe(), worst)
    return out


class Lines(logging.Handler):
    """Messages that were logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def ring_results(manager):
    """Rows and areas on a ring of two: {case: (plan, deviation, ...)}."""
    lockstep = RankLockstep(manager)
    config = TacoConfig(parallel=ParallelConfig(ring_degree=2))
    engine = TACODiTExecutionEngine(config, manager, lockstep)
    lockstep.begin("ring")
    out = {**coupled_rows(engine), "areas": area_prompts(engine)}
    lockstep.end()
    return out


def engine_results(manager):
    """All of the above on one rank of several."""
    lockstep = RankLockstep(manager)
    engine = TACODiTExecutionEngine(TacoConfig(), manager, lockstep)
    lines = Lines()
    logging.getLogger().addHandler(lines)
    out = {"options leak": False}
    for name, run in {
        "coupled": functools.partial(coupled_rows, engine), "replaced": functools.partial(replaced_parts, engine),
        "areas": functools.partial(area_prompts, engine), "spread": functools.partial(spread_items, manager),
        "batches": functools.partial(spread_batches, engine), "unets": functools.partial(unets, engine),
    }.items():  # fmt: skip
        lockstep.begin(name)
        out[name] = run()
        lockstep.end()
    out["options leak"] = any(dit.CALL_KEY in options for options in OPTIONS.values())
    out["lines"] = [line for line in lines.lines if "see one another" in line]
    return out
