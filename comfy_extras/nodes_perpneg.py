"""Negative prompts that act only across the positive one (Perp-Neg, arXiv 2304.04968)."""

from __future__ import annotations

import math
from typing import Any

import torch

import comfy.sampler_helpers
import comfy.samplers
import node_helpers
from comfy_api.latest import io
from comfy_nodes.v3 import extension, share


def perp_neg(
    x: torch.Tensor,
    noise_pred_pos: torch.Tensor,
    noise_pred_neg: torch.Tensor,
    noise_pred_nocond: torch.Tensor,
    neg_scale: float,
    cond_scale: float,
) -> torch.Tensor:
    """Guidance from the empty prompt: towards the positive one, away from what of the negative one is across it."""
    wanted = noise_pred_pos - noise_pred_nocond
    unwanted = noise_pred_neg - noise_pred_nocond
    along = (unwanted * wanted).sum() / wanted.norm() ** 2
    return noise_pred_nocond + cond_scale * (wanted - neg_scale * (unwanted - along * wanted))


class PerpNeg(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerpNeg",
            display_name="Perp-Neg (DEPRECATED by PerpNegGuider)",
            category="_for_testing",
            is_experimental=True,
            is_deprecated=True,
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("empty_conditioning"),
                share("neg_scale", 1.0, 100.0),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, empty_conditioning: Any, neg_scale: float):
        empty = comfy.sampler_helpers.convert_cond(empty_conditioning)

        def guide(arguments: dict[str, Any]) -> torch.Tensor:
            inner, x = arguments["model"], arguments["input"]
            encoded = comfy.samplers.encode_model_conds(inner.extra_conds, empty, x, x.device, "negative")
            (middle,) = comfy.samplers.calc_cond_batch(
                inner, [encoded], x, arguments["sigma"], arguments["model_options"]
            )
            return x - perp_neg(
                x, arguments["cond_denoised"], arguments["uncond_denoised"], middle, neg_scale, arguments["cond_scale"]
            )

        model = model.clone()
        model.set_model_sampler_cfg_function(guide)
        return io.NodeOutput(model)


class Guider_PerpNeg(comfy.samplers.CFGGuider):  # noqa: N801 - ComfyUI's name
    """Positive, negative and empty prompt in one batch."""

    def set_conds(self, positive: Any, negative: Any, empty_negative_prompt: Any) -> None:
        empty = node_helpers.conditioning_set_values(empty_negative_prompt, {"prompt_type": "negative"})
        self.inner_set_conds({"positive": positive, "empty_negative_prompt": empty, "negative": negative})

    def set_cfg(self, cfg: float, neg_scale: float) -> None:
        self.cfg = cfg
        self.neg_scale = neg_scale

    def _needed(self, model_options: dict[str, Any]) -> list[Any]:
        conds = [self.conds.get(name) for name in ("positive", "negative", "empty_negative_prompt")]
        if not model_options.get("disable_cfg1_optimization", False) and math.isclose(self.neg_scale, 0.0):
            conds[1] = None
            if math.isclose(self.cfg, 1.0):
                conds[2] = None
        return conds

    def predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] = {},  # noqa: B006
        seed: int | None = None,
    ) -> torch.Tensor:
        conds = self._needed(model_options)
        shared = {
            "cond_scale": self.cfg,
            "input": x,
            "sigma": timestep,
            "model": self.inner_model,
            "model_options": model_options,
        }
        out = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        for function in model_options.get("sampler_pre_cfg_function", ()):
            out = function({**shared, "conds": conds, "conds_out": out, "timestep": timestep})
        positive, negative, empty = out
        result = perp_neg(x, positive, negative, empty, self.neg_scale, self.cfg)
        for function in model_options.get("sampler_post_cfg_function", ()):
            result = function(
                {
                    **shared,
                    "denoised": result,
                    "cond": conds[0],
                    "uncond": conds[1],
                    "cond_denoised": positive,
                    "uncond_denoised": negative,
                    "empty_cond": conds[2],
                    "empty_cond_denoised": empty,
                }
            )
        return result


class PerpNegGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerpNegGuider",
            category="_for_testing",
            is_experimental=True,
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Conditioning.Input("empty_conditioning"),
                share("cfg", 8.0, 100.0, step=0.1, round=0.01),
                share("neg_scale", 1.0, 100.0),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(cls, model: Any, positive: Any, negative: Any, empty_conditioning: Any, cfg: float, neg_scale: float):
        guider = Guider_PerpNeg(model)
        guider.set_conds(positive, negative, empty_conditioning)
        guider.set_cfg(cfg, neg_scale)
        return io.NodeOutput(guider)


comfy_entrypoint = extension(PerpNeg, PerpNegGuider)
