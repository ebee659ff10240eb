"""Network calls captured in CUDA graphs and replayed.

A call is launched kernel by kernel the first time, captured the second time and replayed from then on: a new picture
size costs the host's time of one call, a few hundredths of a second, and nothing is computed that is not used. Each
call makes exactly the exchanges with other ranks that its plain form makes, so ranks need not agree at each call
whether to capture; before a run they compare whether one of them lost or refused its graphs (`begin_run`).

Only calls that are ours from end to end are captured: a patch, a wrapper, a ControlNet, or weights that wait in host
memory make the call run plainly. So does a call of many seconds (`comfy.ldm.pace`): the time of its launches is nothing to
it, and a prompt that was cancelled can end inside it, which a graph does not allow.

A captured call belongs to the weights' memory (`WeightStore.layout_version`), the plan, the structure of its arguments
and the identity of every module it ran; all tensor arguments, nested ones too, are copied into its own buffers before
each replay.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import torch

from comfy import accounting
from comfy.ldm import dit
from comfy.ldm.modules import attention
from comfy.ldm.pace import is_long
from comfy.weights.store import store_of

from .signature import ModuleIdentity, NotCapturable, flatten, rebuild

MAX_GRAPHS = 8
_FOREIGN_OPTIONS = ("patches", "patches_replace", "optimized_attention_override")

Gather = Callable[[str, Any], list[Any]]


def _cache_of(options: dict[str, Any]) -> Any:
    """The step cache of a call, None without one."""
    return getattr(options.get(dit.CALL_KEY), "cache", None)


def _is_long(network: Any, context: Any, x: torch.Tensor) -> bool:
    """Whether a call on latents x [B, C, ..., h, w] under a token plan (or None) is to end when its prompt is cancelled."""
    patch = getattr(network, "patch_size", 1)
    tokens = math.prod(x.shape[2:]) // (patch if isinstance(patch, int) else patch[-1]) ** 2
    return is_long(x.shape[0], tokens // getattr(context, "size", 1), tokens)


def _called(network: Any, context: Any) -> Any:
    """What is called: the network, or what the plan puts around it (`SpatialPlan`)."""
    around = getattr(context, "around", None)
    return network if around is None else around(network)


def evaluate(network: Any, call: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
    """The network on latents and times, which it takes by position (families name the times differently), and the rest."""
    rest = {name: value for name, value in call.items() if name not in ("x", "timestep")}
    return network(call["x"], call["timestep"], **rest, transformer_options=options)


class Recording:
    """The graphs of one captured call, in the order in which they are replayed.

    It is one graph, unless the call forks: then that ends, each of two ways to go on has a graph of its own, of which each
    replay takes one, and another graph follows. All share one pool of memory; as they are captured in the order in which
    they are replayed, what one of them frees another may use.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._parts: list[tuple[Callable[[], bool] | None, list[Any]]] = []
        self._open: Any = None

    def _begin(self) -> None:
        graph: Any = torch.cuda.CUDAGraph()
        # NCCL's watchdog queries events from its own thread, which the global mode would forbid.
        self._open = graph, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        self._open[1].__enter__()

    def _end(self, *error: Any) -> Any:
        graph, capture = self._open
        self._open = None
        capture.__exit__(*(error or (None, None, None)))
        return graph

    def __enter__(self) -> Recording:
        self._begin()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._open is not None:
            self._parts.append((None, [self._end(*error)]))

    def fork(self, decide: Callable[[], bool], otherwise: Callable[[], None], chosen: Callable[[], None]) -> None:
        """Capture two ways to go on, which leave their results in memory that both know.

        Each replay asks `decide`, when the device has done all before it is launched: True takes `chosen`.
        """
        self._parts.append((None, [self._end()]))
        ways = []
        for way in (otherwise, chosen):
            self._begin()
            way()
            ways.append(self._end())
        self._parts.append((decide, ways))
        self._begin()

    def replay(self) -> None:
        """The call on what its buffers hold now."""
        for decide, graphs in self._parts:
            graphs[decide() if decide is not None else 0].replay()

    def reset(self) -> None:
        """Destroy the graphs."""
        for _, graphs in self._parts:
            for graph in graphs:
                graph.reset()


