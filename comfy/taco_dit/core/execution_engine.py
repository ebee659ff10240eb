"""Runs a denoiser call under a plan, and keeps the statistics.

`evaluate` gets the batches of one call (conditionings x pictures), deals them over the row groups, lets the network run
on this rank's tokens, and puts everything together on every rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

import comfy.model_management
from comfy.denoiser_batch import evaluate_serially
from comfy.ldm import dit
from comfy.taco_dit.parallel.exchange import CollectiveExchange
from comfy.taco_dit.parallel.sequence_parallel import UlyssesPlan
from comfy.taco_dit.utils.performance_monitor import Clock, RunStatistics
from comfy_execution.lockstep import Lockstep

from .config_manager import ConfigError, OptimizationConfig, ParallelConfig, TacoConfig
from .distributed_manager import TACODiTDistributedManager
from .network_runner import NetworkRunner
from .plan import ParallelDims, Plan, Workload, choose_plan, share


def foreign_parts(network: Any, model_options: dict[str, Any]) -> list[str]:
    """What is not ours in or around a network, and may look at all conditionings of a call together.

    Such code runs with all rows on every rank; tokens are still split inside our own blocks.
    """
    found = []
    if "model_function_wrapper" in model_options:
        found.append("a model function wrapper")
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    found += [
        f"a {kind} wrapper" for kind in ("apply_model", "diffusion_model") if any(wrappers.get(kind, {}).values())
    ]
    for name in ("forward", "_forward", "forward_orig"):
        method = getattr(type(network), name, None)
        replaced = name in vars(network) or not getattr(method, "__module__", "comfy.").startswith("comfy.")
        if method is not None and replaced:
            found.append(f"a replaced {name}")
    return found


class TACODiTExecutionEngine:
    """Evaluates denoiser calls; one per process."""

    def __init__(self, config: TacoConfig, manager: TACODiTDistributedManager, lockstep: Lockstep) -> None:
        self.config = config
        self.manager = manager
        if config.optimization.engine == "xfuser" and manager.device.type != "cuda":
            raise ConfigError("optimization.engine is 'xfuser', which needs NVIDIA GPUs; allowed here: native")
        self.lockstep = lockstep
        self.clock = Clock(manager.device)
        self.last_run: RunStatistics | None = None
        self._unsaid: RunStatistics | None = None
        self.total_calls = 0
        self._plan: Plan | None = None
        self._started = 0.0
        self._token_plans: dict[Any, UlyssesPlan] = {}
        self._warned: set[str] = set()
        self.runner = NetworkRunner(*_fast_ways(config.optimization, manager.device), gather=lockstep.gather)
        comfy.model_management.add_memory_holder(self.runner.release_memory)

    # --- plan ------------------------------------------------------------------------------------------------------

    def workload(self, model: Any, batches: list[Any], model_options: dict[str, Any]) -> Workload:
        """What is to be split in a call."""
        network = model.diffusion_model
        heads = getattr(network, "num_heads", 1)
        hidden = getattr(network, "hidden_size", 1024)
        patch = getattr(network, "patch_size", 1)
        patch = patch if isinstance(patch, int) else patch[-1]
        largest = max(batches, key=lambda b: b.x[0, 0].numel())
        tokens = math.prod(-(-size // patch) for size in largest.x.shape[2:])
        context = largest.conditioning.get("c_crossattn")
        tokens += context.shape[1] if context is not None and context.ndim == 3 else 0
        foreign = foreign_parts(network, model_options)
        if foreign and self.manager.world_size > 1:
            self._warn_once(
                f"{', '.join(foreign)} ({type(network).__name__}): conditionings and pictures stay together on every "
                "rank; only tokens are split"
            )
        return Workload(
            conds=sum(len(b.cond_or_uncond) for b in batches),
            pictures=batches[0].batch_size,
            tokens=tokens,
            heads=heads,
            hidden_size=hidden,
            rows_split=not foreign and _can_cut(batches),
            tokens_split=hasattr(network, "embed_tokens"),
        )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            if self.lockstep.is_first:
                logging.warning("TACO-DiT: %s", text)

    def token_plan(self, dims: ParallelDims) -> UlyssesPlan | None:
        """The token plan of this rank's token group, or None when tokens are not split."""
        data = self.manager.data
        if dims.ulysses_degree == 1 or data is None:
            return None
        members = dims.token_group(self.manager.rank)
        key = (data.generation, members)
        if key not in self._token_plans:
            if any(generation != data.generation for generation, _ in self._token_plans):
                self._token_plans = {}
                self.runner.forget()  # captured exchanges belong to groups that are gone
            self._token_plans[key] = self._new_plan(members)
        return self._token_plans[key]

    def _new_plan(self, members: tuple[int, ...]) -> UlyssesPlan:
        exchange = CollectiveExchange(self.manager.data.group(members), self.clock)  # type: ignore[union-attr]
        if self.config.optimization.engine != "xfuser":
            return UlyssesPlan(exchange)
        if len(members) != self.manager.world_size:
            self._warn_once("xfuser's attention runs over all ranks or none; this plan uses the native exchange")
            return UlyssesPlan(exchange)
        from comfy.taco_dit.parallel.xfuser_engine import XfuserPlan, start

        return XfuserPlan(exchange, start(self.manager.rank, self.manager.world_size))

    # --- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(
        self, model: Any, batches: list[Any], model_options: dict[str, Any], parallel: ParallelConfig | None = None
    ) -> list[torch.Tensor]:
        """Denoised predictions of each batch, [k * B, C, ...], the same on every rank.

        Raises InterruptProcessingException on all ranks at the same call when the user cancelled, and RankError when
        another rank failed.
        """
        gate = getattr(self.lockstep, "gate", comfy.model_management.throw_exception_if_processing_interrupted)
        gate()
        self.total_calls += 1
        parallel = parallel or self.config.parallel
        if self.manager.world_size == 1 or not parallel.enabled:
            with self.clock.call(), self._fast(model, None):
                return evaluate_serially(model, batches, model_options)
        plan = choose_plan(parallel, self.workload(model, batches, model_options), self.manager.world_size)
        self._plan = plan
        with self.clock.call():
            return self._evaluate_rows(model, batches, model_options, plan.dims)

    def _evaluate_rows(
        self, model: Any, batches: list[Any], model_options: dict[str, Any], dims: ParallelDims
    ) -> list[torch.Tensor]:
        cfg, data, _, _ = dims.coordinates(self.manager.rank)
        mine = _rows(batches, dims, cfg, data)
        parts = [
            batches[i].select_conds(conds).select_samples(*samples)
            if dims.cfg_degree * dims.data_degree > 1
            else batches[i]
            for i, conds, samples in mine
        ]
        token_plan = self.token_plan(dims)
        with dit.use_plan(token_plan), self._fast(model, token_plan):
            outs = evaluate_serially(model, parts, model_options)
        if dims.cfg_degree * dims.data_degree == 1:
            return outs
        return self._collect(batches, dims, outs)

    @contextlib.contextmanager
    def _fast(self, model: Any, token_plan: UlyssesPlan | None) -> Iterator[None]:
        """Inside, the model calls its network compiled and captured, if the configuration asks for it."""
        if not self.runner.wanted or foreign_parts(model.diffusion_model, {}):
            yield
            return
        model.network_runner = self.runner.bound(model, None if token_plan is None else id(token_plan))
        try:
            yield
        finally:
            model.network_runner = None

    def _collect(self, batches: list[Any], dims: ParallelDims, outs: list[torch.Tensor]) -> list[torch.Tensor]:
        """All rows from all row groups. Rows of a call may differ in size, so they travel flat."""
        group = self.manager.data.group(dims.row_group(self.manager.rank))  # type: ignore[union-attr]
        owners = [(c, d) for c in range(dims.cfg_degree) for d in range(dims.data_degree)]
        dealt = [_rows(batches, dims, c, d) for c, d in owners]
        width = [batch.x[0].numel() for batch in batches]
        counts = [sum(len(conds) * (b - a) * width[i] for i, conds, (a, b) in rows) for rows in dealt]
        flat = torch.cat([out.reshape(-1) for out in outs])
        with self.clock.exchange():
            whole = group.all_gather(flat, counts)
        results = [out_like(batch, flat) for batch in batches]
        position = 0
        for rows in dealt:
            for i, conds, (start, stop) in rows:
                batch = batches[i]
                shape = (len(conds), stop - start, *batch.x.shape[1:])
                size = math.prod(shape)
                view = results[i].view(len(batch.cond_or_uncond), batch.batch_size, *batch.x.shape[1:])
                view[conds[0] : conds[-1] + 1, start:stop] = whole[position : position + size].view(shape)
                position += size
        return results

    # --- statistics ------------------------------------------------------------------------------------------------

    def begin_run(self) -> None:
        """Before sampling, on all ranks."""
        self.runner.begin_run()
        self.clock.restart()
        self._plan = None
        self._started = time.perf_counter()

    def end_run(self) -> RunStatistics:
        """After sampling, on all ranks: gather every rank's times."""
        self.runner.end_run()
        ranks = self.lockstep.gather("statistics", self.clock.read())
        plan = self._plan or Plan(ParallelDims(), "")
        self.last_run = RunStatistics(
            plan=plan.dims.describe(),
            reason=plan.reason,
            world_size=self.manager.world_size,
            calls=int(ranks[0]["calls"]),
            seconds=time.perf_counter() - self._started,
            ranks=ranks,
        )
        self._unsaid = self.last_run
        return self.last_run

    def summary(self) -> str:
        """What the console says of the sampling since it was last asked; empty when there was none."""
        run, self._unsaid = self._unsaid, None
        if run is None:
            return ""
        return f"; {run.calls} steps of {run.mean_call_ms:.1f} ms, {run.plan}, about {run.speedup:.2f} times one rank"

    def status(self) -> dict[str, Any]:
        """For `/taco_dit/status`."""
        return {
            "engine": self.config.optimization.engine,
            "cuda_graph": self.runner.cuda_graph,
            "config": dataclasses.asdict(self.config),
            "active_plan": None if self._plan is None else self._plan.dims.describe(),
            "reason": None if self._plan is None else self._plan.reason,
            "workload": None if self._plan is None or self._plan.work is None else dataclasses.asdict(self._plan.work),
            "considered": [] if self._plan is None else self._plan.considered_as_dicts(),
            "total_calls": self.total_calls,
            "last_run": None if self.last_run is None else self.last_run.as_dict(),
        }


