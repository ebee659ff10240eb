"""Predicted times against what was measured (docs/benchmarks.md), and plans for machines that are not there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import comfy.ops
from comfy.families.flux import FAMILY
from comfy.taco_dit.core import hardware
from comfy.taco_dit.core.config_manager import ParallelConfig
from comfy.taco_dit.core.costs import estimate, memory, pipefusion_ms
from comfy.taco_dit.core.degrees import ParallelDims, Workload
from comfy.taco_dit.core.layout import Layout, Placement
from comfy.taco_dit.core.layout_choice import KEYS, weigh_layouts
from comfy.taco_dit.core.machine_profile import DeviceRates, Link, MachineProfile, assumed, rate_at
from comfy.taco_dit.core.network_cost import EIGHT_BIT_RATES, KNOWN, of_network, transformer
from comfy.taco_dit.core.plan import Plan, choose_plan
from tests.made_up.network import Pebble

FLUX, TEXT = KNOWN["flux-dev"]
WORK = Workload(1, 1, 4096 + TEXT, 24, 3072)


def machine(count: int, gpu: str = "h100", link: str = "nvlink", **hosts: float) -> MachineProfile:
    return hardware.profile([gpu] * count, link, **hosts)


def plan(profile: MachineProfile, config: ParallelConfig | None = None, **changes: object) -> Plan:
    work = dataclasses.replace(WORK, **changes)
    return choose_plan(config or ParallelConfig(), work, len(profile.devices), profile=profile, network=FLUX)


@pytest.mark.parametrize(
    ("gpu", "ranks", "config", "changes", "measured"),
    [
        ("h100", 1, {}, {}, 121.4),
        ("h100", 2, {}, {}, 77.2),
        ("h100", 2, {"ring_degree": 2, "ulysses_degree": 1}, {}, 79.8),
        ("h200", 1, {}, {}, 128.1),
        ("h200", 2, {}, {}, 77.8),
        ("h200", 4, {}, {}, 44.6),
        ("h100", 2, {}, {"conds": 2}, 124.0),
    ],
)
def test_predictions_are_within_15_percent_of_what_was_measured(gpu, ranks, config, changes, measured):
    predicted = plan(machine(ranks, gpu), ParallelConfig(**config), **changes).predicted_ms
    assert predicted == pytest.approx(measured, rel=0.15)


def test_weights_that_are_streamed_bound_a_step():
    # measured: 11.6 GB streamed in each step of 232 ms (docs/benchmarks.md, "A network that does not fit")
    profile = machine(1)
    found = estimate(FLUX, WORK, ParallelDims(), profile, Layout(Placement.OFFLOADED), streamed=11.6e9)
    assert found.total == pytest.approx(232, rel=0.15)


def test_a_known_model_is_what_its_network_says():
    config = {
        "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096,
        "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
        "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
    }  # fmt: skip
    network = FAMILY.network_class()(
        **config, dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init
    )
    read = of_network(network)
    for field in ("hidden", "heads", "head_size", "blocks", "sums"):
        assert getattr(read, field) == getattr(FLUX, field), field
    assert read.block_bytes == pytest.approx(FLUX.block_bytes, rel=0.2), "modulations are not the same in all blocks"
    for field in ("linear_flops", "once_bytes", "weight_bytes", "tensor_bytes"):
        assert getattr(read, field) == pytest.approx(getattr(FLUX, field), rel=0.02), field


def test_networks_of_other_kinds_are_described():
    pebble = of_network(Pebble(device="meta", dtype=torch.float32))
    assert pebble.blocks > 0 and pebble.linear_flops > 0 and not pebble.unet
    convolutional = torch.nn.Sequential(torch.nn.Conv2d(4, 320, 3), torch.nn.Conv2d(320, 4, 3))
    weights = sum(p.numel() for p in convolutional.parameters())
    found = of_network(convolutional)
    assert found.unet and found.weight_bytes == 4 * weights and found.linear_flops == 2 * weights / 16


def test_published_sizes_of_known_models():
    billions = {name: network.weight_bytes / 2e9 for name, (network, _) in KNOWN.items()}
    assert billions == pytest.approx({"flux-dev": 11.9, "flux-schnell": 11.9, "sd3-medium": 2.05, "sd3.5-large": 8.1,
                                      "qwen-image": 20.4, "wan-14b": 14.3}, rel=0.03)  # fmt: skip
    wan, _ = KNOWN["wan-14b"]
    tera_flop = (75600 * wan.linear_flops + 4 * 75600**2 * wan.inner * wan.blocks) / 1e12
    assert tera_flop == pytest.approx(6523, rel=0.02)


# --- plans for machines that are not there ---------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize(("conds", "pictures"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_more_gpus_joined_by_nvlink_are_faster_and_all_are_used(ranks, conds, pictures):
    found = plan(machine(ranks), conds=conds, pictures=pictures)
    alone = plan(machine(1), conds=conds, pictures=pictures)
    assert found.dims.replicas == 1
    assert found.predicted_ms < alone.predicted_ms / ranks**0.55 or ranks == 1


def test_slow_links_prefer_what_exchanges_least():
    assert plan(machine(2, "4090", "pcie3"), conds=2).dims.describe() == "cfg 2"
    assert plan(machine(4, "4090", "pcie3"), pictures=4).dims.describe() == "data 4"
    many = plan(machine(2, "3090", "pcie3"))
    assert many.dims.describe() == "ulysses 2", "a slow GPU has time to exchange"
    fast = plan(machine(2, "h100", "pcie3"))
    assert fast.dims.describe() == "replicas 2" and "exchanging would take longer than it saves" in fast.reason
    assert plan(machine(2, "h100", "pcie5")).dims.describe() == "ulysses 2"


@pytest.mark.parametrize(("gbits", "conds", "expected"), [
    (10, 1, "ulysses 8 x replicas 2"), (100, 1, "ulysses 8 x replicas 2"), (10, 2, "cfg 2 x ulysses 8"),
    (100, 2, "cfg 2 x ulysses 8"), (400, 2, "cfg 2 x ulysses 8"),
])  # fmt: skip
def test_little_goes_between_hosts(gbits, conds, expected):
    found = plan(machine(16, ranks_per_host=8, network_gbits=gbits), conds=conds)
    assert found.dims.describe() == expected


def test_heads_are_exchanged_within_pairs_that_have_a_bridge():
    near, far = Link(42.0, 20.0), Link(5.0, 40.0)
    links = tuple(tuple(near if a // 2 == b // 2 else far for b in range(4)) for a in range(4))
    profile = dataclasses.replace(machine(4, "3090"), links=links)
    assert plan(profile, conds=2).dims.describe() == "cfg 2 x ulysses 2"


def test_the_slowest_of_mixed_cards_counts():
    mixed = hardware.profile(["4090", "3090"], "pcie4")
    slow, fast = (hardware.profile([gpu] * 2, "pcie4") for gpu in ("3090", "4090"))
    assert plan(mixed).predicted.compute == pytest.approx(plan(slow).predicted.compute)
    assert plan(mixed).predicted_ms > plan(fast).predicted_ms


def test_a_ring_comes_where_it_gains_and_says_why():
    uneven = choose_plan(ParallelConfig(), Workload(1, 1, 75600, 9, 1152), 8, profile=machine(8),
                         network=transformer("nine heads", 1152, 9, 30))  # fmt: skip
    assert uneven.dims.ring_degree > 1 and "heads do not divide evenly" in uneven.reason
    assert plan(machine(8), ParallelConfig(ring_degree=1)).dims.describe() == "ulysses 8"


def test_what_is_impossible_says_why():
    impossible = {c.plan: c.impossible for c in plan(machine(4)).considered if c.impossible}
    assert impossible == {"cfg 4": "a call has 1 conditioning", "data 4": "a call has 1 picture"}
    off = plan(machine(2), ParallelConfig(sequence_parallel=False), conds=2).considered
    assert {c.plan: c.impossible for c in off if c.impossible}["ulysses 2"] == "parallel.sequence_parallel is false"
    whole = plan(machine(2), tokens_split=False).considered
    assert {c.plan: c.impossible for c in whole if c.impossible}["ring 2"].startswith(
        "this network cannot run on a part"
    )


def test_plans_depend_on_nothing_but_their_arguments():
    profile = machine(6, "4090", "pcie4")
    copy = MachineProfile.from_dict(profile.as_dict())
    assert copy == profile and plan(copy) == plan(profile)
    with pytest.raises(ValueError, match="the profile is of 6 ranks, not 2"):
        choose_plan(ParallelConfig(), WORK, 2, profile=profile)


def test_assumed_numbers_predict_no_time():
    found = choose_plan(ParallelConfig(), WORK, 2)
    assert found.predicted_ms is None and not assumed(2).measured
    assert found.considered[0].relative_time == pytest.approx(0.55, abs=0.05)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_memory_of_layouts():
    whole = memory(FLUX, WORK, ParallelDims(ulysses_degree=4)).weights
    assert whole == FLUX.weight_bytes
    quarter = memory(FLUX, WORK, ParallelDims(ulysses_degree=4), Layout(Placement.SHARDED)).weights
    assert quarter == pytest.approx(whole / 4 + 2 * FLUX.block_bytes)
    stages = tuple((i * 57 // 2, (i + 1) * 57 // 2) for i in range(2))
    assert memory(FLUX, WORK, ParallelDims(), Layout(pipeline_stages=stages)).weights == pytest.approx(
        whole / 2, rel=0.03
    )
    halves = memory(FLUX, WORK, ParallelDims(), Layout(tensor_degree=2)).weights
    assert halves == pytest.approx(whole - FLUX.tensor_bytes / 2)


def test_times_of_layouts():
    profile, dims = machine(2), ParallelDims()
    tensor = estimate(FLUX, WORK, dims, profile, Layout(tensor_degree=2))
    assert tensor.exchange > estimate(FLUX, WORK, ParallelDims(ulysses_degree=2), profile).exchange
    two = Layout(pipeline_stages=((0, 28), (28, 57)))
    one_row = estimate(FLUX, WORK, dims, profile, two)
    assert one_row.total > estimate(FLUX, WORK, dims, machine(1)).total, "one row in a pipeline gains nothing"
    rows = dataclasses.replace(WORK, conds=2, pictures=4)
    filled = estimate(FLUX, rows, dims, profile, two)
    assert filled.waiting == pytest.approx(filled.compute / 8)
    sharded = Layout(Placement.SHARDED)
    plain = estimate(FLUX, WORK, ParallelDims(ulysses_degree=2), profile, sharded)
    beside = estimate(FLUX, WORK, ParallelDims(ulysses_degree=2), dataclasses.replace(profile, overlap=1.0), sharded)
    assert plain.weights > 0 and beside.weights == 0 and beside.exchange == 0, "copy engines hide it"
    assert pipefusion_ms(FLUX, WORK, 2, profile) < 75


def test_layouts_that_this_version_cannot_run_are_not_chosen(monkeypatch):
    huge = dataclasses.replace(FLUX, weight_bytes=64e9, tensor_bytes=60e9)
    profile = machine(2)
    found = weigh_layouts(ParallelConfig(), huge, WORK, profile)
    assert found[0].name == "whole"
    larger = dataclasses.replace(huge, weight_bytes=90e9, tensor_bytes=85e9)
    monkeypatch.setattr("comfy.taco_dit.core.layout_choice.can_run", lambda key: False)
    found = weigh_layouts(ParallelConfig(), larger, WORK, profile)
    assert found[0].name == "offloaded" and found[0].predicted.weights > 0
    assert {one.objection for one in found if "tensor" in one.name} == {"not in this version"}
    monkeypatch.setattr("comfy.taco_dit.core.layout_choice.can_run", lambda key: key == KEYS["tensor"])
    found = weigh_layouts(ParallelConfig(), larger, WORK, profile)
    assert "tensor 2" in found[0].name and not found[0].objection
    assert "needs" in next(one for one in found if one.name == "whole").objection
    assert "lossy" in next(one for one in found if "pipefusion" in one.name).objection


def test_rates_between_and_beyond_measured_sizes():
    points = ((1000, 100.0), (4000, 200.0))
    assert rate_at(points, 250) == 50 and rate_at(points, 2000) == pytest.approx(150) and rate_at(points, 9000) == 200
    with pytest.raises(ValueError, match="matrix needs ascending sizes"):
        DeviceRates("x", ((2, 1.0), (1, 1.0)), points, 1.0)
    with pytest.raises(ValueError, match="2 devices need a square table"):
        MachineProfile(machine(2).devices, (), 1.0, 1.0)
    with pytest.raises(ValueError, match="GPU 'h101' is not known; known: h200, h100"):
        hardware.profile(["h101"])


SDXL = dataclasses.replace(
    KNOWN["flux-dev"][0], name="SDXL", hidden=320, heads=5, head_size=64, blocks=16, linear_flops=2 * 2.57e9 / 16,
    once_bytes=0, weight_bytes=5.1e9, unet=True, row_layers=115, attentions=70, keys=70 * 2 * 1200,
)  # fmt: skip
CELLS = Workload(1, 1, 128 * 128 + 77, 5, 320, tokens_split=False, picture_rows=128)


def unet(profile: MachineProfile, config: ParallelConfig | None = None, **changes: object) -> Plan:
    work = dataclasses.replace(CELLS, **changes)
    return choose_plan(config or ParallelConfig(), work, len(profile.devices), profile=profile, network=SDXL)


def test_rows_of_a_unet_are_shared_where_it_gains():
    assert unet(machine(2)).dims.describe() == "spatial 2"
    assert unet(machine(3), conds=2).dims.describe() == "spatial 3"
    assert unet(machine(2), conds=2).dims.describe() == "cfg 2"
    assert unet(machine(4), conds=2).dims.describe() == "cfg 2 x spatial 2"
    assert "128 rows of a picture on 3 ranks" in unet(machine(3), conds=2).reason
    slow = unet(machine(2, link="pcie3"))
    assert slow.dims.describe() == "replicas 2" and "exchanging would take longer" in slow.reason
    assert unet(machine(2), tokens=32 * 32 + 77, picture_rows=32).dims.describe() == "replicas 2"
    assert unet(machine(2), picture_rows=0).dims.describe() == "replicas 2", "a pack needs whole pictures"
    assert unet(machine(2), ParallelConfig(spatial_parallel=False)).dims.describe() == "replicas 2"
    fixed = ParallelConfig(spatial_parallel_degree=2)
    assert unet(machine(2, link="pcie3"), fixed).dims.describe() == "spatial 2"
    assert unet(machine(4), fixed).dims.spatial_degree == 2
    assert unet(machine(2), ParallelConfig(spatial_parallel_degree=1)).dims.describe() == "replicas 2"


def test_linears_in_eight_bits_and_step_caches_are_known():
    profile = machine(1, "h200")

    def predicted(**changes: float) -> float:
        network = dataclasses.replace(FLUX, **changes)
        return estimate(network, WORK, ParallelDims(), profile).total

    assert predicted(linear_rate=EIGHT_BIT_RATES["fp8"]) == pytest.approx(90.2, rel=0.15)  # docs/benchmarks.md
    assert predicted(linear_rate=EIGHT_BIT_RATES["int8"]) == pytest.approx(206.9, rel=0.15)
    assert predicted(reused=0.5) == pytest.approx(predicted() * (1 - 0.5 * 56 / 57))


def test_norms_over_all_heads_cost_a_sum():
    network = dataclasses.replace(KNOWN["wan-14b"][0])
    work, layout = Workload(1, 1, 32760, 40, 5120), Layout(tensor_degree=2)
    plain, summed = (
        estimate(dataclasses.replace(network, norms=n), work, ParallelDims(), machine(2), layout).exchange
        for n in (0, 160)
    )
    assert 0 < summed - plain < 0.1 * plain
