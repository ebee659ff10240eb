"""Gives networks the layout that is chosen for them when they are loaded.

`comfy.weights.loading` calls `Arranger.arrange` before it places a network. What is chosen stays with the network's
`WeightStore` (`arrangement`), and so with copies of the network.
"""

from __future__ import annotations

import fnmatch
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import comfy.families
import comfy.model_management
from comfy.families.base import Sizes, Split
from comfy.taco_dit.parallel.exchange import CollectiveExchange
from comfy.taco_dit.parallel.sharded_weights import ShardedWeights
from comfy.taco_dit.parallel.stage_weights import StageWeights
from comfy.taco_dit.parallel.tensor_parallel import TensorWeights
from comfy.weights.store import WeightStore, store_of
from comfy.weights.table import PLAIN_TENSORS
from comfy_execution.lockstep import Lockstep, is_alone

from .config_manager import TacoConfig
from .layout import Layout, NetworkFacts, Placement, choose_layout, layout_of

WHOLE = Layout()


@dataclass
class Declared:
    """A network of a model whose linears may be cut: its path in the model, how, and its blocks by name."""

    path: str
    network: nn.Module
    split_of: Callable[[str], Split | None]
    sizes: Sizes
    blocks: Mapping[str, nn.Module]


@dataclass
class Arrangement:
    """What a network was given; the store asks it for memory and tells it of changes."""

    layout: Layout
    reason: str
    weights: TensorWeights | ShardedWeights | StageWeights
    network: nn.Module | None

    @property
    def extra_bytes(self) -> int:
        """Bytes on the device beside the weights held."""
        return getattr(self.weights, "extra_bytes", 0)

    def changed(self) -> None:
        """Weights have other values."""
        if isinstance(self.weights, ShardedWeights):
            self.weights.changed()

    def release(self) -> None:
        """The network leaves its device."""
        if isinstance(self.weights, ShardedWeights):
            self.weights.release()

    def undo(self) -> None:
        """Give the network back as it was; the store is told separately."""
        self.weights.uninstall()
        if self.network is not None:
            vars(self.network).pop("layers_prepared", None)


def _network_of(model: Any) -> Any:
    """A model's diffusion transformer, or None."""
    network = getattr(model, "diffusion_model", None)
    network = getattr(network, "_orig_mod", network)
    return network if hasattr(network, "block_list") else None


def _declared(model: Any) -> Iterator[Declared]:
    """The networks of a model that declare splits: its diffusion transformer by the family's record, encoders by class."""
    network = _network_of(model)
    record = None if network is None else comfy.families.record_of(network)
    if record is not None and record.sizes is not None and record.sizes_from_tensors:
        blocks = {block.name: block.module for block in network.block_list() if block.own}
        inside = tuple(f"{name}." for name in blocks)

        def split_of(name: str, record: Any = record) -> Split | None:
            return record.split_of(name) if name.startswith(inside) else None

        yield Declared("diffusion_model.", network, split_of, record.sizes(network), blocks)
    for path, module in model.named_modules():
        splits = getattr(type(module), "splits", None)
        if isinstance(splits, Mapping) and network is None:

            def split_by_class(name: str, splits: Mapping[str, Split] = splits) -> Split | None:
                return next((s for pattern, s in splits.items() if fnmatch.fnmatchcase(name, pattern)), None)

            yield Declared(f"{path}." if path else "", module, split_by_class, module.sizes(), {})


