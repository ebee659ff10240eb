"""A faster way to call a network: its stages compiled, the whole call captured in a CUDA graph and replayed.

Both are on only when the configuration says so, and only for calls that are ours from end to end: a patch, a wrapper, a
ControlNet or weights that wait in host memory make the call run plainly. Results are those of the plain call up to the
rounding that fusing changes.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from typing import Any

import torch

from comfy.ldm import dit

MAX_GRAPHS = 4
WARMUP_CALLS = 2
_FOREIGN_OPTIONS = ("patches", "patches_replace", "optimized_attention_override")


def _signature(value: Any) -> Any:
    """What must be equal for a captured call to be repeated: shapes of tensors, values of everything else."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_signature(v) for v in value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(type(value).__name__)


Agree = Callable[[str], list[Any]]
Gather = Callable[[str, Any], list[Any]]


class CaptureError(RuntimeError):
    """Some rank could not capture the call."""


class _Captured:
    """One captured call: its input buffers, its graph, its output.

    `agree` tells whether every rank captured; a rank alone in having failed would leave the others waiting.
    """

    def __init__(
        self,
        network: Any,
        x: torch.Tensor,
        timestep: torch.Tensor,
        tensors: dict[str, Any],
        options: dict[str, Any],
        agree: Agree,
    ) -> None:
        self.inputs: dict[str, Any] = {"x": x.clone(), "timestep": timestep.clone(), "transformer_options": options}
        for name, value in tensors.items():
            self.inputs[name] = value.clone() if isinstance(value, torch.Tensor) else value
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                network(**self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        problem = ""
        try:
            # NCCL's watchdog queries events from its own thread, which the global mode would forbid.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = network(**self.inputs)
        except (RuntimeError, torch.AcceleratorError) as error:
            problem = str(error).splitlines()[0]
            torch.cuda.synchronize()
        problems = [text for text in agree(problem) if text]
        if problems:
            raise CaptureError(problems[0])

    def replay(self, x: torch.Tensor, timestep: torch.Tensor, tensors: dict[str, Any]) -> torch.Tensor:
        """The call on new values of the same shapes."""
        for name, value in {"x": x, "timestep": timestep, **tensors}.items():
            if isinstance(value, torch.Tensor):
                self.inputs[name].copy_(value, non_blocking=True)
        self.graph.replay()
        return self.output.clone()


class NetworkRunner:
    """Calls networks compiled and captured where that is safe. One per engine."""

    def __init__(self, compile_stages: bool, cuda_graph: bool) -> None:
        self.compile_stages = compile_stages
        self.cuda_graph = cuda_graph
        self._graphs: collections.OrderedDict[Any, _Captured] = collections.OrderedDict()
        self._confirmed: dict[Any, int | None] = {}
        """Calls seen in this run: the version of the weights for which all ranks replay, or None to run plainly."""
        self.busy = False
        """Whether a sampling run is under way; its graphs must stay then, for the other ranks count on them."""
        self._refused: set[Any] = set()
        self._said = False

    @property
    def wanted(self) -> bool:
        """Whether the configuration asks for anything here."""
        return self.compile_stages or self.cuda_graph

    def forget(self) -> None:
        """Drop all captured calls: weights or process groups changed, or their memory is needed."""
        self._graphs.clear()

    def release_memory(self) -> None:
        """Give up what graphs hold, unless a run is using them."""
        if self._graphs and not self.busy:
            self.forget()

    def begin_run(self) -> None:
        """Before sampling."""
        self._confirmed.clear()
        self.busy = True

    def end_run(self) -> None:
        """After sampling, also after a failure."""
        self.busy = False

    def bound(self, model: Any, context: Any, gather: Gather = lambda topic, value: [value]) -> Any:
        """A callable to stand in for `model.diffusion_model`; `context` identifies plan and process groups.

        `gather(topic, value)` gives the values of all ranks that make the same calls.
        """

        def run(x: torch.Tensor, timestep: torch.Tensor, **arguments: Any) -> torch.Tensor:
            return self._run(model, context, gather, x, timestep, arguments)

        return run

    def _run(
        self,
        model: Any,
        context: Any,
        gather: Gather,
        x: torch.Tensor,
        timestep: torch.Tensor,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        network = model.diffusion_model
        options = arguments.get("transformer_options") or {}
        ours = arguments.get("control") is None and not any(options.get(name) for name in _FOREIGN_OPTIONS)
        wrappers = options.get("wrappers", {}).get("diffusion_model", {})
        if not ours or any(wrappers.values()):
            return network(x, timestep, **arguments)
        if self.compile_stages and not self._said:
            self._said = True
            logging.info("TACO-DiT: compiling the network, once for each kind of model: the first step takes a while")
        with dit.compiled_stages(self.compile_stages):
            if not self.cuda_graph or x.device.type != "cuda":
                return network(x, timestep, **arguments)
            tensors = {k: v for k, v in arguments.items() if k not in ("transformer_options", "control")}
            try:
                signature = _signature([x, timestep, *(item for pair in sorted(tensors.items()) for item in pair)])
            except TypeError:
                return network(x, timestep, **arguments)
            call = (id(network), context, signature)
            if not self._agreed(call, model, gather):
                return network(x, timestep, **arguments)
            return self._replay((model.weights_version, *call), network, x, timestep, tensors, arguments, gather)

    def _agreed(self, call: Any, model: Any, gather: Gather) -> bool:
        """Whether this call may be captured or replayed.

        Capturing runs the network more often than replaying, so all ranks that make the call must do the same: at its
        first call of a run they compare whether each can (all weights on the GPU) and still has its graph, and capture
        anew unless all have. A rank whose weights move, or whose graph goes, during the run runs plainly: that
        exchanges as much as a replay does.
        """
        version = model.weights_version
        key = (version, *call)
        if call in self._confirmed:
            return self._confirmed[call] == version and key in self._graphs
        for old in [k for k in self._graphs if k[1] == call[0] and k[0] != version]:
            del self._graphs[old]  # it reads weights where they are no longer
        able = call not in self._refused and not getattr(model, "model_lowvram", False)
        answers = gather("graph", (able, key in self._graphs))
        self._confirmed[call] = version if all(able for able, _ in answers) else None
        if not all(present for _, present in answers):
            self._graphs.pop(key, None)
        return self._confirmed[call] is not None

    def _replay(
        self,
        key: Any,
        network: Any,
        x: torch.Tensor,
        timestep: torch.Tensor,
        tensors: dict[str, Any],
        arguments: dict[str, Any],
        gather: Gather,
    ) -> torch.Tensor:
        captured = self._graphs.get(key)
        if captured is None:
            try:
                options = arguments.get("transformer_options") or {}
                captured = _Captured(network, x, timestep, tensors, options, lambda text: gather("capture", text))
            except CaptureError as error:
                logging.warning("TACO-DiT: this call cannot be captured in a CUDA graph (%s); it runs without", error)
                self._refused.add(key[1:])
                return network(x, timestep, **arguments)
            self._graphs[key] = captured
            while len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return captured.replay(x, timestep, tensors)