class Captured:
    """One captured call: its argument buffers, its graphs, its output.

    arguments: keyword arguments of the network; buffers of their tensors are made here. keep: objects whose addresses
    are part of the key under which the call is found.
    """

    def __init__(self, network: Any, arguments: dict[str, Any], options: Any, pool: Any, keep: tuple[Any, ...]) -> None:
        tensors: list[torch.Tensor] = []
        flatten(arguments, tensors)
        self.keep = keep
        self.buffers = [tensor.clone() for tensor in tensors]
        self.graph: Any = Recording(pool)
        own, cache = rebuild(arguments, list(self.buffers)), _cache_of(options)
        try:
            with self.graph:
                if cache is not None:
                    cache.recorder = self.graph
                self.output = evaluate(network, own, options)
        finally:
            if cache is not None:
                cache.recorder = None

    def replay(self, arguments: dict[str, Any]) -> torch.Tensor:
        """The call on new values. Raises ConnectionAbortedError when the graph was destroyed meanwhile."""
        tensors: list[torch.Tensor] = []
        flatten(arguments, tensors)
        for buffer, tensor in zip(self.buffers, tensors):
            buffer.copy_(tensor, non_blocking=True)
        graph = self.graph
        if graph is None:
            raise ConnectionAbortedError("this prompt was abandoned by another rank")
        graph.replay()
        return self.output.clone()

    def destroy(self) -> None:
        """Destroy the graph; from any thread. Process groups cannot be aborted while a graph refers to them."""
        graph, self.graph = self.graph, None
        if graph is not None:
            graph.reset()


