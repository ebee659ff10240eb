"""Networks cut over ranks, for tests: as the engine does it, without an engine."""

from __future__ import annotations

import torch

import comfy.lora
from comfy.families import record_of
from comfy.ldm import dit
from comfy.taco_dit.core.layout import Layout
from comfy.taco_dit.core.plan import ParallelDims
from comfy.taco_dit.parallel.exchange import CollectiveExchange
from comfy.taco_dit.parallel.ring_parallel import native_plan
from comfy.taco_dit.parallel.sequence_parallel import UlyssesPlan
from comfy.taco_dit.parallel.tensor_parallel import TensorPlan, TensorWeights
from comfy.weights.store import store_of


def cut(network, manager, degree):
    """The network with its linears cut over each `degree` ranks; only this rank's parts are in its memory."""
    layout, record = Layout(tensor_degree=degree), record_of(network)
    members = layout.tensor_group(manager.rank)
    weights = TensorWeights(
        degree, members.index(manager.rank), lambda: CollectiveExchange(manager.data.group(members))
    )
    blocks = {block.name: block.module for block in network.block_list()}
    store, inside = store_of(network), tuple(f"{name}." for name in blocks)

    def split_of(name):
        return record.split_of(name) if name.startswith(inside) else None

    weights.cut(network, split_of, record.sizes(network), blocks, store)
    store.hold(weights.held())
    store.place(torch.device("cpu"), {}, comfy.lora.calculate_weight)
    weights.install()
    return network


def call_for(manager, degree, ulysses=1, ring=1):
    """A denoiser call of networks that are cut, with their tokens over `ulysses * ring` copies."""
    layout = Layout(tensor_degree=degree)
    dims = ParallelDims(ulysses_degree=ulysses, ring_degree=ring)
    inside = None
    if ulysses * ring > 1:

        def group(copies):
            return manager.data.group(layout.ranks_of(copies, manager.rank))

        inside = native_plan(group, dims, layout.place_of(manager.rank).copy)
    among = UlyssesPlan(CollectiveExchange(manager.data.group(layout.tensor_group(manager.rank))))
    return dit.DenoiserCall(TensorPlan(inside, among), layout=layout)
