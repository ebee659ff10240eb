"""Every family with a tiny configuration (`tests.tiny_families`): parallel sampling equals serial sampling.

All families share one set of ranks for each number of ranks. Sizes are odd, so that latents are padded and no number of
ranks divides the tokens.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.tiny_families import TINY, UNETS, kohya_lora

from .ranks import run_ranks

ALL = {**TINY, **UNETS}
TOLERANCE = 1e-5
DOUBLE = {"cfg": 4.0}


def load(name):
    """A family's model, found by what its file holds; a UNet by its configuration."""
    import comfy.sd
    from comfy.taco_dit import TACODiTModelPatcher
    from tests.tiny_models import random_weights

    tiny = ALL[name]
    if name in UNETS:
        model = tiny.model("cpu")
        model.diffusion_model.load_state_dict(random_weights(tiny.shapes(), 1))
        return TACODiTModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    return comfy.sd.load_diffusion_model_state_dict(random_weights(tiny.shapes(), 1), metadata=tiny.metadata)


def adapted(patcher, name):
    """The model with a LoRA on one linear in three of its blocks."""
    import comfy.sd

    lora = kohya_lora(ALL[name])
    out, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 0.5, 0)
    assert len(out.patches) == len(lora) // 3
    return out


def replaced(args, extra):
    """A replaced block whose result depends on all tokens."""
    out = dict(extra["original_block"](args))
    out["img"] = out["img"] - 0.1 * out["img"].mean(dim=1, keepdim=True)
    return out


def replaced_attention(q, k, v, extra):
    """A replaced attention whose result depends on all cells and on nothing of other rows."""
    return q - 0.1 * v.mean(dim=1, keepdim=True)


def with_replaced_block(patcher, name):
    """The model with its last block that can be replaced replaced; of a UNet, an attention."""
    if name in UNETS:
        patched = patcher.clone()
        patched.set_model_attn1_replace(replaced_attention, "middle", 0)
        return patched
    keys = [block.replace_key for block in patcher.model.diffusion_model.block_list() if block.replace_key]
    patched = patcher.clone()
    patched.set_model_patch_replace(replaced, "dit", *keys[-1])
    return patched


def draw(patcher, tiny, height=9, width=13, cfg=1.0, pictures=1, mask=False):
    """Two steps from noise."""
    import comfy.sample

    latent = tiny.latent(pictures, height, width)
    noise_mask = None
    if mask:
        latent = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
        noise_mask = (torch.arange(8 * height * 8 * width).reshape(1, 8 * height, 8 * width) % 5 > 1).float()
    return comfy.sample.sample(
        patcher, comfy.sample.prepare_noise(latent, 3), 2, cfg, "euler", "simple", tiny.conditioning(1),
        tiny.conditioning(2), latent, noise_mask=noise_mask, disable_pbar=True, seed=3,
    )  # fmt: skip


def cases(name):
    """{case: (patcher, arguments of `draw`)} of a family."""
    patcher = load(name)
    return {
        "one picture": (patcher, {}),
        "guidance, mask and LoRA": (adapted(patcher, name), {**DOUBLE, "height": 5, "mask": True}),
        "replaced block": (with_replaced_block(patcher, name), {"width": 7}),
        "pictures": (patcher, {"pictures": 2, "height": 6}),
    }


