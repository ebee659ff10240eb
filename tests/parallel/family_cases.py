"""Sampling with every family on several ranks, against the same on one. See `test_families.py`.

A case is a model and arguments of `draw`; a run is a case under a configuration. The results of one rank are computed
once, by `serial`, and given to all ranks.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from tests.tiny_families import TINY, UNETS, kohya_lora

ALL = {**TINY, **UNETS}


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
    patched = patcher.clone()
    if name in UNETS:
        patched.set_model_attn1_replace(replaced_attention, "middle", 0)
        return patched
    keys = [block.replace_key for block in patcher.model.diffusion_model.block_list() if block.replace_key]
    patched.set_model_patch_replace(replaced, "dit", *keys[-1])
    return patched


def as_it_is(patcher, name):
    """The model."""
    return patcher


OF_THE_WHOLE_VIDEO = ("wan_vace", "wan_s2v", "wan_humo", "wan_animate")
"""Families with inputs that no area of a video can have."""

# {case: (what is done to the model, arguments of `draw`)}; sizes are odd in cells or patches.
CASES = {
    "one picture": (as_it_is, {}),
    "guidance, mask and LoRA": (adapted, {"cfg": 4.0, "height": 5, "mask": True}),
    "replaced block": (with_replaced_block, {"width": 7}),
    "pictures": (as_it_is, {"pictures": 2, "height": 6}),
    "areas": (as_it_is, {"cfg": 4.0, "height": 10, "width": 9, "area": True}),
}


def draw(patcher, tiny, height=9, width=13, cfg=1.0, pictures=1, mask=False, area=False):
    """One step from noise."""
    import comfy.sample

    latent, prompt = tiny.latent(pictures, height, width), tiny.conditioning(1)
    noise_mask = None
    if mask:
        latent = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
        noise_mask = (torch.arange(8 * height * 8 * width).reshape(1, 8 * height, 8 * width) % 5 > 1).float()
    if area:  # another prompt for the lower part, in cells
        frames = latent.shape[2:-2]
        place = (*frames, 6, width, *(0 for _ in frames), height - 6, 0)
        other = tiny.conditioning(3)[0]
        prompt = [*prompt, [other[0], {**other[1], "area": place, "strength": 0.7}]]
    return comfy.sample.sample(
        patcher, comfy.sample.prepare_noise(latent, 3), 1, cfg, "euler", "simple", prompt, tiny.conditioning(2), latent,
        noise_mask=noise_mask, disable_pbar=True, seed=3,
    )  # fmt: skip


@functools.cache
def serial():
    """{(family, case): the latent on one rank}."""
    found = {}
    for name, tiny in ALL.items():
        patcher = load(name)
        for case, (change, arguments) in CASES.items():
            if case == "areas" and name in OF_THE_WHOLE_VIDEO:
                continue
            found[name, case] = draw(change(patcher, name), tiny, **arguments)
    return found


@dataclasses.dataclass(frozen=True)
class Run:
    """A case under a configuration. plan, layout: what is expected to be chosen. families: some of them, else all."""

    case: str
    plan: str
    layout: str = "whole"
    families: tuple[str, ...] = tuple(ALL)

    def configuration(self):
        """Of the program: the layout, and the degrees of sequence parallelism."""
        degrees = dict(part.split() for part in self.plan.split(" x ") if part != "one rank")
        layout = dict(part.split() for part in self.layout.split(" x ") if part != "whole")
        parallel = {f"{kind}_degree": int(degrees.get(kind, 1)) for kind in ("ring", "ulysses")}
        if "spatial" in degrees:
            parallel["spatial_parallel_degree"] = int(degrees["spatial"])
        for kind in ("tensor", "pipeline"):
            if kind in layout:
                parallel |= {f"{kind}_parallel": True, f"{kind}_parallel_degree": int(layout[kind])}
        return {"parallel": parallel}


def compare(manager, runs, wanted):
    """{(run, family): (plan, layout, deviation from one rank)}; wanted: what `serial` gave, by (family, case)."""
    from comfy.taco_dit import runtime
    from comfy.taco_dit.core.config_manager import parse_config, validate_for
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy.taco_dit.core.lockstep import RankLockstep

    lockstep, found = RankLockstep(manager), {}
    for place, run in enumerate(runs):
        config = validate_for(parse_config(run.configuration(), "test"), manager.world_size)
        engine = TACODiTExecutionEngine(config, manager, lockstep)
        runtime.activate(runtime.Runtime(config, manager, lockstep, engine))
        lockstep.begin(f"run {place}")
        change, arguments = CASES[run.case]
        for family in run.families:
            parallel = draw(change(load(family), family), ALL[family], **arguments)
            serial = wanted[family, run.case]
            deviation = ((parallel - serial).abs().max() / serial.abs().max()).item()
            found[run, family] = engine.last_run.plan, engine.last_run.layout, deviation
        lockstep.end()
    return found


def with_residuals(manager):
    """{family: (deviation of a network call with a ControlNet's residuals on shards, what the residuals change)}."""
    return {name: _residuals_of(name, manager) for name in TINY}


def _residuals_of(name, manager):
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
