"""The xDiT nodes: the pictures of the ordinary ones, spread as asked for, and what they say when they cannot be."""

from __future__ import annotations

import pytest

from tests.e2e.compare import furthest
from tests.e2e.workflows import custom_sampling, flux

SETTINGS = {"enable_multi_gpu": True, "parallel_strategy": "Hybrid", "scheduling_strategy": "round_robin"}


def dispatched(prompt, sampler, devices, **settings):
    prompt["load"]["class_type"] = "XDiTCheckpointLoader"
    prompt["load"]["inputs"] |= {**SETTINGS, "gpu_devices": devices, **settings}
    prompt["sample"]["class_type"] = sampler
    prompt["sample"]["inputs"]["dispatcher"] = ["load", 3]
    return prompt


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_pictures_of_ordinary_nodes(serve, ranks):
    devices = ",".join(map(str, range(ranks)))
    for graph, sampler in ((flux, "XDiTKSampler"), (custom_sampling, "XDiTSamplerAdvanced")):
        picture = serve(ranks).pictures(dispatched(graph(seed=320), sampler, devices, parallel_strategy="USP"))
        assert furthest(picture, serve(1).pictures(graph(seed=320))) <= 1
        plan = serve(ranks).json("/taco_dit/status")["last_run"]["plan"]
        assert ("ulysses" in plan or "ring" in plan) == (ranks > 1)


@pytest.mark.parametrize(
    ("settings", "plan", "note"),
    [
        ({"parallel_strategy": "CFG"}, "cfg 2", ""),
        ({"parallel_strategy": "Tensor"}, "replicas 2", "Tensor runs on one GPU: Tensor needs weights"),
        ({"gpu_devices": "0,5"}, "replicas 2", "Hybrid runs on one GPU: gpu_devices names 5"),
        ({"gpu_devices": "0,1,5"}, "cfg 2", "Hybrid runs on all 2 GPUs that there are: gpu_devices names 5"),
        ({"gpu_devices": "0"}, "replicas 2", ""),
    ],
)
def test_what_cannot_be_done_runs_on_one_gpu_and_is_said(serve, settings, plan, note):
    server = serve(2)
    before = server.tail(400).count(note)
    prompt = dispatched(flux(seed=321, cfg=4.5), "MultiGPUSampler", "0,1")
    prompt["load"]["inputs"] |= settings
    picture = server.pictures(prompt)
    assert plan in server.json("/taco_dit/status")["last_run"]["plan"]
    assert not note or server.tail(400).count(note) == before + 1
    assert furthest(picture, serve(1).pictures(flux(seed=321, cfg=4.5))) <= 1