class Arranger:
    """Chooses layouts and gives them to networks; one per engine."""

    def __init__(self, config: TacoConfig, manager: Any, lockstep: Lockstep, clock: Any) -> None:
        self.config, self._manager, self._lockstep, self._clock = config, manager, lockstep, clock
        self._said: set[str] = set()
        self._known_facts: weakref.WeakKeyDictionary[Any, NetworkFacts | None] = weakref.WeakKeyDictionary()

    def layout_of(self, model: Any) -> Layout:
        """The layout of a loaded model."""
        placement = layout_of(model).placement
        known = self._known(model)
        if known is None:
            return Layout(placement)
        if placement is Placement.WHOLE or known.layout.placement is Placement.SHARDED:
            return known.layout
        return replace(known.layout, placement=placement)

    def reason_of(self, model: Any) -> str:
        """Why a loaded model has its layout."""
        known = self._known(model)
        return "" if known is None else known.reason

    @staticmethod
    def _known(model: Any) -> Arrangement | None:
        known: Arrangement | None = getattr(vars(model).get("weight_store"), "arrangement", None)
        return known

    def arrange(self, patcher: Any, whole: bool = False) -> None:
        """Before a patcher's network is placed: choose its layout and prepare network and store for it.

        whole: the network is to be whole on each rank (to be saved, or trained). So it is in a node that runs on one rank
        only. All ranks must call together otherwise.
        """
        model = patcher.model
        if not isinstance(model, nn.Module):
            return
        known = self._known(model)
        if whole or is_alone() or self._manager.world_size == 1 or not self.config.parallel.enabled:
            if known is not None:
                self._give(model, None)
            return
        facts = self._facts(model, patcher.load_device)
        if facts is None:
            return
        layout, reason = choose_layout(
            self.config, facts, self._free(facts, patcher.load_device), self._manager.world_size
        )
        if reason and layout == WHOLE:
            self._say(f"{type(model).__name__}: {reason}", logging.WARNING)
        if (WHOLE if known is None else known.layout) == layout:
            return
        self._give(model, None)
        if layout != WHOLE:
            self._give(model, self._make(model, layout, reason))
            self._say(f"{type(model).__name__}: {layout.describe()} ({reason})")
        precision = self.config.optimization.linear_precision
        if layout.placement is Placement.SHARDED and precision in ("fp8", "int8"):
            self._say(
                f"{type(model).__name__}: only weights that are in {precision} in their file multiply in it "
                "(optimization.linear_precision), because parts of sharded weights are not quantised",
                logging.WARNING,
            )

    def check(self, model: Any) -> None:
        """Before a run. Raises ValueError where somebody has replaced parts of a network without which it cannot be cut."""
        known = self._known(model)
        if known is None:
            return
        replaced = known.weights.replaced(model)
        if replaced:
            raise ValueError(
                f"{', '.join(replaced[:3])}{' and others' if replaced[3:] else ''} of {type(model).__name__} were replaced by "
                f"a custom node, which cannot be combined with weights dealt over ranks ({known.layout.describe()}); set "
                "parallel.tensor_parallel, parallel.pipeline_parallel and memory.shard_weights to false for this workflow"
            )

    def _say(self, text: str, level: int = logging.INFO) -> None:
        if text not in self._said:
            self._said.add(text)
            if self._lockstep.is_first:
                logging.log(level, "TACO-DiT: %s", text)

    # --- facts -----------------------------------------------------------------------------------------------------

    def _facts(self, model: Any, device: torch.device) -> NetworkFacts | None:
        """What the choice depends on; None where there is nothing to choose."""
        if model not in self._known_facts:
            self._known_facts[model] = self._find_facts(model, device)
        return self._known_facts[model]

    def _find_facts(self, model: Any, device: torch.device) -> NetworkFacts | None:
        network, declared = _network_of(model), list(_declared(model))
        if not declared and network is None:
            return None
        store = store_of(model)

        def size(module: nn.Module, prefix: str) -> int:
            return sum(store.source(prefix + name).nbytes for name, _ in module.named_parameters())

        kinds = {type(store.source(name)) for name, _ in model.named_parameters()} - set(PLAIN_TENSORS)
        blocks = [] if network is None else [
            size(block.module, f"diffusion_model.{block.name}.") for block in network.block_list() if block.own
        ]  # fmt: skip
        # Of "auto" it depends on each rank's GPU, and all ranks have to choose alike.
        saved = 0 if store.linear_precision == "auto" else store.saving(device)
        return NetworkFacts(
            name=type(model).__name__,
            total_bytes=size(model, ""),
            saved_bytes=saved,
            block_bytes=tuple(blocks),
            block_costs=() if network is None else tuple(block.cost for block in network.block_list()),
            cuttable=bool(declared),
            packed=next((kind.__name__ for kind in kinds), None),
        )

    def _free(self, facts: NetworkFacts, device: torch.device) -> int | None:
        """Bytes that the smallest device of all ranks has for weights; None where they need no room (the CPU)."""
        fixed = self.config.memory.shard_weights is not None or self.config.parallel.tensor_parallel
        if not facts.block_bytes or fixed or device.type != "cuda" or not self._lockstep.together:
            return None
        management = comfy.model_management
        reserved = management.minimum_inference_memory() + management.extra_reserved_memory()
        return min(self._lockstep.gather("memory for weights", int(management.get_total_memory(device) - reserved)))

    # --- giving ----------------------------------------------------------------------------------------------------

    def _make(self, model: Any, layout: Layout, reason: str) -> Arrangement:
        manager, clock, store = self._manager, self._clock, store_of(model)
        place = layout.place_of(manager.rank)
        if layout.placement is Placement.SHARDED:
            network = _network_of(model)
            copies = layout.copies(manager.world_size)
            members = layout.ranks_of(range(copies), manager.rank)
            blocks = {f"diffusion_model.{b.name}": b.module for b in network.block_list() if b.own}
            sharded = ShardedWeights(
                copies, place.copy, lambda: manager.data.group(members, purpose="weights"), blocks, store
            )
            return Arrangement(layout, reason, sharded, network)
        weights = None
        if layout.tensor_degree > 1:
            members = layout.tensor_group(manager.rank)
            weights = TensorWeights(
                layout.tensor_degree, place.tensor, lambda: CollectiveExchange(manager.data.group(members), clock),
                own_tokens=_network_of(model) is None,
            )  # fmt: skip
            for each in _declared(model):
                weights.cut(each.network, each.split_of, each.sizes, each.blocks, store, each.path)
        if layout.stages == 1:
            assert weights is not None
            return Arrangement(layout, reason, weights, None)
        network = _network_of(model)
        blocks = {f"diffusion_model.{b.name}": b.module for b in network.block_list()}
        return Arrangement(layout, reason, StageWeights(blocks, layout.pipeline_stages, place.stage, weights), network)

    @staticmethod
    def _give(model: Any, arrangement: Arrangement | None) -> None:
        store: WeightStore = store_of(model)
        if store.arrangement is not None:
            store.arrangement.undo()
            store.arrangement = None
            store.hold({})
        if arrangement is not None:
            store.hold(arrangement.weights.held())
            store.arrangement = arrangement
            arrangement.weights.install()
            if arrangement.network is not None:  # blocks compute their modulations from the weights that are gathered
                vars(arrangement.network)["layers_prepared"] = False
