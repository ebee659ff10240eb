"""Steps that reuse the last change of the picture instead of asking the network (EasyCache, arXiv 2507.02860).

Both nodes decide from values that every rank has: EasyCache from the predictions of a step's conditionings after they
were gathered, LazyCache from the guided prediction. So no rank skips a step that another computes.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any

import torch

import comfy.patcher_extension
from comfy.missing import missing_names
from comfy.model_patcher_options import create_model_options_clone
from comfy_api.latest import io
from comfy_nodes.v3 import extension, share

KEY = "easycache"
WRAPPERS = comfy.patcher_extension.WrappersMP
SUBSAMPLE = 8


def mean_change(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return (new - old).abs().mean()


class StepCache:
    """What one run remembers: changes output - input by name, and how fast the leading output changes."""

    def __init__(self, title: str, threshold: float, start_percent: float, end_percent: float, verbose: bool) -> None:
        self.title = title
        self.threshold = threshold
        self.start_percent = start_percent
        self.end_percent = end_percent
        self.verbose = verbose
        self.start_sigma = self.end_sigma = 0.0
        self.changes: dict[Hashable, torch.Tensor] = {}
        self.rate: torch.Tensor | None = None  # change of the output over change of the input
        self.input: torch.Tensor | None = None
        self.output: torch.Tensor | None = None
        self.output_size: torch.Tensor | None = None
        self.collected = 0.0
        self.skipped = 0
        self.last_sigma: float | None = None

    def for_run(self, model_sampling: Any) -> StepCache:
        """An empty cache with the same settings for a model's sigmas."""
        new = StepCache(self.title, self.threshold, self.start_percent, self.end_percent, self.verbose)
        new.start_sigma = float(model_sampling.percent_to_sigma(self.start_percent))
        new.end_sigma = float(model_sampling.percent_to_sigma(self.end_percent))
        return new

    def is_past_end(self, sigma: float) -> bool:
        return not sigma > self.end_sigma

    def enter(self, sigma: float) -> bool:
        """Whether this is the first call at this sigma; later ones (other guidance) are computed as they are."""
        first = sigma != self.last_sigma
        self.last_sigma = sigma
        return first

    @staticmethod
    def _sampled(x: torch.Tensor) -> torch.Tensor:
        return x[..., ::SUBSAMPLE, ::SUBSAMPLE]

    def input_change(self, x: torch.Tensor, sigma: float) -> torch.Tensor | None:
        if sigma > self.start_sigma or self.input is None or self.input.shape != self._sampled(x).shape:
            return None
        return mean_change(self._sampled(x), self.input)

    def may_skip(self, change: torch.Tensor | None, names: list[Hashable]) -> bool:
        """Whether the output is expected to have changed too little to be computed."""
        if change is None or self.rate is None or any(name not in self.changes for name in names):
            return False
        self.collected += float(self.rate * change / self.output_size)
        skip = self.collected < self.threshold
        if self.verbose:
            logging.info(
                "%s [verbose] - %s step; cumulative_change_rate: %s, reuse_threshold: %s",
                self.title,
                "skipping" if skip else "NOT skipping",
                self.collected,
                self.threshold,
            )
        if skip:
            self.skipped += 1
        else:
            self.collected = 0.0
        return skip

    def reuse(self, name: Hashable, x: torch.Tensor) -> torch.Tensor:
        return x + self.changes[name].to(x)

    def computed(self, x: torch.Tensor, outputs: dict[Hashable, torch.Tensor], change: torch.Tensor | None) -> None:
        """Remember a step that was computed; the first output leads."""
        leading = next(iter(outputs.values()))
        sampled = self._sampled(leading)
        if change is not None and self.output is not None:
            self.rate = mean_change(sampled, self.output) / change
        self.changes.update({name: output - x for name, output in outputs.items()})
        self.input, self.output = self._sampled(x).clone(), sampled.clone()
        self.output_size = leading.abs().mean()

    def report(self, steps: int) -> None:
        speed = steps / max(1, steps - self.skipped)
        logging.info("%s - skipped %s/%s steps (%.2fx speedup).", self.title, self.skipped, steps, speed)