def _fast_ways(optimization: OptimizationConfig, device: torch.device) -> tuple[bool, bool]:
    """(compile stages, capture CUDA graphs): as configured, else what the device can do."""
    cuda = device.type == "cuda"
    compile_stages, cuda_graph = optimization.use_torch_compile, optimization.use_cuda_graph
    if compile_stages is None:
        compile_stages = cuda and importlib.util.find_spec("triton") is not None
    return compile_stages, cuda if cuda_graph is None else cuda_graph and cuda


def _can_cut(batches: list[Any]) -> bool:
    """Whether every tensor of the batches tells its conditionings and pictures apart."""
    try:
        for batch in batches:
            batch.select_conds([0])
            batch.select_samples(0, 1)
    except ValueError:
        return False
    return True


def out_like(batch: Any, flat: torch.Tensor) -> torch.Tensor:
    """Room for a batch's results in the dtype of the predictions."""
    return torch.empty(batch.x.shape, dtype=flat.dtype, device=flat.device)


def _rows(batches: list[Any], dims: ParallelDims, cfg: int, data: int) -> list[tuple[int, list[int], tuple[int, int]]]:
    """(batch, its conditionings, pictures) that the row group (cfg, data) evaluates."""
    units = [(i, c) for i, batch in enumerate(batches) for c in range(len(batch.cond_or_uncond))]
    start, stop = share(len(units), dims.cfg_degree, cfg)
    out: list[tuple[int, list[int], tuple[int, int]]] = []
    for i, c in units[start:stop]:
        if out and out[-1][0] == i:
            out[-1][1].append(c)
        else:
            out.append((i, [c], share(batches[i].batch_size, dims.data_degree, data)))
    return out
