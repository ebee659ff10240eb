"""A training run of the demo model: its settings, its state on disk, and the loop all stages share."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from comfy.ldm import dit
from demo import networks
from demo.render import SceneArrays, render

EMA = 0.9995
_SAVE_SECONDS = 60.0
_REPORT_STEPS = 50
_WARM_STEPS = 3  # plain steps before a graph is captured
_MATRICES = re.compile(r"dit\.\w+_blocks\.")


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, with the released model's values."""

    seed: int = 1
    scenes: int = 1_000_000
    text_batch: int = 1024
    text_steps: int = 2000
    text_rate: float = 2e-3
    vae_batch: int = 256
    vae_steps: int = 6000
    vae_rate: float = 1.5e-3
    batch: int = 1024
    steps: int = 18000
    rate: float = 2e-3
    muon_iterations: int = 5
    """Newton-Schulz iterations that make Muon's steps orthogonal; in bf16, which processors multiply slowly."""
    lora_steps: int = 300
    lora_rate: float = 2e-3
    lora_rank: int = 8


Batch = dict[str, torch.Tensor]
BatchOf = Callable[[int, torch.Generator], Batch]
LossOf = Callable[[Batch], torch.Tensor]


class _Gradients:
    """Gradients of a loss in one flat tensor; on a GPU computed by CUDA graphs, one for each shape of batches.

    The networks are so small that launching their kernels one by one takes longer than computing.
    """

    def __init__(self, run: Run, parameters: dict[str, nn.Parameter], loss_of: LossOf, compiled: bool) -> None:
        self._run, self._loss_of, self._compiled = run, loss_of, compiled
        self._parameters = list(parameters.values())
        self.flat = torch.zeros(sum(p.numel() for p in self._parameters), device=run.device)
        self._views = []
        for part, parameter in zip(self.flat.split([p.numel() for p in self._parameters]), self._parameters):
            parameter.grad = part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())
            self._views.append(parameter.grad)
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor, dict[str, torch.Tensor]]] = {}
        self._pool = torch.cuda.graph_pool_handle() if run.fast else None
        self._capture = run.fast

    def _compute(self, batch: Batch) -> torch.Tensor:
        with self._run.amp(), dit.compiled_stages(self._run.fast and self._compiled):
            loss = self._loss_of(batch)
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        torch._foreach_copy_(self._views, list(found))
        return loss.detach()

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Loss of a batch; its gradients are in `flat` and in the parameters' `grad`."""
        key = tuple((name, value.shape) for name, value in batch.items())
        self._seen[key] = self._seen.get(key, 0) + 1
        if key not in self._graphs:
            if not self._capture or self._seen[key] <= _WARM_STEPS:
                return self._compute(batch)
            try:
                self._graphs[key] = self._captured(batch)
            except RuntimeError as error:
                print(f"no CUDA graph, training goes on without ({str(error).splitlines()[0]})")
                self._capture = False
                return self._compute(batch)
        graph, inputs, loss, notes = self._graphs[key]
        for name, value in batch.items():
            inputs[name].copy_(value)
        graph.replay()
        self._run.notes.update(notes)
        return loss

    def _captured(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor, dict[str, torch.Tensor]]:
        """(graph, its inputs, its loss, what it notes)."""
        inputs = {name: value.clone() for name, value in batch.items()}
        graph = torch.cuda.CUDAGraph()
        # Another thread of this process may watch over NCCL meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._compute(inputs)
        return graph, inputs, loss, dict(self._run.notes)

    def detach(self) -> None:
        """Take the gradients off the parameters."""
        for parameter in self._parameters:
            parameter.grad = None