def with_residuals(name, manager):
    """Deviation of a network call with a ControlNet's residuals on shards, and what the residuals change."""
    from comfy.ldm import dit
    from comfy.taco_dit.core.plan import ParallelDims
    from comfy.taco_dit.parallel.ring_parallel import native_plan

    patcher, tiny = load(name), TINY[name]
    network = patcher.model.diffusion_model
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(tiny.latent(1, 9, 13).shape, generator=generator)
    fields = tiny.conditioning(1)[0]
    conds = patcher.model.extra_conds(**{"cross_attn": fields[0], **fields[1]}, noise=x, device=x.device)
    values = {key: value.cond for key, value in conds.items()}
    values["context"] = values.pop("c_crossattn")
    concat = values.pop("c_concat", None)
    x = x if concat is None else torch.cat((x, concat), dim=1)
    count, tokens = len(network.block_list()), 5 * 7 * (tiny.frames or 1)
    residuals = [torch.randn((1, tokens, network.hidden_size), generator=generator) for _ in range(count // 2)]
    control = {"input": list(residuals), "output": list(residuals)}

    def run(call, control):
        options = call.within({}) if call.plan is not None else {}
        with torch.inference_mode():
            return network(x, torch.tensor([0.5]), control=control, transformer_options=options, **values)

    plan = native_plan(manager.data.group, ParallelDims(ulysses_degree=manager.world_size), manager.rank)
    serial, plain = run(dit.DenoiserCall(), control), run(dit.DenoiserCall(), None)
    parallel = run(dit.DenoiserCall(plan), control)
    largest = serial.abs().max()
    return ((parallel - serial).abs().max() / largest).item(), ((serial - plain).abs().max() / largest).item()


def serial_and_parallel(manager, plans):
    """{(family, case, ring degree): (plan, deviation from one rank)}, and on two ranks what residuals do.

    plans: {ring degree: {case: expected plan}}; the cases are those named there.
    """
    from comfy.taco_dit import runtime
    from comfy.taco_dit.core.config_manager import ParallelConfig, TacoConfig
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy.taco_dit.core.lockstep import RankLockstep

    lockstep = RankLockstep(manager)
    engine = TACODiTExecutionEngine(TacoConfig(), manager, lockstep)
    runtime.activate(runtime.Runtime(TacoConfig(), manager, lockstep, engine))
    found, residuals = {}, {}
    lockstep.begin("families")
    for family, tiny in ALL.items():
        for case, (patcher, arguments) in cases(family).items():
            rings = [ring for ring, wanted in plans.items() if case in wanted]
            if not rings:
                continue
            patcher.taco_parallel = dataclasses.replace(ParallelConfig(), enabled=False)
            serial = draw(patcher, tiny, **arguments)
            for ring in rings:
                degrees = dict(part.split() for part in plan_of(family, plans[ring][case]).split(" x "))
                ulysses = int(degrees.get("ulysses", 1))
                patcher.taco_parallel = dataclasses.replace(ParallelConfig(), ring_degree=ring, ulysses_degree=ulysses)
                parallel = draw(patcher, tiny, **arguments)
                deviation = ((parallel - serial).abs().max() / serial.abs().max()).item()
                found[family, case, ring] = engine.last_run.plan, deviation
        if manager.world_size == 2 and family in TINY:
            residuals[family] = with_residuals(family, manager)
    lockstep.end()
    return found, residuals


PLANS = {
    2: {
        1: {
            "one picture": "ulysses 2", "guidance, mask and LoRA": "cfg 2", "replaced block": "ulysses 2",
            "pictures": "data 2",
        },
        2: {"guidance, mask and LoRA": "ring 2"},
    },
    3: {1: {"guidance, mask and LoRA": "ulysses 3"}},
    4: {1: {"guidance, mask and LoRA": "cfg 2 x ulysses 2"}},
}  # fmt: skip
# UNets have their rows dealt and their cells whole: where others share tokens, their ranks repeat the call.
AS_UNET = {
    "ulysses 2": "replicas 2", "ulysses 3": "replicas 3", "cfg 2 x ulysses 2": "cfg 2 x replicas 2", "ring 2": "cfg 2",
}  # fmt: skip


def plan_of(family, wanted):
    """What a family gets where others get the plan `wanted`."""
    return AS_UNET.get(wanted, wanted) if family in UNETS else wanted


@pytest.mark.parametrize("world", PLANS)
def test_parallel_equals_serial(world):
    for found, residuals in run_ranks(world, serial_and_parallel, PLANS[world]):
        wrong = {key: value for key, value in found.items() if not value[1] < TOLERANCE}
        assert not wrong
        assert {family for family, _, _ in found} == set(ALL)
        for (family, case, ring), (plan, _) in found.items():
            assert plan == plan_of(family, PLANS[world][ring][case]), (family, case)
        if world == 2:
            assert all(deviation < TOLERANCE for deviation, _ in residuals.values()), residuals
            taking = {family for family, (_, change) in residuals.items() if change > 1e-3}
            assert {"flux", "sd3", "sd35_medium", "hunyuan_dit", "chroma", "hunyuan_video", "qwen_image"} <= taking
