"""Schedules from tables."""

from __future__ import annotations

import pytest
import torch

from tests.nodes.helpers import run


@pytest.mark.parametrize(
    "name, inputs, expected",
    [
        (
            "OptimalStepsScheduler",
            {"model_type": "FLUX", "steps": 10},
            [0.9968, 0.9886, 0.9819, 0.975, 0.966, 0.9471, 0.9158, 0.8287, 0.5512, 0.2808, 0],
        ),
        (
            "AlignYourStepsScheduler",
            {"model_type": "SDXL", "steps": 10},
            [14.6146, 6.3185, 3.7682, 2.1811, 1.3405, 0.8621, 0.5551, 0.3799, 0.2332, 0.1114, 0],
        ),
        ("GITSScheduler", {"coeff": 1.0, "steps": 3}, [14.6146, 6.7731, 0.9535, 0]),
        ("GITSScheduler", {"coeff": 0.8, "steps": 2}, [14.6146, 7.4900, 0]),
    ],
)
def test_a_tabulated_number_of_steps(all_nodes, name, inputs, expected):
    sigmas = run(all_nodes, name, denoise=1.0, **inputs)[0]
    torch.testing.assert_close(sigmas, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert run(all_nodes, name, denoise=0.0, **inputs)[0].numel() == 0


@pytest.mark.parametrize(
    "name, inputs",
    [
        ("OptimalStepsScheduler", {"model_type": "Wan"}),
        ("OptimalStepsScheduler", {"model_type": "Chroma"}),
        ("AlignYourStepsScheduler", {"model_type": "SVD"}),
        ("GITSScheduler", {"coeff": 1.2}),
    ],
)
@pytest.mark.parametrize("steps", [3, 7, 25, 61])
def test_other_numbers_of_steps_follow_the_same_curve(all_nodes, name, inputs, steps):
    sigmas = run(all_nodes, name, steps=steps, denoise=1.0, **inputs)[0]
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0
    part = run(all_nodes, name, steps=steps, denoise=0.5, **inputs)[0]
    assert torch.equal(part, sigmas[-(round(steps * 0.5) + 1) :])


def test_between_levels_logarithms_are_interpolated(all_nodes):
    sigmas = run(all_nodes, "AlignYourStepsScheduler", model_type="SVD", steps=20, denoise=1.0)[0]
    torch.testing.assert_close(sigmas[1], torch.tensor((700.0 * 54.5) ** 0.5))


def test_a_coefficient_without_schedule(all_nodes):
    with pytest.raises(ValueError, match=r"coeff is 0.83.*multiple of 0.05"):
        run(all_nodes, "GITSScheduler", coeff=0.83, steps=4, denoise=1.0)


def test_node_packs_call_by_method(all_nodes):
    result = all_nodes["GITSScheduler"]().get_sigmas(1.2, 4, 1.0)
    assert result[0].shape == (5,)
