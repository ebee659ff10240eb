"""Guidance by what a DiT predicts with some of its blocks left out (skip-layer guidance)."""

from __future__ import annotations

import re
from typing import Any

import torch


def layer_numbers(text: str) -> list[int]:
    """The whole numbers in a text: `7, 8, 9` -> [7, 8, 9]."""
    return [int(number) for number in re.findall(r"\d+", text)]


def without_layers(model_options: dict[str, Any], layers: dict[str, list[int]]) -> dict[str, Any]:
    """Model options under which these blocks (`{"double_block": [7], ...}`) hand their input on."""
    import comfy.model_patcher

    def skip(arguments: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return arguments

    skip.rows_independent = True  # type: ignore[attr-defined]

    for name, numbers in layers.items():
        for number in numbers:
            model_options = comfy.model_patcher.set_model_options_patch_replace(
                model_options, skip, "dit", name, number
            )
    return model_options


def with_skipped_layers(
    model: Any,
    layers: dict[str, list[int]],
    scale: float,
    start_percent: float,
    end_percent: float,
    rescaling_scale: float = 0.0,
) -> Any:
    """A clone of a model that is guided away from its prediction without those layers, in a part of the schedule.

    `rescaling_scale` blends in the result brought back to the spread of the positive prediction.
    """
    import comfy.samplers

    if not any(layers.values()):
        return model
    sampling = model.get_model_object("model_sampling")
    first, last = sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)

    def guide(arguments: dict[str, Any]) -> torch.Tensor:
        result, sigma = arguments["denoised"], arguments["sigma"]
        if scale <= 0 or not last <= sigma[0].item() <= first:
            return result
        positive = arguments["cond_denoised"]
        options = without_layers(arguments["model_options"].copy(), layers)
        (weak,) = comfy.samplers.calc_cond_batch(
            arguments["model"], [arguments["cond"]], arguments["input"], sigma, options
        )
        result = result + (positive - weak) * scale
        if rescaling_scale != 0:
            factor = positive.std() / result.std()
            result = result * (rescaling_scale * factor + (1 - rescaling_scale))
        return result

    model = model.clone()
    model.set_model_sampler_post_cfg_function(guide)
    return model


def with_weak_negative(model: Any, layers: dict[str, list[int]], start_percent: float, end_percent: float) -> Any:
    """A clone of a model whose negative prediction leaves those layers out, in a part of the schedule."""
    import comfy.samplers

    if not any(layers.values()):
        return model
    sampling = model.get_model_object("model_sampling")
    first, last = sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)

    def predict(arguments: dict[str, Any]) -> Any:
        positive, negative = arguments["conds"]
        sigma, options = arguments["sigma"], arguments["model_options"]

        def batch(conds: list[Any], with_options: dict[str, Any]) -> Any:
            return comfy.samplers.calc_cond_batch(arguments["model"], conds, arguments["input"], sigma, with_options)

        if negative is None or not last <= sigma[0].item() <= first:
            return batch([positive, negative], options)
        weak = batch([None, negative], without_layers(options.copy(), layers))[1]
        return [batch([positive, None], options)[0], weak]

    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(predict)
    return model
