"""Training of adapters: latents and their conditionings in, an adapter file's tensors out.

Each step noises pictures to random levels of the model's schedule and compares the prediction of the denoised latent
with the latent. The network's weights stay as they are; every linear layer sees its weight through an adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
from comfy.weight_adapter import adapters
from comfy.weight_adapter.training import TrainableAdapter, TrainableDifference, new_factors

Weights = dict[str, torch.Tensor]

OPTIMIZERS = ("AdamW", "Adam", "SGD", "RMSprop")
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "MSE": F.mse_loss, "L1": F.l1_loss, "Huber": F.huber_loss, "SmoothL1": F.smooth_l1_loss,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How to train. `steps` are the optimizer's; each sees `grad_accumulation_steps` times `batch_size` pictures."""

    batch_size: int = 1
    grad_accumulation_steps: int = 1
    steps: int = 16
    learning_rate: float = 0.0005
    rank: int = 8
    optimizer: str = "AdamW"
    loss_function: str = "MSE"
    seed: int = 0
    training_dtype: torch.dtype = torch.bfloat16
    lora_dtype: torch.dtype = torch.bfloat16
    algorithm: str = "LoRA"
    gradient_checkpointing: bool = True


def train(
    model: Any, latents: torch.Tensor, positive: list[Any], settings: TrainingSettings, existing: Weights | None = None
) -> tuple[Weights, list[float]]:
    """(an adapter for the patcher `model`, on the CPU; the mean loss of each batch).

    latents: [N, C, h, w], `positive`: one conditioning for all or one for each. `existing` is an adapter to go on with.
    Raises ValueError when conditionings and pictures do not match, when `existing` is not for this model, and when the
    loss stops being a number.
    """
    if len(positive) not in (1, len(latents)):
        raise ValueError(
            f"there are {len(positive)} conditionings for {len(latents)} pictures; give one for all or one for each"
        )
    patcher = model.clone()
    patcher.set_model_compute_dtype(settings.training_dtype)
    # Outside of inference mode, for tensors made inside cannot take part in derivatives.
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.load_models_gpu([patcher], memory_required=1e20, force_full_load=True)
        generator = torch.Generator().manual_seed(settings.seed)
        device = patcher.load_device
        changes = _changes(patcher.model, settings, existing or {}, generator, device)
        data = _Data(patcher, _own(latents), _own(positive), settings.seed)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_applied(changes))
            stack.enter_context(_differentiable(patcher.model.diffusion_model))
            if settings.gradient_checkpointing:
                stack.enter_context(_checkpointed(patcher.model.diffusion_model))
            losses = _optimize(data, changes, settings, generator)
        trained = {key: value.detach().cpu() for change in changes for key, value in change.tensors.items()}
    return trained, losses


# --- data -----------------------------------------------------------------------------------------------------------


def _own(value: Any) -> Any:
    """Tensors made in inference mode copied, in any structure."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_own(item) for item in value)
    return value


class _Data:
    """Pictures and conditionings on the device, ready for the network."""

    def __init__(self, patcher: Any, latents: torch.Tensor, positive: list[Any], seed: int) -> None:
        self.model, self.device = patcher.model, patcher.load_device
        self.options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        # Zeros are "nothing there" and keep their value, as in sampling.
        filled = torch.count_nonzero(latents) > 0
        self.latents = (self.model.process_latent_in(latents) if filled else latents).to(self.device, torch.float32)
        self.conds = []
        for i, cond in enumerate(comfy.sampler_helpers.convert_cond(positive * (len(latents) // len(positive)))):
            shape = self.latents[i : i + 1]
            ready = comfy.samplers.process_conds(
                self.model, shape, {"positive": [cond]}, self.device, shape, None, seed
            )
            self.conds.append(_own(ready["positive"]))

    def loss(self, i: int, generator: torch.Generator, compare: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The loss of picture `i` with noise and level from the generator."""
        latent = self.latents[i : i + 1]
        sampling = self.model.model_sampling
        level = sampling.percent_to_sigma(torch.rand((), generator=generator).item())
        sigma = torch.tensor([level], device=self.device, dtype=torch.float32)
        noise = torch.randn(latent.shape, generator=generator).to(self.device)
        noisy = sampling.noise_scaling(sigma.view(-1, *[1] * (latent.ndim - 1)), noise, latent, False)
        (denoised,) = comfy.samplers.calc_cond_batch(self.model, [self.conds[i]], noisy, sigma, self.options)
        return compare(denoised, latent)


# --- the network with adapters --------------------------------------------------------------------------------------


Change = TrainableAdapter | TrainableDifference


class _At:
    """Where a change is applied: a layer's list of functions of its weight or bias."""

    def __init__(self, change: Change, layer: Any, functions: list[Any]) -> None:
        self.change, self.tensors = change, change.tensors
        self._layer, self._functions = layer, functions

    def attach(self) -> None:
        self._functions.append(self)

    def detach(self) -> None:
        self._functions.remove(self)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        convert = getattr(self._layer, "convert_weight", None)  # files whose fp8 weights carry a scale
        if convert is not None and weight.ndim > 1:
            weight = convert(weight).to(weight.dtype)
        return self.change(weight)


