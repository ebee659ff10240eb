"""A training run of the demo model: its settings, its state on disk, and the loop all stages share."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from comfy.ldm import dit
from demo import networks
from demo.render import SceneArrays, render

EMA = 0.9995
_SAVE_SECONDS = 60.0
_REPORT_STEPS = 50


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, with the released model's values."""

    seed: int = 1
    scenes: int = 1_000_000
    text_batch: int = 1024
    text_steps: int = 5000
    text_rate: float = 2e-3
    vae_batch: int = 256
    vae_steps: int = 8000
    vae_rate: float = 1.5e-3
    batch: int = 384
    steps: int = 30000
    rate: float = 1.5e-3
    lora_steps: int = 600
    lora_rate: float = 2e-3
    lora_rank: int = 8


LossOf = Callable[[int, torch.Generator], torch.Tensor]


class Run:
    """Networks and the state of a run: which stage, which step, losses so far."""

    def __init__(self, recipe: Recipe, device: torch.device, work: str, workers: int) -> None:
        self.recipe, self.device, self.workers = recipe, device, workers
        self.file = os.path.join(work, "state.pt")
        os.makedirs(work, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.fast = device.type == "cuda"
        self.vae = networks.new_vae().to(device, memory_format=torch.channels_last)
        self.model = networks.TextAndPicture().to(device)
        self.averages: dict[str, dict[str, torch.Tensor]] = {}
        self.losses: dict[str, list[tuple[int, float]]] = {}
        self.done: dict[str, int] = {}
        self.lora: dict[str, torch.Tensor] = {}
        self._optimizer: dict[str, Any] | None = None
        self._notes: dict[str, torch.Tensor] = {}
        self.draw: Callable[..., torch.Tensor] = self.compiled(render)
        self.encode: Callable[..., torch.Tensor] = self.compiled(self._encode)
        self._resume()

    def compiled(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Compiled on a GPU; as it is elsewhere, where compiling takes longer than it saves."""
        return torch.compile(function, dynamic=False) if self.fast else function

    def amp(self) -> Any:
        """Half precision on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.fast else nullcontext()

    def note(self, name: str, value: torch.Tensor) -> None:
        """Show a number beside the loss."""
        self._notes[name] = value.detach()

    def _encode(self, arrays: SceneArrays, width: int, height: int, style: str) -> torch.Tensor:
        """Scenes -> their latents [B, 16, H / 8, W / 8]."""
        return networks.latent_of(self.vae, render(arrays, width, height, style))

    def _resume(self) -> None:
        if not os.path.exists(self.file):
            return
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{self.file} is of a run with other settings: {state['recipe']}; give another --work")
        self.vae.load_state_dict(state["vae"])
        self.model.load_state_dict(state["model"])
        self.averages, self.losses, self.done = state["averages"], state["losses"], state["done"]
        self.lora, self._optimizer = state["lora"], state["optimizer"]
        print(f"going on from {self.file}: {self.done}")

    def save(self, parameters: dict[str, nn.Parameter] | None = None, optimizer: Any = None) -> None:
        """Write the whole state, replacing the last one; `parameters` and `optimizer` of a stage under way."""
        state = {
            "recipe": asdict(self.recipe), "vae": self.vae.state_dict(), "model": _plain(self.model),
            "averages": self.averages, "losses": self.losses, "done": self.done, "lora": self.lora,
            "optimizer": None,
        }  # fmt: skip
        if optimizer is not None:
            values = {key: value.detach() for key, value in (parameters or {}).items()}
            state["optimizer"] = {"state": optimizer.state_dict(), "parameters": values}
        torch.save(state, self.file + ".part")
        os.replace(self.file + ".part", self.file)

    def stage(
        self,
        name: str,
        parameters: dict[str, nn.Parameter],
        steps: int,
        rate: float,
        loss_of: LossOf,
        compiled: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Train `parameters` until the stage `name` has done `steps` and return their running averages.

        loss_of(step, noise generator) is the loss; the rate warms up and falls along a cosine over all steps.
        Raises SystemExit when the loss is no number.
        """
        start = self.done.get(name, 0)
        average = self.averages.setdefault(name, {key: value.detach().clone() for key, value in parameters.items()})
        if start >= steps:
            return average
        optimizer = self._optimizer_for(parameters, rate)
        losses = self.losses.setdefault(name, [])
        generator = torch.Generator(self.device)
        seed = self.recipe.seed * 1_000_003 + sum(map(ord, name))
        saved, total = time.monotonic(), torch.zeros((), device=self.device)
        bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5, dynamic_ncols=True)
        for number in bar:
            generator.manual_seed(seed + 7919 * number)
            for group in optimizer.param_groups:
                group["lr"] = rate * _schedule(number, steps)
            with self.amp(), dit.compiled_stages(self.fast and compiled):
                loss = loss_of(number, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(EMA, (number + 1) / (number + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
            total += loss.detach()
            if (number + 1) % _REPORT_STEPS == 0:
                losses.append((number + 1, total.item() / _REPORT_STEPS))
                total.zero_()
                if not math.isfinite(losses[-1][1]):
                    raise SystemExit(f"{name}: the loss is no number at step {number + 1}; try a lower rate")
                more = {key: f"{value.item():.3f}" for key, value in self._notes.items()}
                bar.set_postfix(loss=f"{losses[-1][1]:.4f}", **more, refresh=False)
            if time.monotonic() - saved > _SAVE_SECONDS:
                self.done[name] = number + 1
                self.save(parameters, optimizer)
                saved = time.monotonic()
        self.done[name] = steps
        self._notes.clear()
        self.save()
        return average

    def _optimizer_for(self, parameters: dict[str, nn.Parameter], rate: float) -> torch.optim.AdamW:
        """A new one, or that of the interrupted stage, whose parameters are put back too."""
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=rate, betas=(0.9, 0.97), weight_decay=0.01, fused=self.fast
        )
        if self._optimizer is not None:
            with torch.no_grad():
                for key, parameter in parameters.items():
                    parameter.copy_(self._optimizer["parameters"][key])
            optimizer.load_state_dict(self._optimizer["state"])
            self._optimizer = None
        return optimizer


def apply(network: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Give a network those of `values` that it has parameters for."""
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if key in values:
                parameter.copy_(values[key])


def _plain(network: nn.Module) -> dict[str, torch.Tensor]:
    """A network's state without what a LoRA under training adds: its original weights under their own names."""
    out = {}
    for key, value in network.state_dict().items():
        if key.endswith(".original"):
            key = key.replace("parametrizations.weight.original", "weight")
        if ".parametrizations." not in key:
            out[key] = value
    return out


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / min(500, steps))
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
