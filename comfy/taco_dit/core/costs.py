"""Predicted time and memory of one denoiser call under a layout and degrees: a roofline with measured rates.

Computing: matrix products and attention at the rate of their size, passes over memory, weights that are read once a call;
never less than launching its kernels takes. Communication: bytes over the slowest links, and a latency for each
collective. Formulas, for N tokens of h channels in bf16, one block, per rank: Ulysses over n ranks sends 8 N/n h (n-1)/n
bytes in two exchanges; a ring passes 4 N/n h bytes n - 1 times; tensor parallelism gathers and reduce-scatters 2 N h (n-1)/n
bytes each for every sum; sharded weights gather the block's bytes; rows of pictures send halos and gather keys and values.
(Jacobs et al. 2023; Liu et al. 2023; Korthikanti et al. 2022.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .degrees import ParallelDims, Workload
from .layout import Layout, Placement
from .machine_profile import MachineProfile, rate_at
from .network_cost import UNET_SHARE, NetworkCost

# Calibration, by FLUX.1-dev's step on one H100 and H200 (docs/benchmarks.md).
SUSTAINED = 0.9
"""Of the rates of a short measurement what a long run reaches: the power limit."""
_PASSES = 18
"""Reads and writes of the hidden state in a block outside matrix products and attention (norms, rotation, gates)."""
_MERGE_BYTES = 16
"""Bytes read and written for each token and channel when a ring merges outputs by their log-sum-exp, in fp32."""
_KERNELS = 16
"""Kernels of a block."""
_ALIVE = 20
"""Tensors of a hidden state's size that are alive within a block: queries, keys, values, the MLP, buffers of exchanges."""
_PREDICTION_BYTES = 256
"""Bytes of prediction for each token when rows are gathered: 64 values in fp32."""


@dataclass(frozen=True)
class Estimate:
    """Milliseconds of one call on the slowest rank. `waiting`: time in which ranks of a pipeline have nothing to do."""

    compute: float
    exchange: float
    weights: float = 0.0
    waiting: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.exchange + self.weights + self.waiting

    def parts(self) -> str:
        """`compute 70.1 + exchange 8.3 ms`."""
        named = {"compute": self.compute, "exchange": self.exchange, "weights": self.weights, "waiting": self.waiting}
        return " + ".join(f"{name} {value:.1f}" for name, value in named.items() if value >= 0.05) + " ms"


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    weights: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.activations


def rows_of_rank(dims: ParallelDims, work: Workload) -> int:
    """Conditionings x pictures of the busiest rank."""
    return math.ceil(work.conds / dims.cfg_degree) * math.ceil(work.pictures / dims.data_degree)


def _compute(
    network: NetworkCost, work: Workload, dims: ParallelDims, tensor: int, rows: int, profile: MachineProfile
) -> float:
    """Milliseconds of all blocks on the slowest device, whatever their number of stages."""
    tokens = math.ceil(work.tokens / dims.picture_degree)
    heads = math.ceil(network.heads / (dims.ulysses_degree * tensor))
    queries = math.ceil(work.tokens / (dims.ring_degree * dims.spatial_degree))
    attention = 4 * rows * heads * network.head_size * queries * work.tokens * network.blocks
    passes = rows * tokens * network.hidden * 2 * _PASSES * network.blocks + network.once_bytes / dims.sequence_degree
    if dims.ring_degree > 1:
        merges = dims.ring_degree - 1
        passes += merges * rows * queries * heads * network.head_size * _MERGE_BYTES * network.blocks
    slowest = 0.0
    for device in profile.devices:
        linear = rows * tokens * network.linear_flops / tensor / rate_at(device.matrix, rows * tokens)
        linear /= network.linear_rate
        met = attention / rate_at(device.attention, rows * heads * queries)
        slowest = max(slowest, (linear + met) / 1e9 + passes / device.memory_gbs / 1e6)
    return max(slowest / SUSTAINED, network.blocks * _KERNELS * profile.launch_us / 1e3)


def _token_exchange(network: NetworkCost, work: Workload, dims: ParallelDims, layout: Layout, rows: int,
                    profile: MachineProfile) -> float:  # fmt: skip
    """Milliseconds in which tokens and heads travel, on the slowest group."""
    inner = rows * work.tokens / dims.sequence_degree * network.inner / layout.tensor_degree * 2
    slowest = 0.0
    for copy in range(dims.world_size):
        spent = 0.0
        if dims.ulysses_degree > 1:
            group = [member * layout.ranks for member in dims.ulysses_group(copy)]
            away = (dims.ulysses_degree - 1) / dims.ulysses_degree
            spent += profile.all_to_all_ms(group, 3 * inner * away) + profile.all_to_all_ms(group, inner * away)
        if dims.ring_degree > 1:
            group = [member * layout.ranks for member in dims.ring_group(copy)]
            spent += (dims.ring_degree - 1) * profile.shift_ms(group, 2 * inner)
        slowest = max(slowest, spent)
    return slowest * network.blocks