class Run:
    """Networks and the state of a run: which stage, which step, losses so far.

    Under torchrun each rank computes its share of every batch, from random numbers of its own; rank 0 writes.
    """

    def __init__(self, recipe: Recipe, device: torch.device, work: str, workers: int) -> None:
        self.recipe, self.device, self.workers = recipe, device, workers
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
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
        self.notes: dict[str, torch.Tensor] = {}
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
        self.notes[name] = value.detach()

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

    def save(
        self, parameters: dict[str, nn.Parameter] | None = None, optimizers: Sequence[torch.optim.Optimizer] = ()
    ) -> None:
        """Write the whole state (rank 0), replacing the last one; `parameters` and `optimizers` of a stage under way."""
        if self.rank > 0:
            return
        state = {
            "recipe": asdict(self.recipe), "vae": self.vae.state_dict(), "model": _plain(self.model),
            "averages": self.averages, "losses": self.losses, "done": self.done, "lora": self.lora,
            "optimizer": None,
        }  # fmt: skip
        if optimizers:
            values = {key: value.detach() for key, value in (parameters or {}).items()}
            state["optimizer"] = {"states": [o.state_dict() for o in optimizers], "parameters": values}
        torch.save(state, self.file + ".part")
        os.replace(self.file + ".part", self.file)

    def share(self, count: int) -> int:
        """How many of `count` things of a batch each rank takes."""
        return -(-count // self.ranks)

    def stage(
        self,
        name: str,
        parameters: dict[str, nn.Parameter],
        steps: int,
        rate: float,
        batch_of: BatchOf,
        loss_of: LossOf,
        compiled: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Train `parameters` until the stage `name` has done `steps` and return their running averages.

        batch_of(step, random numbers) makes this rank's tensors for a step and loss_of turns them into the loss,
        without anything that depends on the step or on values outside the batch. The rate warms up and falls along a
        cosine over all steps. Raises SystemExit when the loss is no number.
        """
        start = self.done.get(name, 0)
        average = self.averages.setdefault(name, {key: value.detach().clone() for key, value in parameters.items()})
        if start >= steps:
            return average
        optimizers = self._optimizers_for(parameters, rate)
        gradients = _Gradients(self, parameters, loss_of, compiled)
        losses = self.losses.setdefault(name, [])
        generator = torch.Generator(self.device)
        seed = self.recipe.seed * 1_000_003 + sum(map(ord, name)) + 15_485_863 * self.rank
        saved, total = time.monotonic(), torch.zeros((), device=self.device)
        bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5, disable=self.rank > 0)
        for number in bar:
            generator.manual_seed(seed + 7919 * number)
            for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
                group["lr"] = rate * _schedule(number, steps)
            total += gradients(batch_of(number, generator))
            self._step(gradients.flat, optimizers)
            decay = min(EMA, (number + 1) / (number + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
            if (number + 1) % _REPORT_STEPS == 0:
                losses.append((number + 1, total.item() / _REPORT_STEPS))
                total.zero_()
                if not math.isfinite(losses[-1][1]):
                    raise SystemExit(f"{name}: the loss is no number at step {number + 1}; try a lower rate")
                more = {key: f"{value.item():.3f}" for key, value in self.notes.items()}
                bar.set_postfix(loss=f"{losses[-1][1]:.4f}", **more, refresh=False)
            if self.rank == 0 and time.monotonic() - saved > _SAVE_SECONDS:
                self.done[name] = number + 1
                self.save(parameters, optimizers)
                saved = time.monotonic()
        gradients.detach()
        self.done[name] = steps
        self.notes.clear()
        self.save()
        return average

    def _step(self, gradients: torch.Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Average the ranks' gradients, bound their norm by 1, and move the parameters."""
        if self.ranks > 1:
            dist.all_reduce(gradients)
            gradients /= self.ranks
        gradients *= (1 / (torch.linalg.vector_norm(gradients) + 1e-6)).clamp(max=1)
        for optimizer in optimizers:
            optimizer.step()

    def _optimizers_for(self, parameters: dict[str, nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
        """New ones, or those of the interrupted stage, whose parameters are put back too."""
        optimizers: list[torch.optim.Optimizer] = []
        # Muon (Jordan et al. 2024) for the matrices of the network's blocks, at the step size AdamW would take.
        matrices = {key: value for key, value in parameters.items() if value.ndim == 2 and _MATRICES.match(key)}
        if matrices:
            iterations = self.recipe.muon_iterations
            optimizers.append(
                torch.optim.Muon(
                    matrices.values(), lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=iterations
                )
            )
        rest = [value for key, value in parameters.items() if key not in matrices]
        optimizers.append(torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.97), weight_decay=0.01, fused=self.fast))
        if self._optimizer is not None:
            with torch.no_grad():
                for key, parameter in parameters.items():
                    parameter.copy_(self._optimizer["parameters"][key])
            for optimizer, state in zip(optimizers, self._optimizer["states"], strict=True):
                optimizer.load_state_dict(state)
            self._optimizer = None
        return optimizers


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
