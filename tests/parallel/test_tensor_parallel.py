"""Networks whose linears are cut over ranks equal whole ones, also with everything custom nodes do to them."""

from __future__ import annotations

import pytest
import torch

from comfy.ldm import dit

from .arranged_cases import arranged
from .ranks import run_ranks
from .tensor_cases import call_for, cut, language_models
from .test_flux_tokens import CASES, SHAPES
from .test_made_up_family import cases, draw, load
from .tiny import inputs, tiny_flux


def _mask_per_head(network, arguments, options):
    x = arguments["x"]
    tokens = -(-x.shape[2] // 2) * -(-x.shape[3] // 2) + arguments["context"].shape[1]
    mask = torch.rand((x.shape[0], 4, tokens, tokens), generator=torch.Generator().manual_seed(4))
    return network(**arguments, attention_mask=mask * 4, transformer_options=options)


def _compare(manager, degree, ulysses, ring, shapes):
    """Largest relative deviation of each case and shape from the whole network on the same rank."""
    call, worst = call_for(manager, degree, ulysses, ring), {}
    for case in (*CASES, _mask_per_head):
        for height, width, text, batch in shapes:
            arguments = inputs(height, width, text, batch)
            with torch.inference_mode():
                serial = case(tiny_flux(), arguments, {})
                with dit.fallback_call(call):
                    parallel = case(cut(tiny_flux(), manager, degree), arguments, call.within({}))
            worst[case.__name__, height] = ((parallel - serial).abs().max() / serial.abs().max()).item()
    return worst


@pytest.mark.parametrize(
    "world,degree,ulysses,ring,shapes",
    [(2, 2, 1, 1, SHAPES[:2]), (3, 3, 1, 1, SHAPES[3:]), (5, 5, 1, 1, SHAPES[2:3]), (4, 2, 2, 1, SHAPES[:1]),
     (4, 2, 1, 2, SHAPES[3:])],
)  # fmt: skip
def test_cut_networks_equal_whole_ones(world, degree, ulysses, ring, shapes):
    """Every case at odd sizes; five ranks share four heads."""
    for worst in run_ranks(world, _compare, degree, ulysses, ring, shapes):
        for case, deviation in worst.items():
            assert deviation < 1e-5, f"{case}: {deviation}"


def _made_up(manager, configs):
    """{configuration: {case: (plan, layout, deviation from one rank)}} of whole sampling runs with the made-up family."""
    from comfy.taco_dit import runtime
    from comfy.taco_dit.core.config_manager import parse_config, validate_for
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy.taco_dit.core.lockstep import RankLockstep

    serial = {name: draw(patcher, **arguments) for name, (patcher, arguments) in cases(load()).items()}
    found, lockstep = {}, RankLockstep(manager)
    for key, content in configs.items():
        config = validate_for(parse_config(content, key), manager.world_size)
        engine = TACODiTExecutionEngine(config, manager, lockstep)
        runtime.activate(runtime.Runtime(config, manager, lockstep, engine))
        lockstep.begin(key)
        patcher, out = load(), {}
        for name, (each, arguments) in cases(patcher).items():
            parallel = draw(each, **arguments)
            deviation = ((parallel - serial[name]).abs().max() / serial[name].abs().max()).item()
            out[name] = engine.last_run.plan, engine.last_run.layout, deviation
        found[key] = out, patcher.loaded_size(), patcher.weight_store.partly_loaded
        lockstep.end()
    return found


TENSOR = {"parallel": {"tensor_parallel": True}}
HALF = {"parallel": {"tensor_parallel": True, "tensor_parallel_degree": 2}}
SHARDED = {"memory": {"shard_weights": True}}
STAGES = {"parallel": {"pipeline_parallel": True}}
TWO_STAGES = {"parallel": {"pipeline_parallel": True, "pipeline_parallel_degree": 2}}
BOTH = {"parallel": {"pipeline_parallel": True, "pipeline_parallel_degree": 2, "tensor_parallel": True}}
RING = {"memory": {"shard_weights": True}, "parallel": {"ring_degree": 2, "cfg_parallel": False}}


@pytest.mark.parametrize(
    "world,configs,plans",
    [
        (2, {"tensor": TENSOR, "sharded": SHARDED, "ring": RING, "stages": STAGES}, {
            "tensor": ("one rank", "one rank", "tensor 2"), "sharded": ("ulysses 2", "cfg 2", "sharded"),
            "ring": ("ring 2", "ring 2", "sharded"), "stages": ("one rank", "one rank", "pipeline 2")}),
        (3, {"tensor": TENSOR, "sharded": SHARDED}, {
            "tensor": ("one rank", "one rank", "tensor 3"), "sharded": ("ulysses 3", "ulysses 3", "sharded")}),
        (4, {"half": HALF, "stages": TWO_STAGES, "both": BOTH}, {
            "half": ("ulysses 2", "cfg 2", "tensor 2"), "stages": ("ulysses 2", "cfg 2", "pipeline 2"),
            "both": ("one rank", "one rank", "tensor 2 x pipeline 2")}),
    ],
)  # fmt: skip
def test_sampling_with_parts_of_weights_equals_one_rank(world, configs, plans):
    for found in run_ranks(world, _made_up, configs):
        for key, (one_row, two_rows, layout) in plans.items():
            out, _, _ = found[key]
            assert all(deviation < 1e-5 for _, _, deviation in out.values()), (key, out)
            assert {where for _, where, _ in out.values()} == {layout}
            assert (out["one picture"][0], out["guidance and mask"][0]) == (one_row, two_rows)


def test_weights_that_change_while_they_are_cut_or_sharded():
    """Adapters, hooks, fp8 with scales, areas, layers that foreign code calls, saving: as with whole weights."""
    names = ["weights_change", "scaled_fp8", "unequal_rows", "captured", "replaced_layers"]
    for found in run_ranks(3, arranged, {"tensor": TENSOR, "sharded": SHARDED, "stages": STAGES}, names):
        for key, out in found.items():
            assert all(value < 1e-5 for value in out["weights_change"].values()), (key, out["weights_change"])
            assert out["scaled_fp8"] < 1e-5 and out["unequal_rows"] < 1e-5, (key, out)
            worst, kinds, replays = out["captured"]
            assert (kinds, replays) == (0, 0) or key != "stages", "stages are not captured"
            assert worst < 1e-5 and (key == "stages" or (kinds == 1 and replays > 2)), (key, out["captured"])
            layer, wrapper, saved = out["replaced_layers"]
            assert saved, "files get whole weights"
            if key == "stages":  # whole layers may be replaced
                continue
            assert "a function is to change diffusion_model.single_blocks.0.linear1.weight at each use" in wrapper
            assert "img_attn.qkv of Model were replaced by a custom node" in layer and out["status"] in layer
        assert [out["status"] for out in found.values()] == ["tensor 3", "sharded", "pipeline 3"]


@pytest.mark.parametrize("world", [2, 3])
def test_parts_of_weights_in_eight_bits(world):
    """Parts are quantised by the rows they have, flat pieces are not; three ranks have heads that fp8 products do not take.

    A linear that is cut by its inputs has other scales than the whole one, so its error is another of the same size. Else
    differences in the last bit of fp32 tip the rounding of single numbers to eight bits over.
    """
    names = ["eight_bit", "scaled_fp8_multiplied"]
    for found in run_ranks(world, arranged, {"tensor": TENSOR, "sharded": SHARDED, "stages": STAGES}, names):
        for key, out in found.items():
            cases, sizes = out["eight_bit"]
            assert sizes, key
            for case, (whole, parts, between) in cases.items():
                assert whole > 1e-3, (key, case)
                if key == "sharded":
                    assert parts < 1e-5, (case, parts)
                elif key == "stages":
                    assert between < 5e-3 and parts > 1e-3, (case, between)
                else:
                    assert 1e-3 < parts < 1.5 * whole, (case, whole, parts)
            assert out["scaled_fp8_multiplied"] < (0.1 if key == "tensor" else 1e-2), (key, out)


def test_step_cache_with_parts_of_weights():
    """All ranks of a tensor group decide alike, and as one rank does."""
    config = {**TENSOR, "optimization": {"use_cache": True, "cache_threshold": 0.7, "cache_warm_up_steps": 2}}
    for found in run_ranks(3, arranged, {"tensor": config}, ["cached"]):
        off, steps, alone, refused = found["tensor"]["cached"]
        assert off < 1e-5 and steps == alone and any(steps) and not refused, (off, steps, alone, refused)


def check_bytes(found, world):
    """At most 1/N of the blocks' weights and a tenth of them, buffers included."""
    for key, out in found.items():
        held, whole = out["bytes_held"]
        assert held <= whole / world + whole / 10, (key, held / whole)


def test_bytes_held_by_two_ranks():
    for found in run_ranks(2, arranged, {"tensor": TENSOR, "sharded": SHARDED, "stages": STAGES}, ["bytes_held"]):
        check_bytes(found, 2)


def test_text_encoders_share_their_linears_and_bytes_held_by_three_ranks():
    for found in run_ranks(
        3, arranged, {"tensor": TENSOR, "sharded": SHARDED, "stages": STAGES}, ["bytes_held", "text_encoder"]
    ):
        check_bytes(found, 3)
        deviation, held, whole = found["tensor"]["text_encoder"]
        assert deviation < 1e-5 and held <= whole / 3 + whole / 10
        deviation, held, whole = found["sharded"]["text_encoder"]
        assert deviation == 0 and held == whole


@pytest.mark.parametrize("world", [2, 3])
def test_language_models_share_their_linears(world):
    """Query heads go with their key heads; of two key heads a third rank has none."""
    for found in run_ranks(world, language_models):
        for kind, (deviation, held) in found.items():
            assert deviation < 1e-5 and held < 0.7, (kind, deviation, held)


def test_sharded_flux_with_what_custom_nodes_do():
    """Masks, residuals, reference pictures, replaced blocks and forwards, while blocks are gathered before they run."""
    for found in run_ranks(3, arranged, {"sharded": SHARDED}, ["flux_cases"]):
        out = found["sharded"]["flux_cases"]
        assert len(out) == len(CASES) and all(value < 1e-5 for value in out.values()), out
