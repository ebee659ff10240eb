"""Networks in pipeline stages, for tests: as the engine does it, without an engine."""

from __future__ import annotations

import torch

from comfy.ldm import dit
from comfy.taco_dit.core.layout import Layout, stages_by_cost
from comfy.taco_dit.core.plan import ParallelDims
from comfy.taco_dit.parallel.patch_plan import StaleKeys
from comfy.taco_dit.parallel.pipeline_parallel import Links, StagePipeline
from comfy.taco_dit.parallel.ring_parallel import native_plan

from .tiny import inputs, tiny_flux


def call_for(manager, network, stages, ulysses=1, stale=None, rows_independent=True):
    """A denoiser call of a network in `stages` stages, with its tokens over `ulysses` copies."""
    layout = Layout(pipeline_stages=stages_by_cost([block.cost for block in network.block_list()], stages))
    copy = layout.place_of(manager.rank).copy
    plan = None
    if ulysses > 1:
        dims = ParallelDims(ulysses_degree=ulysses)
        plan = native_plan(lambda copies: manager.data.group(layout.ranks_of(copies, manager.rank)), dims, copy)
    links = Links(manager.data.group, layout.stage_group(manager.rank), manager.rank)
    pipeline = StagePipeline(links, layout.pipeline_stages, rows_independent, stale)
    return dit.DenoiserCall(plan, layout=layout, pipeline=pipeline)


def only_own_blocks(network, manager, stages):
    """NaN in the blocks of other stages: whoever uses them is found out."""
    layout = Layout(pipeline_stages=stages_by_cost([block.cost for block in network.block_list()], stages))
    mine = range(*layout.pipeline_stages[layout.place_of(manager.rank).stage])
    for i, block in enumerate(network.block_list()):
        if i not in mine:
            for parameter in block.module.parameters():
                parameter.data.fill_(float("nan"))
    return network


def run(network, call, options=None, **changes):
    values = inputs(7, 9, 7, batch=changes.pop("batch", 1), seed=changes.pop("seed", 1))
    values.update(changes)
    return network(**values, transformer_options=call.within(options or {}))


def deviation(one, many):
    return ((one - many).abs().max() / one.abs().max()).item()


def exact(manager, stages, ulysses):
    """{case: deviation from one rank}."""
    whole, mine = tiny_flux(), only_own_blocks(tiny_flux(), manager, stages)
    out = {}
    references = [torch.randn((1, 16, 4, 6), generator=torch.Generator().manual_seed(5))]
    tokens = 20 + 7 + 6
    cases = {
        "one row": {}, "three rows": {"batch": 3}, "references": {"ref_latents": references},
        "mask": {"ref_latents": references, "attention_mask": torch.randn(
            (tokens, tokens), generator=torch.Generator().manual_seed(6))},
        "residuals": {"batch": 2, "control": {
            "input": [torch.randn((2, 20, 96), generator=torch.Generator().manual_seed(7))],
            "output": [None, torch.randn((2, 20, 96), generator=torch.Generator().manual_seed(8))]}},
    }  # fmt: skip
    for together in (False, True):
        call = call_for(manager, mine, stages, ulysses, rows_independent=not together)
        for name, changes in cases.items():
            with torch.inference_mode():
                out[name, together] = deviation(run(whole, dit.DenoiserCall(), **changes), run(mine, call, **changes))
    return out


def stale(manager, stages, ulysses, patches):
    """PipeFusion over a sequence of slowly changing inputs: deviations by exact calls at the beginning."""
    whole, mine = tiny_flux(), only_own_blocks(tiny_flux(), manager, stages)
    keys = StaleKeys(patches, 1)
    call = call_for(manager, mine, stages, ulysses, keys)
    out = {}
    start = inputs(7, 9, 7, batch=2)["x"]
    for warm_up in (1, 3, 6):
        keys.warm_up = warm_up
        keys.begin_run()
        found = []
        for step in range(6):
            keys.begin_call(1 - step / 6)
            x = start * (1 - 0.02 * step)
            with torch.inference_mode():
                one = run(whole, dit.DenoiserCall(), batch=2, x=x)
                found.append(deviation(one, run(mine, call, batch=2, x=x)))
        out[warm_up] = found, keys.stale_calls
    keys.begin_run()
    for _ in range(4):  # inputs that stay as they are: stale keys are right
        keys.begin_call(0.5)
        with torch.inference_mode():
            unchanged = deviation(run(whole, dit.DenoiserCall()), run(mine, call))
    keys.begin_call(0.9)
    with torch.inference_mode():
        risen = deviation(run(whole, dit.DenoiserCall(), x=-start[:1]), run(mine, call, x=-start[:1]))
    out["unchanged"], out["risen"] = unchanged, risen
    return out