def around_run(
    executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: torch.Tensor, *more: Any, **named: Any
) -> Any:
    """OUTER_SAMPLE: give the run a cache of its own."""
    guider = executor.class_obj
    before = guider.model_options
    guider.model_options = create_model_options_clone(before)
    options = guider.model_options["transformer_options"]
    cache = options[KEY] = options[KEY].for_run(guider.model_patcher.get_model_object("model_sampling"))
    try:
        return executor(noise, latent_image, sampler, sigmas, *more, **named)
    finally:
        cache.report(len(sigmas) - 1)
        guider.model_options = before


def _name(position: int, cond: list[dict[str, Any]]) -> Hashable:
    return cond[0].get("uuid", position) if cond else position


def around_conds(
    executor: Any, model: Any, conds: list[Any], x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
) -> list[torch.Tensor]:
    """CALC_COND_BATCH: works on the network's own input and output, from which the predictions follow."""
    cache: StepCache = model_options["transformer_options"][KEY]
    sigma = float(timestep[0])
    if cache.is_past_end(sigma) or not cache.enter(sigma):
        return executor(model, conds, x, timestep, model_options)
    spread = timestep.view(-1, *[1] * (x.ndim - 1)).float()
    shown = model.model_sampling.calculate_input(timestep, x)
    names = {i: _name(i, cond) for i, cond in enumerate(conds) if cond is not None}
    change = cache.input_change(shown, sigma)
    if cache.may_skip(change, list(names.values())):
        return [
            x - cache.reuse(names[i], shown) * spread if i in names else torch.zeros_like(x) for i in range(len(conds))
        ]
    predictions = executor(model, conds, x, timestep, model_options)
    outputs = {name: (x - predictions[i]) / spread for i, name in names.items()}
    cache.computed(shown, outputs, change)
    return predictions


def around_prediction(
    executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any], seed: int | None = None
) -> torch.Tensor:
    """PREDICT_NOISE: works on the guided prediction."""
    cache: StepCache = model_options["transformer_options"][KEY]
    sigma = float(timestep[0])
    if cache.is_past_end(sigma):
        return executor(x, timestep, model_options, seed)
    change = cache.input_change(x, sigma)
    if cache.may_skip(change, ["guided"]):
        return cache.reuse("guided", x)
    prediction = executor(x, timestep, model_options, seed)
    cache.computed(x, {"guided": prediction}, change)
    return prediction


def cache_node(node_id: str, description: str, kind: str, wrapper: Any) -> type[io.ComfyNode]:
    """A node that puts a cache around a model."""

    class Cache(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id=node_id,
                display_name=node_id,
                category="advanced/debug/model",
                is_experimental=True,
                description=description,
                inputs=[
                    io.Model.Input("model"),
                    share("reuse_threshold", 0.2, 3.0, tooltip="Higher skips more steps."),
                    share("start_percent", 0.15),
                    share("end_percent", 0.95),
                    io.Boolean.Input("verbose", default=False),
                ],
                outputs=[io.Model.Output()],
            )

        @classmethod
        def execute(cls, model: Any, reuse_threshold: float, start_percent: float, end_percent: float, verbose: bool):
            model = model.clone()
            cache = StepCache(node_id, reuse_threshold, start_percent, end_percent, verbose)
            model.model_options["transformer_options"][KEY] = cache
            model.add_wrapper_with_key(WRAPPERS.OUTER_SAMPLE, KEY, around_run)
            model.add_wrapper_with_key(kind, KEY, wrapper)
            return io.NodeOutput(model)

    Cache.__name__ = Cache.__qualname__ = node_id
    return Cache


EasyCacheNode = cache_node(
    "EasyCache",
    "Skips steps in which the network's output would hardly change.",
    WRAPPERS.CALC_COND_BATCH,
    around_conds,
)
LazyCacheNode = cache_node(
    "LazyCache",
    "EasyCache on the guided prediction: simpler, works with everything, less exact.",
    WRAPPERS.PREDICT_NOISE,
    around_prediction,
)

comfy_entrypoint = extension(EasyCacheNode, LazyCacheNode)
__getattr__ = missing_names(__name__, {"EasyCacheHolder": "ComfyUI's state of EasyCache"})
