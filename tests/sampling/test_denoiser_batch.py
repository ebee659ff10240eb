"""Cutting a denoiser call by conditioning and by sample gives what the whole call gives."""

import itertools

import pytest
import torch

from comfy.denoiser_batch import DenoiserBatch, evaluate_batch, evaluate_serially

K, B = 3, 2


def _rows(*shape):
    return torch.randn(K * B, *shape, generator=torch.Generator().manual_seed(sum(shape)))


class Network:
    """A function of every kind of conditioning value."""

    def apply_model(self, x, t, c_crossattn, ref_latents, control, table, transformer_options, y=None):
        out = x * t.view(-1, 1, 1, 1) + c_crossattn.mean(dim=(1, 2)).view(-1, 1, 1, 1) + table.sum()
        for latent in ref_latents:
            out = out + latent
        for residuals in control.values():
            for residual in residuals:
                out = out if residual is None else out + residual
        assert len(transformer_options["uuids"]) * transformer_options["sigmas"].shape[0] == x.shape[0]
        return out


def _batch():
    options = {
        "cond_or_uncond": [1, 0, 0], "uuids": ["n", "p", "q"], "sigmas": torch.ones(B),
        "sample_sigmas": torch.arange(K * B + 0.0), "patches": {"x": [1, 2, 3]},
    }  # fmt: skip
    conditioning = {
        "c_crossattn": _rows(5, 7),
        "ref_latents": [_rows(4, 3, 3), _rows(4, 1, 1)],
        "control": {"input": [_rows(4, 3, 3), None], "middle": [torch.ones(1, 4, 1, 1)], "output": []},
        "table": torch.arange(K * B + 0.0),
        "y": None,
        "transformer_options": options,
    }
    return DenoiserBatch(_rows(4, 3, 3), _rows().abs(), conditioning, [1, 0, 0], B, frozenset({"table"}))


def _whole():
    return Network().apply_model(_batch().x, _batch().sigma, **_batch().conditioning).view(K, B, 4, 3, 3)


@pytest.mark.parametrize("indices", [[0], [2], [0, 1], [2, 0], [1, 2, 0]])
def test_conditionings(indices):
    """Any choice and order of conditionings."""
    part = _batch().select_conds(indices)
    assert part.num_conds == len(indices) and part.batch_size == B
    assert part.cond_or_uncond == [[1, 0, 0][j] for j in indices]
    assert part.conditioning["transformer_options"]["uuids"] == [["n", "p", "q"][j] for j in indices]
    assert part.conditioning["transformer_options"]["patches"] == {"x": [1, 2, 3]}
    out = evaluate_batch(Network(), part, {}).view(len(indices), B, 4, 3, 3)
    assert torch.equal(out, _whole()[indices])


@pytest.mark.parametrize("start,stop", [(0, 1), (1, 2), (0, 2)])
def test_samples(start, stop):
    """A range of samples of every conditioning."""
    part = _batch().select_samples(start, stop)
    out = evaluate_batch(Network(), part, {}).view(K, stop - start, 4, 3, 3)
    assert torch.equal(out, _whole()[:, start:stop])
    assert torch.equal(part.conditioning["transformer_options"]["sample_sigmas"], torch.arange(K * B + 0.0))


def test_both_cuts_commute():
    """Conditioning then sample is sample then conditioning."""
    for j, b in itertools.product(range(K), range(B)):
        one = _batch().select_conds([j]).select_samples(b, b + 1)
        other = _batch().select_samples(b, b + 1).select_conds([j])
        assert torch.equal(one.x, other.x) and one.cond_or_uncond == other.cond_or_uncond
        assert torch.equal(evaluate_batch(Network(), one, {})[0], _whole()[j, b])


def test_wrapper_and_serial_evaluation():
    """A custom node's wrapper is called once per batch with ComfyUI's arguments."""
    seen = []

    def wrapper(apply_model, args):
        seen.append((args["cond_or_uncond"], args["timestep"].shape[0]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    parts = [_batch().select_conds([0]), _batch().select_conds([1, 2])]
    outs = evaluate_serially(Network(), parts, {"model_function_wrapper": wrapper})
    assert seen == [([1], B), ([0, 0], 2 * B)]
    assert torch.equal(torch.cat(outs).view(K, B, 4, 3, 3), _whole())


def test_what_cannot_be_cut_is_said():
    """Rows that match nothing, and indices out of range."""
    batch = _batch()
    batch.conditioning["odd"] = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="odd has 4 rows"):
        batch.select_conds([0])
    for bad in (lambda: _batch().select_conds([3]), lambda: _batch().select_conds([]),
                lambda: _batch().select_samples(1, 1), lambda: _batch().select_samples(0, 3)):  # fmt: skip
        with pytest.raises(ValueError):
            bad()
