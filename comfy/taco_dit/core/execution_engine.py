"""Runs a denoiser call under a plan, and keeps the statistics.

`evaluate` gets the batches of one call (conditionings x pictures), distributes them over the row groups, runs the
network on this rank's tokens, and gathers all predictions on every rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import comfy.model_management
from comfy import accounting
from comfy.denoiser_batch import DenoiserBatch, evaluate_serially
from comfy.ldm import dit
from comfy.ldm.modules import kernels
from comfy.taco_dit.fast.captured_calls import CapturedCalls
from comfy.taco_dit.fast.step_cache import CacheSettings, StepCache
from comfy.taco_dit.parallel.exchange import CollectiveExchange
from comfy.taco_dit.parallel.pipeline_parallel import Pipelines, StagePipeline
from comfy.taco_dit.parallel.ring_parallel import native_plan
from comfy.taco_dit.parallel.sequence_parallel import UlyssesPlan
from comfy.taco_dit.parallel.spatial_parallel import SpatialPlan
from comfy.taco_dit.parallel.tensor_parallel import TensorPlan
from comfy.taco_dit.utils.performance_monitor import Clock, RunStatistics
from comfy.weights.store import store_of
from comfy_execution.lockstep import Lockstep, is_alone

from . import step_records
from .arrangement import Arranger
from .config_manager import ConfigError, OptimizationConfig, ParallelConfig, TacoConfig
from .distributed_manager import TACODiTDistributedManager
from .layout import Layout, Placement
from .machine_profile import MachineProfile, assumed
from .network_cost import EIGHT_BIT_RATES, NetworkCost, of_network
from .plan import ParallelDims, Plan, Workload, choose_plan
from .reasons import reason
from .rows import all_layers_are_ours, can_cut, can_deal_rows, collect_rows, foreign_parts, replaced_parts, rows_of
from .transports import Transports, entries_of_call

SharedPicture = UlyssesPlan | TensorPlan | SpatialPlan
"""How ranks share a picture: its tokens, or its rows."""


class TACODiTExecutionEngine:
    """Evaluates denoiser calls; one per process."""

    def __init__(self, config: TacoConfig, manager: TACODiTDistributedManager, lockstep: Lockstep) -> None:
        self.config = config
        self.manager = manager
        if config.optimization.engine == "xfuser" and manager.device.type != "cuda":
            raise ConfigError("optimization.engine is 'xfuser', which needs NVIDIA GPUs; allowed here: native")
        _check_precision(config.optimization.linear_precision, manager.device)
        self.lockstep = lockstep
        self.clock = Clock(manager.device)
        self.arranger = Arranger(config, manager, lockstep, self.clock)
        self.last_run: RunStatistics | None = None
        self._unsaid: RunStatistics | None = None
        self.total_calls = 0
        self._plan: Plan | None = None
        # Of this run: bytes of weights that come from host memory in each call, how fast linears multiply, reused calls.
        self._streamed: float | None = None
        self._linear_rate, self._reused = 1.0, 0.0
        self._all_ours: bool | None = None
        self._started = 0.0
        self._layout: tuple[Layout, str] = (Layout(), "")
        self._token_plans: dict[Any, SharedPicture] = {}
        self._warned: set[str] = set()
        self.profile: MachineProfile = assumed(manager.world_size)
        self.records_file: str | None = None  # where predicted and measured times are kept
        self._costs: weakref.WeakKeyDictionary[torch.nn.Module, NetworkCost] = weakref.WeakKeyDictionary()
        self.pipelines = Pipelines(config.parallel, manager)
        self._eight_bit: str | None = None
        self.runner = CapturedCalls(*_fast_ways(config.optimization, manager.device), gather=lockstep.gather)
        exchange = config.parallel.exchange
        self.transports = Transports(exchange, manager, lockstep.gather, self.runner.forget, self.clock)
        comfy.model_management.add_memory_holder(self.runner.release_memory)
        self.step_cache = _step_cache(config.optimization)
        if self.step_cache is not None:
            comfy.model_management.add_memory_holder(self.step_cache.release_memory)
        if manager.data is not None:
            manager.data.before_groups_end(self.runner.forget)

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
        foreign = foreign_parts(network, batches, model_options)
        if foreign and self.manager.world_size > 1:
            self._warn_once(
                f"{', '.join(foreign)} ({type(network).__name__}) may let pictures of a batch see one another: conditionings "
                "and pictures stay together on every rank, only tokens are split"
            )
        return Workload(
            conds=sum(len(b.cond_or_uncond) for b in batches),
            pictures=batches[0].batch_size,
            tokens=tokens,
            heads=heads,
            hidden_size=hidden,
            rows_split=not foreign and can_cut(batches),
            tokens_split=hasattr(network, "block_list"),
            picture_rows=largest.x.shape[-2] if self._may_deal_rows(network, batches, model_options) else 0,
        )

    def _may_deal_rows(self, network: Any, batches: list[Any], model_options: dict[str, Any]) -> bool:
        """Whether the rows of pictures may be on different ranks; its layers are looked at once a run."""
        if self.manager.world_size == 1 or not can_deal_rows(network, batches, model_options):
            return False
        if self._all_ours is None:
            self._all_ours = all_layers_are_ours(network)
        return self._all_ours

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            if self.lockstep.is_first:
                logging.warning("TACO-DiT: %s", text)

    def token_plan(self, dims: ParallelDims, layout: Layout = Layout()) -> Any:  # noqa: B008
        """The `SharedPicture` of this rank, or None when pictures are not shared."""
        data = self.manager.data
        if dims.picture_degree * layout.tensor_degree == 1 or data is None:
            return None
        key = (data.generation, dims, layout)
        if key not in self._token_plans:
            if any(generation != data.generation for generation, _, _ in self._token_plans):
                self._token_plans = {}
                self.runner.forget()  # captured exchanges belong to groups that are gone
            inside = None if dims.sequence_degree == 1 else self._new_plan(dims, layout)
            if dims.spatial_degree > 1:
                copies = dims.token_group(layout.place_of(self.manager.rank).copy)
                self._token_plans[key] = SpatialPlan(self._copies_group(layout, copies), self.manager.device)
            elif layout.tensor_degree > 1:
                among = data.group(layout.tensor_group(self.manager.rank))
                self._token_plans[key] = TensorPlan(inside, UlyssesPlan(CollectiveExchange(among, self.clock)))
            elif inside is not None:
                self._token_plans[key] = inside
        return self._token_plans[key]

    def _copies_group(self, layout: Layout, copies: Sequence[int]) -> Any:
        """The group of the ranks that hold of these copies of the network what this rank holds of its own."""
        data = self.manager.data
        assert data is not None
        return data.group(layout.ranks_of(copies, self.manager.rank))

    def _new_plan(self, dims: ParallelDims, layout: Layout) -> UlyssesPlan:
        data, rank = self.manager.data, self.manager.rank
        assert data is not None
        group, copy = functools.partial(self._copies_group, layout), layout.place_of(rank).copy
        if self.config.optimization.engine != "xfuser":
            return native_plan(
                group, dims, copy, self.clock, lambda copies: self.transports.exchange(layout.ranks_of(copies, rank))
            )
        if dims.ulysses_degree != self.manager.world_size:
            self._warn_once(
                "xfuser's attention runs by Ulysses over all ranks or not at all; this plan uses the native exchange"
            )
            return native_plan(group, dims, copy, self.clock)
        from comfy.taco_dit.parallel.xfuser_engine import XfuserPlan, start

        exchange = CollectiveExchange(data.group(dims.token_group(rank)), self.clock)
        return XfuserPlan(exchange, start(rank, self.manager.world_size))

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
        layout = self.arranger.layout_of(model)
        if self._plan is None:  # the first call of a run
            self.arranger.check(model)
            self._layout = layout, self.arranger.reason_of(model)
        alone = self.manager.world_size == 1 or not parallel.enabled or is_alone()
        if not alone or (self.manager.world_size == 1 and self.profile.measured):
            self._plan = self._plan_of(model, batches, model_options, parallel, layout)
        with self.clock.call():
            if alone or self._plan is None:
                return self._run(model, batches, model_options, None, layout)
            work = self._plan.work
            pipeline = self.pipelines.of(model, layout, batches, model_options, work is not None and work.rows_split)
            return self._evaluate_rows(model, batches, model_options, self._plan.dims, layout, pipeline)

    def _plan_of(
        self,
        model: Any,
        batches: list[Any],
        model_options: dict[str, Any],
        parallel: ParallelConfig,
        layout: Layout,
    ) -> Plan:
        work = self.workload(model, batches, model_options)
        if layout.tensor_degree > 1:  # each copy's ranks have some of the heads
            work = dataclasses.replace(work, heads=max(1, work.heads // layout.tensor_degree))
        plan = self._choose(model, work, parallel, layout)
        if layout.placement is Placement.SHARDED and not _equal_calls(batches, plan.dims):
            # All ranks gather each block together, so all must run the network equally often.
            plan = self._choose(model, dataclasses.replace(work, rows_split=False), parallel, layout)
        return plan

    def _choose(self, model: Any, work: Workload, parallel: ParallelConfig, layout: Layout) -> Plan:
        network = model.diffusion_model
        if network not in self._costs:
            self._costs[network] = of_network(network)
        costs = self._costs[network]
        if self._streamed is None:  # the most of all ranks, so that all choose the same plan
            offloaded = layout.placement is Placement.OFFLOADED
            mine = max(0.0, costs.weight_bytes - model.model_loaded_weight_memory) if offloaded else 0.0
            rate = EIGHT_BIT_RATES.get(store_of(model).multiplies_in or "", 1.0)
            found = self.lockstep.gather("costs of this network", (mine, rate, self._reused))
            self._streamed = max(streamed for streamed, _, _ in found)
            self._linear_rate = min(rate for _, rate, _ in found)
            self._reused = min(reused for _, _, reused in found)
        costs = dataclasses.replace(costs, linear_rate=self._linear_rate, reused=self._reused)
        streaming = Placement.OFFLOADED if self._streamed else Placement.WHOLE
        if {layout.placement, streaming} <= {Placement.OFFLOADED, Placement.WHOLE}:
            layout = dataclasses.replace(layout, placement=streaming)
        return choose_plan(parallel, work, self.manager.world_size, layout, self.profile, costs, self._streamed)

    def _evaluate_rows(
        self,
        model: Any,
        batches: list[DenoiserBatch],
        model_options: dict[str, Any],
        dims: ParallelDims,
        layout: Layout,
        pipeline: StagePipeline | None,
    ) -> list[torch.Tensor]:
        token_plan = self.token_plan(dims, layout)
        if dims.cfg_degree * dims.data_degree == 1:
            self._reserve(model, token_plan, batches)
            return self._run(model, batches, model_options, token_plan, layout, pipeline)
        copy = layout.place_of(self.manager.rank).copy
        cfg, data, _, _ = dims.coordinates(copy)
        mine = rows_of(batches, dims, cfg, data)
        parts = [batches[i].select_conds(conds).select_samples(*samples) for i, conds, samples in mine]
        places = [(i, start) for i, _, (start, _) in mine]
        self._reserve(model, token_plan, parts)
        outs = self._run(model, parts, model_options, token_plan, layout, pipeline, places)
        group = self._copies_group(layout, dims.row_group(copy))
        return collect_rows(batches, dims, outs, functools.partial(self._gather_rows, group))

    def _reserve(self, model: Any, sharing: SharedPicture | None, batches: list[DenoiserBatch]) -> None:
        """Room for what the ranks of a token group send one another in these batches, the same for all of them."""
        inside = None if sharing is None or isinstance(sharing, SpatialPlan) else sharing.inside
        if inside is None or not batches or self._plan is None or self._plan.work is None:
            return
        work, rows = self._plan.work, max(batch.x.shape[0] for batch in batches)
        width = work.hidden_size // max(1, getattr(model.diffusion_model, "num_heads", 1)) * work.heads
        entries = entries_of_call(rows, work.tokens, width, work.heads, inside.size)
        self.transports.reserve(inside, entries, model)

    def _run(
        self,
        model: Any,
        batches: list[DenoiserBatch],
        model_options: dict[str, Any],
        shared: SharedPicture | None,
        layout: Layout,
        pipeline: StagePipeline | None = None,
        places: Sequence[Any] = (),
    ) -> list[torch.Tensor]:
        """Runs this rank's batches, with the denoiser call in their `transformer_options`. places: of which rows each is."""
        token_plan = None if isinstance(shared, SpatialPlan) else shared
        call = dit.DenoiserCall(plan=token_plan, layout=layout, pipeline=pipeline)
        self._eight_bit = store_of(model).multiplies_in
        slots = []
        if self.step_cache is not None and self._may_reuse(layout, pipeline):
            context = None if shared is None else id(shared)
            for i, batch in enumerate(batches):
                slots.append(self.step_cache.slot(model, batch, (places[i] if places else i, context)))
        calls = [dataclasses.replace(call, cache=slot) for slot in slots] or [call] * len(batches)
        batches = [batch.within(its) for batch, its in zip(batches, calls, strict=True)]
        with dit.fallback_call(call), self._fast(model, shared, captured=pipeline is None):
            outs = evaluate_serially(model, batches, model_options)
        if self.step_cache is not None:
            self.step_cache.note_step(slots)
        return outs

    def _may_reuse(self, layout: Layout, pipeline: StagePipeline | None) -> bool:
        """Whether ranks may decide by themselves which blocks of a call to compute."""
        if pipeline is None and layout.placement is not Placement.SHARDED:
            return True
        self._warn_once(
            f"the step cache (optimization.use_cache) is not used with weights {layout.describe()}, where all ranks have to "
            "compute the same blocks"
        )
        return False

    def _gather_rows(self, group: Any, flat: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        with self.clock.exchange():
            return group.all_gather(flat, counts)

    @contextlib.contextmanager
    def _fast(self, model: Any, shared: SharedPicture | None, captured: bool) -> Iterator[None]:
        """Inside, the model calls its network compiled and captured, if the configuration asks for it, and with rows.

        captured: whether the call can be: stages of a pipeline wait for one another at moments of their own.
        """
        network = model.diffusion_model
        if captured and self.runner.wanted and not replaced_parts(network):
            model.network_runner = self.runner.bound(model, shared)
        elif isinstance(shared, SpatialPlan):
            model.network_runner = shared.around(network)
        else:
            yield
            return
        try:
            yield
        finally:
            model.network_runner = None

    # --- statistics ------------------------------------------------------------------------------------------------

    def begin_run(self) -> None:
        """Before sampling, on all ranks."""
        self.runner.begin_run()
        self.pipelines.begin_run()
        self.clock.restart()
        if self.step_cache is not None:
            self._reused = self.step_cache.expected_share()
            self.step_cache.begin_run()
        self._plan = None
        self._streamed = self._all_ours = None
        self._started = time.perf_counter()

    def end_run(self) -> RunStatistics:
        """After sampling, on all ranks: gather every rank's times."""
        self.runner.end_run()
        ranks = self.lockstep.gather("statistics", self.clock.read())
        world = self.manager.world_size
        plan = self._plan or Plan(ParallelDims(replicas=world), (reason("off"),) if world > 1 else ())
        self.last_run = RunStatistics(
            plan=plan.dims.describe(),
            layout=self._layout[0].describe(),
            reason=plan.reason,
            reasons=[why.as_dict() for why in plan.reasons],
            working=world // plan.dims.replicas,
            predicted_ms=plan.predicted_ms,
            world_size=world,
            calls=int(ranks[0]["calls"]),
            seconds=time.perf_counter() - self._started,
            ranks=ranks,
            computed=None if self.step_cache is None else self.step_cache.steps.count(False),
            lossy=self._lossy(),
        )
        self._unsaid = self.last_run
        self._record(plan, self.last_run)
        return self.last_run

    def _record(self, plan: Plan, run: RunStatistics) -> None:
        """Keep what steps took beside what was predicted."""
        if self.records_file is None or plan.predicted_ms is None or plan.work is None or not run.calls:
            return
        work, device = plan.work, str(self.manager.describe()["name"])
        record = step_records.StepRecord(
            plan.network, work.conds, work.pictures, work.tokens, run.world_size, run.plan, plan.predicted_ms,
            round(run.mean_call_ms, 3), device=device,
        )  # fmt: skip
        step_records.add(self.records_file, record)
        run.one_rank_ms = step_records.one_rank_ms(self.records_file, record)

    def _lossy(self) -> list[str]:
        """What makes the results of this run others than those of its weights, for people."""
        found = [] if self._eight_bit is None else [f"linears in {self._eight_bit}"]
        found += [] if kernels.lossy_kernel() is None else [f"attention by {kernels.lossy_kernel()}"]
        found += self.pipelines.lossy()
        if self.step_cache is not None:
            found.append(f"{self.step_cache.settings.describe()}: {self.step_cache.text()}")
        return found

    def summary(self) -> str:
        """What the console says of the prompt that ended: its sampling, if there was any, and where its time went."""
        run, self._unsaid = self._unsaid, None
        parts = []
        if run is not None:
            expected = "" if run.predicted_ms is None else f" (predicted {run.predicted_ms:.1f})"
            where = run.plan if run.layout == "whole" else f"{run.plan}, weights {run.layout}"
            parts.append(f"{run.calls} steps of {run.mean_call_ms:.1f} ms{expected}, {where}")
            parts += filter(None, [run.waste() and f"{run.waste()}: {run.reason}"])
            parts += [] if run.speed_up is None else [f"{run.speed_up:.2f} times as fast as one rank"]
        if run is not None and run.lossy:
            parts.append(f"lossy: {', '.join(run.lossy)}")
        parts += filter(None, [accounting.current().text()])
        return "; ".join(["", *parts])

    def status(self) -> dict[str, Any]:
        """For `/taco_dit/status`."""
        return {
            "engine": self.config.optimization.engine,
            "lossy": [] if self.last_run is None else self.last_run.lossy,
            **self.runner.status(),
            "config": dataclasses.asdict(self.config),
            "layout": self._layout[0].describe(),
            "layout_reason": self._layout[1],
            "pipefusion": self.pipelines.status(),
            "active_plan": None if self._plan is None else self._plan.dims.describe(),
            "reason": None if self._plan is None else self._plan.reason,
            "reasons": [] if self._plan is None else [why.as_dict() for why in self._plan.reasons],
            "working": None if self._plan is None else self.manager.world_size // self._plan.dims.replicas,
            "workload": None if self._plan is None or self._plan.work is None else dataclasses.asdict(self._plan.work),
            "predicted_ms": None if self._plan is None else self._plan.predicted_ms,
            "exchange": self.transports.text,
            "machine": {"measured": self.profile.measured, "text": self.profile.describe()},
            "considered": [] if self._plan is None else self._plan.considered_as_dicts(),
            "total_calls": self.total_calls,
            "last_run": None if self.last_run is None else self.last_run.as_dict(),
        }


def _equal_calls(batches: Sequence[DenoiserBatch], dims: ParallelDims) -> bool:
    """Whether all row groups call the network equally often."""
    groups = [(cfg, data) for cfg in range(dims.cfg_degree) for data in range(dims.data_degree)]
    return len({len(rows_of(list(batches), dims, cfg, data)) for cfg, data in groups}) == 1


def _check_precision(precision: str, device: torch.device) -> None:
    """Raises ConfigError for linears in a format that a GPU does not multiply. CPUs compute with the same numbers in fp32."""
    if precision == "fp8" and device.type == "cuda" and not comfy.model_management.supports_fp8_compute(device):
        raise ConfigError(
            "optimization.linear_precision is 'fp8', which NVIDIA GPUs of compute capability 8.9 and newer multiply, and "
            f"{device} does not; allowed here: auto, bf16, int8"
        )


def _step_cache(optimization: OptimizationConfig) -> StepCache | None:
    """The step cache that is configured."""
    if not optimization.use_cache:
        return None
    return StepCache(
        CacheSettings(
            optimization.cache_mode,
            optimization.cache_threshold,
            optimization.cache_interval,
            optimization.cache_warm_up_steps,
        )
    )


def _fast_ways(optimization: OptimizationConfig, device: torch.device) -> tuple[bool, bool]:
    """(compile stages, capture CUDA graphs). auto: stages are not compiled, graphs are captured on CUDA."""
    cuda = device.type == "cuda"
    compile_stages, cuda_graph = optimization.use_torch_compile, optimization.use_cuda_graph
    return bool(compile_stages), cuda if cuda_graph is None else cuda_graph and cuda
