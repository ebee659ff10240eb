"""Rows of pictures on 2 and 3 ranks: equal to one rank to 1e-5, at odd sizes, with fewer rows than ranks, in prompts."""

from __future__ import annotations

import types

import pytest
import torch

from comfy.taco_dit.parallel import rows_layers
from comfy.taco_dit.parallel.rows_layers import merged_statistics
from comfy.taco_dit.parallel.rows_tensor import Layout, RowsTensor
from comfy.taco_dit.parallel.spatial_parallel import RowsPlan, takes_rows
from tests.tiny_vaes import KINDS

from .ranks import run_ranks
from .spatial_cases import OPERATIONS, SIZES, everything

WHOLE = {  # what the cases use that needs whole pictures; attention only of a picture of one row
    "__getitem__", "__setitem__", "all", "conv2d", "fft_fft2", "interpolate", "max", "mean", "pad",
    "scaled_dot_product_attention",
}  # fmt: skip


@pytest.fixture(scope="module", params=[2, 3])
def found(request):
    """(number of ranks, what every rank found)."""
    return request.param, run_ranks(request.param, everything)


def each(found, topic):
    return [rank[topic] for rank in found[1]]


def test_operations_equal_those_of_whole_pictures(found):
    for operations in each(found, "operations"):
        assert len(operations) == 3 * len(OPERATIONS)
        wrong = {key: value for key, value in operations.items() if not value[0] < 1e-5 or not value[1]}
        assert not wrong


def test_the_vae_equals_one_rank(found):
    for networks in each(found, "networks"):
        assert len(networks) == 2 * len(SIZES) + 1 + 2 * len(KINDS)
        assert not {key: value for key, value in networks.items() if not value < 1e-5}


def test_what_packs_replace_stays_right_and_is_told(found):
    for replaced, said in zip(each(found, "replaced"), each(found, "said")):
        assert all(value < 1e-5 for value in replaced.values())
        assert set(said) == WHOLE


def test_a_rank_holds_its_rows_only(found):
    most = -(-6 // found[0]) / 6
    assert all(share <= most for share in each(found, "memory"))


def test_nodes_give_what_one_rank_gives(found):
    world, _ = found
    for prompts in each(found, "prompts"):
        assert all(value < 1e-5 for value in prompts["nodes"].values()), prompts["nodes"]
        by_rows, _ = prompts["calls"]
        # one, two and three pictures decoded and encoded, and the inpainted one: those that cannot be dealt evenly
        assert by_rows == 2 * sum(pictures % world for pictures in (1, 2, 3)) + 1
        assert prompts["calls"][1] > 0
        for how in ("small", "off"):
            deviation, by_rows = prompts[how]
            assert deviation < 1e-5 and by_rows == 0


def test_tiles_of_videos_are_dealt_over_ranks(found):
    for prompts in each(found, "prompts"):
        deviations, dealt = prompts["video"]
        assert max(deviations) < 1e-5 and dealt > 3


def test_videos_are_dealt_whole_or_by_rows(found):
    world, _ = found
    for prompts in each(found, "prompts"):
        deviations, by_rows, dealt = prompts["clips"]
        assert max(deviations) < 1e-5
        # of one, two and three videos decoded, and one and two encoded, those that cannot be dealt evenly
        assert by_rows == sum(count % world for count in (1, 2, 3, 1, 2))
        assert dealt == sum(count >= world for count in (1, 2, 3, 1, 2))


def test_out_of_memory_on_one_rank_makes_all_decode_in_tiles(found):
    results = [prompts["memory"][0] for prompts in each(found, "prompts")]
    assert all(prompts["memory"][1] for prompts in each(found, "prompts"))
    assert [happened for _, happened, _ in results] == [False] * (found[0] - 1) + [True]
    assert all(deviation < 1e-5 and calls == 1 for deviation, _, calls in results)


@pytest.mark.parametrize("how, own, others", [
    ("raised", "ArithmeticError", "RankError"),
    ("cancelled", "InterruptProcessingException", "InterruptProcessingException"),
])  # fmt: skip
def test_a_failure_inside_frees_the_other_ranks(found, how, own, others):
    results = [prompts[how] for prompts in each(found, "prompts")]
    assert results[1][0] == own, results
    assert all(name == others for rank, (name, _) in enumerate(results) if rank != 1), results
    assert all(seconds < 8 for _, seconds in results)
    assert all(prompts["after"] < 1e-5 for prompts in each(found, "prompts"))


def test_statistics_far_from_zero_do_not_cancel():
    values = torch.randn(3, 1001, generator=torch.Generator().manual_seed(1)) + 1e4
    parts = torch.stack([rows_layers._statistics(part[None], 3) for part in values.split([400, 0, 601], dim=1)])
    mean, variance = merged_statistics(parts)
    exact = torch.var_mean(values.double(), dim=1, correction=0)
    torch.testing.assert_close(variance.double(), exact[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_those_of_fp32(dtype):
    picture = (torch.randn(2, 6, 9, 11, generator=torch.Generator().manual_seed(2)) * 0.5 + 8).to(dtype)
    half, full = (rows_layers._statistics(part, 3) for part in (picture, picture.double()))
    other_order = rows_layers._statistics(picture.contiguous(memory_format=torch.channels_last), 3)
    torch.testing.assert_close(other_order, half, rtol=1e-4, atol=1e-4)
    assert half.dtype == torch.float32 and half[0].tolist() == [198.0] * 6
    torch.testing.assert_close(half.double(), full, rtol=1e-3, atol=1e-3)
    plan = RowsPlan(types.SimpleNamespace(size=1, index=0, all_gather=lambda t, counts: t), torch.device("cpu"))
    mine = torch.nn.functional.group_norm(plan.deal(picture), 3, torch.ones(6, dtype=dtype)).local
    torch.testing.assert_close(mine, torch.nn.functional.group_norm(picture.float(), 3).to(dtype), rtol=1e-2, atol=1e-2)


def _alone(rows=2):
    group = types.SimpleNamespace(size=1, index=0, all_gather=lambda local, counts: local)
    return RowsPlan(group, torch.device("cpu")).deal(torch.randn(1, 4, rows, 3))


def test_a_kernel_asked_for_by_name_gets_rows():
    """What attention calls on Hopper; here only that it arrives."""
    tensor = _alone()
    tokens = tensor.flatten(2).transpose(1, 2).unsqueeze(1)
    got = []

    def kernel(q, k, v, bias, need_lse):
        got.append((type(q), type(k)))
        return (q,)

    out, lse = rows_layers._cudnn_attention(kernel, (tokens, tokens, tokens, None, False), {})
    assert got == [(torch.Tensor, torch.Tensor)] and out.rows == Layout(2, (2,), 3) and lse is None
    assert isinstance(torch.ops.aten.silu(tensor), RowsTensor)


def test_compiled_networks_get_whole_pictures():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3))
    assert takes_rows(network)
    network[0].compile(backend="eager")
    assert not takes_rows(network)