class CapturedCalls:
    """The captured calls of one process, and the decision to capture. One per engine.

    gather: every rank's value on every rank (`Lockstep.gather`), called once before each run.
    """

    def __init__(
        self,
        compile_stages: bool,
        cuda_graph: bool,
        gather: Gather = lambda topic, value: [value],
    ) -> None:
        self._gather = gather
        self.compile_stages = compile_stages
        self.cuda_graph = cuda_graph
        self.busy = False
        """Whether a sampling run is under way; its graphs must stay then."""
        self._graphs: collections.OrderedDict[Any, Captured] = collections.OrderedDict()
        self._seen: set[Any] = set()
        self._identities: dict[int, ModuleIdentity] = {}
        self._checked: set[int] = set()
        self._dropped = 0  # how often graphs were dropped for a reason local to this rank
        self._refused = False
        self._pool: Any = None
        self._lock = threading.Lock()
        self.device_type = "cuda"

    @property
    def wanted(self) -> bool:
        """Whether the configuration asks for anything here."""
        return self.compile_stages or self.cuda_graph

    def status(self) -> dict[str, Any]:
        """For `/taco_dit/status`."""
        return {"cuda_graph": self.cuda_graph and not self._refused, "captured_calls": len(self._graphs)}

    # --- giving up -------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Destroy all captured calls; from any thread."""
        with self._lock:
            graphs, self._graphs = self._graphs, collections.OrderedDict()
            self._seen.clear()
            self._identities.clear()
            self._pool = None
        for captured in graphs.values():
            captured.destroy()

    def release_memory(self) -> None:
        """Free the memory of captured calls, unless a run is using them."""
        if self._graphs and not self.busy:
            self._dropped += 1
            self.forget()

    # --- runs ------------------------------------------------------------------------------------------------------

    def begin_run(self) -> None:
        """Before sampling, on all ranks. If one rank lost its graphs, all ranks capture again."""
        self._checked.clear()
        self.busy = True
        if not self.cuda_graph:
            return
        answers = self._gather("captured calls", (self._dropped, self._refused))
        if any(dropped != answers[0][0] for dropped, _ in answers):
            self.forget()
        self._dropped = max(dropped for dropped, _ in answers)
        if any(refused for _, refused in answers) and not self._refused:
            self._refused = True
            self.forget()

    def end_run(self) -> None:
        """After sampling, also after a failure."""
        self.busy = False

    # --- calls -----------------------------------------------------------------------------------------------------

    def bound(self, model: Any, context: Any) -> Callable[..., torch.Tensor]:
        """A callable to stand in for `model.diffusion_model`; `context` is the plan, with its process groups."""

        def run(x: torch.Tensor, timestep: torch.Tensor, **arguments: Any) -> torch.Tensor:
            options = arguments.pop("transformer_options", None) or {}
            ours = arguments.get("control") is None and not any(options.get(name) for name in _FOREIGN_OPTIONS)
            wrappers = options.get("wrappers", {}).get("diffusion_model", {})
            call = {"x": x, "timestep": timestep, **arguments}
            if not ours or any(wrappers.values()):
                return self._plain(_called(model.diffusion_model, context), call, options)
            compiling = dit.compiled_stages(True) if self.compile_stages else contextlib.nullcontext()
            with compiling:
                return self._run(model, context, call, options)

        return run

    def _plain(self, network: Any, call: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
        accounting.count("calls_plain")
        return evaluate(network, call, options)

    def _run(self, model: Any, context: Any, call: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
        network = _called(model.diffusion_model, context)
        cache = _cache_of(options)
        key = self._key(model, context, call)
        if key is None:
            return self._plain(network, call, options)
        key = (*key, None if cache is None else cache.identity)
        captured = self._graphs.get(key)
        if captured is None:
            if key not in self._seen:
                self._seen.add(key)
                return self._plain(network, call, options)
            captured = self._capture(key, network, call, options, (network, context, cache))
            if captured is None:
                return self._plain(network, call, options)
        accounting.count("calls_replayed")
        self._graphs.move_to_end(key)
        return captured.replay(call)

    def _key(self, model: Any, context: Any, call: dict[str, Any]) -> Any:
        """The key of a captured call, or None when it is not to be captured."""
        device = call["x"].device
        if not self.cuda_graph or self._refused or device.type != self.device_type:
            return None
        if store_of(model).partly_loaded:
            return None
        network = model.diffusion_model
        if _is_long(network, context, call["x"]):
            return None
        if id(network) not in self._checked and not self._unchanged(network):
            return None
        try:
            structure = flatten(call, [])
        except NotCapturable:
            return None
        version = store_of(model).layout_version
        return id(network), version, id(context), id(attention.optimized_attention), structure

    def _unchanged(self, network: Any) -> bool:
        """Once a run: whether the network may be captured; calls of modules it no longer has are dropped."""
        identity = ModuleIdentity(network)
        known = self._identities.get(id(network))
        if known is not None and not known.same(identity):
            self._drop(lambda key: key[0] == id(network))
        self._identities[id(network)] = identity
        if identity.hooked:
            return False
        self._checked.add(id(network))
        return True

    def _drop(self, which: Callable[[Any], bool]) -> None:
        with self._lock:
            gone = [self._graphs.pop(key) for key in list(self._graphs) if which(key)]
            self._seen = {key for key in self._seen if not which(key)}
        for captured in gone:
            captured.destroy()

    def _capture(
        self, key: Any, network: Any, call: dict[str, Any], options: dict[str, Any], keep: tuple[Any, ...]
    ) -> Captured | None:
        """Capture a call that ran plainly before; None, and no more captures on any rank, when that fails."""
        self._drop(
            lambda other: other[0] == key[0] and other[1] != key[1]
        )  # they read addresses that weights have left
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with accounting.phase("capture"):
                captured = Captured(network, call, options, self._pool, keep)
        except (RuntimeError, torch.AcceleratorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            torch.cuda.synchronize()
            self._refused = True
            logging.warning(
                "TACO-DiT: this call cannot be captured in a CUDA graph (%s); calls run without graphs from now on",
                str(error).splitlines()[0],
            )
            return None
        accounting.count("calls_captured")
        with self._lock:
            self._graphs[key] = captured
            old = [self._graphs.popitem(last=False)[1] for _ in range(len(self._graphs) - MAX_GRAPHS)]
        for each in old:
            each.destroy()
        return captured