def _spatial_exchange(network: NetworkCost, work: Workload, dims: ParallelDims, rows: int,
                      profile: MachineProfile) -> float:  # fmt: skip
    """Milliseconds of halos, statistics, keys and values of a UNet, on the slowest group."""
    if dims.spatial_degree == 1:
        return 0.0
    cells = rows * work.tokens * UNET_SHARE
    halo = 4 * rows * math.sqrt(work.tokens * UNET_SHARE) * network.hidden * 2
    slowest = 0.0
    for copy in range(0, dims.world_size, dims.spatial_degree):
        group = dims.token_group(copy)
        spent = network.row_layers * profile.all_to_all_ms(group, halo)
        if network.attentions:
            one = profile.all_gather_ms(group, cells * network.keys / network.attentions * 2)
            spent += network.attentions * one
        slowest = max(slowest, spent)
    return slowest


def _row_gather(work: Workload, dims: ParallelDims, layout: Layout, profile: MachineProfile) -> float:
    if dims.cfg_degree * dims.data_degree == 1:
        return 0.0
    group = [member * layout.ranks for member in dims.row_group(0)]
    return profile.all_gather_ms(group, work.conds * work.pictures * work.tokens * _PREDICTION_BYTES)


def _tensor_exchange(network: NetworkCost, work: Workload, dims: ParallelDims, layout: Layout, rows: int,
                     profile: MachineProfile) -> float:  # fmt: skip
    """A gather before and a reduce-scatter after what is summed, for every sum of every block; sums of squares of norms."""
    if layout.tensor_degree == 1:
        return 0.0
    tokens = math.ceil(work.tokens / dims.sequence_degree)
    group = range(layout.tensor_degree)
    one = profile.all_gather_ms(group, rows * tokens * network.hidden * 2)
    return 2 * one * network.sums + network.norms * profile.all_gather_ms(group, rows * tokens * 4)


def _gathered_weights(network: NetworkCost, ranks: int, profile: MachineProfile) -> float:
    one = profile.all_gather_ms(range(ranks), network.weight_bytes / network.blocks)
    return one * network.blocks


def _beside(transfer: float, compute: float, overlap: float) -> float:
    """What is left of a transfer of which as much proceeds during `compute` as the transport allows."""
    return max(0.0, transfer - overlap * compute)


def estimate(
    network: NetworkCost, work: Workload, dims: ParallelDims, profile: MachineProfile, layout: Layout | None = None,
    streamed: float = 0.0,
) -> Estimate:  # fmt: skip
    """Time of one call. `streamed`: bytes of weights that come from host memory in each call, while blocks compute.

    dims distributes work over the copies of the network that `layout` leaves (default: every rank has a whole one).
    """
    layout = layout or Layout()
    rows = rows_of_rank(dims, work)
    stages = max(1, len(layout.pipeline_stages))
    batch = 1 if stages > 1 else rows  # a pipeline takes one row after another
    compute = _compute(network, work, dims, layout.tensor_degree, batch, profile)
    exchange = _token_exchange(network, work, dims, layout, batch, profile)
    exchange += _tensor_exchange(network, work, dims, layout, batch, profile)
    exchange += _spatial_exchange(network, work, dims, batch, profile)
    computed = 1 - network.reused * (1 - 1 / network.blocks)
    compute, exchange = computed * compute, computed * exchange
    waiting = 0.0
    if stages > 1:
        longest = max(stop - start for start, stop in layout.pipeline_stages) / network.blocks
        handed = batch * work.tokens / dims.sequence_degree * network.hidden * 2
        step, between = longest * compute, longest * exchange + profile.shift_ms(range(stages), handed)
        compute, exchange, waiting = rows * step, (rows + stages - 1) * between, (stages - 1) * step
    exchange = _beside(exchange, compute, profile.overlap) + _row_gather(work, dims, layout, profile)
    weights = 0.0
    if layout.placement is Placement.SHARDED:
        weights = _beside(_gathered_weights(network, dims.world_size, profile), compute, profile.overlap)
    elif layout.placement is Placement.OFFLOADED:
        weights = _beside(streamed / profile.host_gbs / 1e6, compute + exchange, 1.0)  # copy engines
    return Estimate(compute, exchange, weights, waiting)


def pipefusion_ms(network: NetworkCost, work: Workload, stages: int, profile: MachineProfile) -> float:
    """A call under PipeFusion (Fang et al. 2024) in steady state: `stages` patches of each row in flight, no bubbles;
    every patch's activations go to the next stage, while attention uses keys and values of the step before."""
    rows = work.conds * work.pictures
    # A stage passes each patch through 1/stages of the blocks: as much work as 1/stages of the tokens in all blocks.
    compute = _compute(network, work, ParallelDims(ulysses_degree=stages), 1, rows, profile)
    handed = profile.shift_ms(range(stages), rows * work.tokens / stages * network.hidden * 2)
    return compute + stages * handed


def memory(network: NetworkCost, work: Workload, dims: ParallelDims, layout: Layout | None = None) -> Memory:
    """Bytes on the fullest device when all weights are there that the layout puts there."""
    layout = layout or Layout()
    weights = network.weight_bytes - network.tensor_bytes * (1 - 1 / layout.tensor_degree)
    if layout.pipeline_stages:
        longest = max(stop - start for start, stop in layout.pipeline_stages)
        weights *= longest / network.blocks
    if layout.placement is Placement.SHARDED:
        weights = weights / dims.world_size + 2 * network.block_bytes  # the block at work and the one that comes
    rows = 1 if len(layout.pipeline_stages) > 1 else rows_of_rank(dims, work)
    tokens = math.ceil(work.tokens / dims.picture_degree)
    return Memory(weights, _ALIVE * rows * tokens * network.hidden * 2)