def _changes(
    model: Any, settings: TrainingSettings, existing: Weights, generator: torch.Generator, device: torch.device
) -> list[_At]:
    """A change for each weight and bias of the layers that can be changed at use; `existing` gives starting values."""
    stems: dict[str, list[str]] = {}
    for prefix, target in comfy.lora.model_lora_keys_unet(model).items():
        if isinstance(target, str):
            stems.setdefault(target, []).append(prefix)
    place = {"dtype": settings.lora_dtype, "device": device}
    out: list[_At] = []
    used: set[str] = set()
    for path, layer in model.named_modules():
        if not hasattr(layer, "weight_function") or getattr(layer, "weight", None) is None:
            continue
        shape, prefixes = tuple(layer.weight.shape), [path, *stems.get(f"{path}.weight", [])]
        if len(shape) > 1:
            kind, factors = _known_factors(existing, prefixes, used)
            if kind is None:
                factors = new_factors(settings.algorithm, shape, settings.rank, generator)
                kind = next(a for a in adapters if a.load("", factors, None, None) is not None)
            out.append(_At(TrainableAdapter(kind, path, factors, **place), layer, layer.weight_function))
        else:
            start = _known_difference(existing, prefixes, ".diff", shape, used)
            change = TrainableDifference(f"{path}.diff", start, **place)
            out.append(_At(change, layer, layer.weight_function))
        if getattr(layer, "bias", None) is not None:
            start = _known_difference(existing, prefixes, ".diff_b", tuple(layer.bias.shape), used)
            out.append(_At(TrainableDifference(f"{path}.diff_b", start, **place), layer, layer.bias_function))
    if existing and not used:
        raise ValueError("existing_lora has nothing for this model's weights; choose another or [None]")
    return out


def _known_factors(existing: Weights, prefixes: list[str], used: set[str]) -> tuple[Any, Weights]:
    """(kind of adapter, factors by the ends of their keys) of one weight in an adapter file, or (None, {})."""
    for prefix in prefixes:
        for kind in adapters:
            keys: set[str] = set()
            adapter = kind.load(prefix, existing, None, None, keys)
            if adapter is None:
                continue
            keys |= adapter.loaded_keys | {k for k in (f"{prefix}.alpha", f"{prefix}.dora_scale") if k in existing}
            used |= keys
            return kind, {key.removeprefix(prefix): existing[key] for key in sorted(keys)}
    return None, {}


def _known_difference(
    existing: Weights, prefixes: list[str], end: str, shape: tuple[int, ...], used: set[str]
) -> torch.Tensor:
    """The difference that an adapter file has for a weight with one axis, else zeros."""
    for prefix in prefixes:
        if prefix + end in existing:
            used.add(prefix + end)
            return existing[prefix + end]
    return torch.zeros(shape)


@contextlib.contextmanager
def _applied(changes: list[_At]) -> Iterator[None]:
    for change in changes:
        change.attach()
    try:
        yield
    finally:
        for change in changes:
            change.detach()


@contextlib.contextmanager
def _differentiable(network: nn.Module) -> Iterator[None]:
    """Replace weights that layers use as they are, and that were made in inference mode, by copies."""
    replaced = []
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_inference() and not getattr(module, f"{name}_function", None):
                replaced.append((module, name, parameter))
                module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


@contextlib.contextmanager
def _checkpointed(network: nn.Module) -> Iterator[None]:
    """Keep only what goes into each block, and compute the block again for its derivative."""
    from torch.utils.checkpoint import checkpoint

    blocks = [block for module in network.modules() if isinstance(module, nn.ModuleList) for block in module]
    outer = [block for block in blocks if "forward" not in vars(block)]
    for block in outer:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in outer:
            del block.forward


# --- steps ----------------------------------------------------------------------------------------------------------


def _optimize(data: _Data, changes: list[_At], settings: TrainingSettings, generator: torch.Generator) -> list[float]:
    parameters = [parameter for at in changes for parameter in at.change.parameters()]
    optimizer = getattr(torch.optim, settings.optimizer)(parameters, lr=settings.learning_rate)
    compare = LOSSES[settings.loss_function]
    progress = comfy.utils.ProgressBar(settings.steps)
    losses: list[float] = []
    for step in range(settings.steps):
        for _ in range(settings.grad_accumulation_steps):
            comfy.model_management.throw_exception_if_processing_interrupted()
            chosen = torch.randperm(len(data.latents), generator=generator)[: settings.batch_size].tolist()
            total = 0.0
            for i in chosen:  # one after the other, so that a batch takes no more memory than a picture
                loss = data.loss(i, generator, compare)
                (loss / (len(chosen) * settings.grad_accumulation_steps)).backward()
                total += loss.item() / len(chosen)
            if not math.isfinite(total):
                raise ValueError(
                    f"the loss is {total} at step {step + 1}; use a smaller learning_rate, or training_dtype fp32"
                )
            losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
        progress.update(1)
    return losses
