"""What one call of a network costs, per token and per picture: read from its blocks and the shapes of its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# Of a convolutional network most weights work at a quarter of the latent's resolution, on each axis.
UNET_SHARE = 1 / 16
_QK_NORM = re.compile(r"(norm_[qk]|[qk]_norm)")

# How many times as fast as in bf16 linears multiply: FLUX.1-dev on one H200 (docs/benchmarks.md). int8 is slower there.
EIGHT_BIT_RATES = {"fp8": 1.6, "int8": 0.5}


@dataclass(frozen=True)
class NetworkCost:
    """A diffusion network.

    hidden: channels of a token. heads, head_size: of its attention. blocks: how many meet in attention.
    linear_flops: of all blocks together, for each token. once_bytes: weights that are read once a call, whatever the number
    of tokens (modulations). weight_bytes: all weights. block_bytes: those of the largest block. tensor_bytes: weights that
    tensor parallelism cuts. sums: outputs that tensor parallelism adds up over ranks, of all blocks. unet: whether
    tokens are latent pixels of a convolutional network. norms: norms over all heads together, whose sums tensor parallelism
    adds up over ranks, of all blocks. linear_rate: how many times as fast as in bf16 linears multiply (eight bits).
    reused: the share of calls in which a step cache reuses what blocks after the first add. Of UNets: row_layers, layers that
    exchange rows or statistics where rows of pictures are shared; attentions among cells, and keys: the channels of their
    keys and values together.
    """

    name: str
    hidden: int
    heads: int
    head_size: int
    blocks: int
    linear_flops: float
    once_bytes: float
    weight_bytes: float
    block_bytes: float
    tensor_bytes: float
    sums: int
    unet: bool = False
    norms: int = 0
    linear_rate: float = 1.0
    reused: float = 0.0
    row_layers: int = 0
    attentions: int = 0
    keys: int = 0

    @property
    def inner(self) -> int:
        """Channels of attention."""
        return self.heads * self.head_size


def transformer(
    name: str, hidden: int, heads: int, blocks: int, *, mlp_ratio: float = 4.0, streams: int = 1, double: int = 0,
    once: float = 0.0, rest: float = 0.0, crossing: int = 0,
) -> NetworkCost:  # fmt: skip
    """A transformer of usual blocks in bf16, from its sizes.

    hidden: a token's channels. blocks: all of them, `double` of which have weights of their own for each of `streams`
    streams. mlp_ratio: MLP width over hidden, two matrices. crossing: linears of hidden x hidden that a token passes in
    cross-attention. once, rest: weights used once a call, and others that tokens do not pass.
    """
    per_token = (4 + 2 * mlp_ratio + crossing) * hidden**2
    parts = double * streams + blocks - double
    weights = per_token * parts
    largest = (per_token + once / parts) * (streams if double else 1)
    sums = 2 * double + (blocks - double) * (1 if double else 2 + (crossing > 0))
    return NetworkCost(
        name, hidden, heads, hidden // heads, blocks, 2 * per_token * blocks, 2 * once, 2 * (weights + once + rest),
        2 * largest, 2 * (weights + once), sums,
    )  # fmt: skip


def typical(hidden: int, heads: int) -> NetworkCost:
    """A transformer of these sizes of which nothing else is known."""
    return transformer("transformer", hidden, heads, 30)


def of_network(network: Any) -> NetworkCost:
    """The costs of a loaded network: from its `block_list()` and its family's splits, else from its number of weights."""
    from comfy.families import record_of

    hidden = int(getattr(network, "hidden_size", 0) or getattr(network, "model_channels", 0) or 1024)
    heads = int(getattr(network, "num_heads", 0)) or max(1, hidden // 64)
    parameters = dict(network.named_parameters())
    everything = sum(p.numel() * p.element_size() for p in parameters.values())
    kind = type(network).__name__
    if not hasattr(network, "block_list"):
        flops = 2 * sum(p.numel() for p in parameters.values()) * UNET_SHARE
        return NetworkCost(kind, hidden, heads, max(1, hidden // heads), 16, flops, 0, everything, everything / 16,
                           everything, 32, unet=True, **_layers_of_unet(network))  # fmt: skip
    record = record_of(network)
    flops = once = largest = cut = sums = norms = 0.0
    blocks = network.block_list()
    for block in blocks:
        streams = max(1, len(block.arguments.tokens))
        own = 0.0
        for name, weight in block.module.named_parameters():
            size = weight.numel() * weight.element_size()
            own += size
            if weight.ndim < 2:
                norms += weight.numel() == hidden and _QK_NORM.search(name) is not None
                continue
            split = _split(record, f"{block.name}.{name.removesuffix('.weight')}")
            if split in ("whole", "gathered"):  # of per-sample tensors
                once += size
                cut += size * (split == "gathered")
                continue
            flops += 2 * weight.numel() / streams
            cut += size
            sums += (split == "row") / streams
        largest = max(largest, own)
    return NetworkCost(
        kind, hidden, heads, hidden // heads, len(blocks), flops, once, everything, largest, cut, round(sums),
        norms=round(norms),
    )  # fmt: skip


def _layers_of_unet(network: Any) -> dict[str, int]:
    """What costs exchanges where rows of pictures are shared."""
    found = {"row_layers": 0, "attentions": 0, "keys": 0}
    for name, module in network.named_modules():
        kernel = getattr(module, "kernel_size", ())
        found["row_layers"] += max(kernel if isinstance(kernel, tuple) else (kernel,), default=1) > 1
        found["row_layers"] += hasattr(module, "num_groups")
        if name.endswith(".attn1") and hasattr(module, "to_k"):
            found["attentions"] += 1
            found["keys"] += module.to_k.out_features + module.to_v.out_features
    return found


def _split(record: Any, name: str) -> str:
    """How a linear is cut; linears of which nothing is declared are taken for modulations if they are called so."""
    try:
        return record.split_of(name).kind if record is not None else ("whole" if "mod" in name else "column")
    except KeyError:
        return "whole" if "mod" in name else "column"


# Published sizes of known networks: hidden, heads, blocks and MLP as in the authors' configurations (model cards and
# config.json of the transformers), weights of modulations and embedders from their parameter counts.
KNOWN = {
    "flux-dev": (transformer("FLUX.1-dev", 3072, 24, 57, streams=2, double=19, once=342 * 3072**2, rest=0.07e9), 512),
    "flux-schnell": (transformer("FLUX.1-schnell", 3072, 24, 57, streams=2, double=19, once=342 * 3072**2,
                                 rest=0.06e9), 256),
    "sd3-medium": (transformer("SD3-medium", 1536, 24, 24, streams=2, double=24, once=288 * 1536**2, rest=0.06e9), 333),
    "sd3.5-large": (transformer("SD3.5-large", 2432, 38, 38, streams=2, double=38, once=456 * 2432**2, rest=0.1e9), 333),
    "qwen-image": (transformer("Qwen-Image", 3072, 24, 60, streams=2, double=60, once=720 * 3072**2, rest=0.1e9), 256),
    "wan-14b": (transformer("Wan2.1-14B", 5120, 40, 40, mlp_ratio=2.7, crossing=2, rest=2.4e9), 0),
}  # fmt: skip
"""By name: (costs, tokens of text that take part in attention)."""


def known(name: str) -> tuple[NetworkCost, int]:
    """A network of `KNOWN`. Raises ValueError."""
    if name not in KNOWN:
        raise ValueError(f"model {name!r} is not known; known: {', '.join(KNOWN)}")
    return KNOWN[name]
