"""Attention: the only place where tokens are combined.

`attention` is what networks call: `AttentionSpec` says which tokens attend to which, `DenoiserCall` how they are spread
over ranks. On one rank it is `optimized_attention`, ComfyUI's name for "the best kernel there is". Custom nodes replace
`optimized_attention` (by assignment, or per call through `transformer_options["optimized_attention_override"]`); both
see all tokens of the heads they are given, in the order of whole streams.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import comfy.model_management
from comfy.ldm.dit_state import Compute, DenoiserCall, Meeting, Tokens
from comfy.ldm.modules import attention_choice, kernels
from comfy.ldm.modules.kernels import describe_backend, masked, scaled_dot_product, use_fused_attention
from comfy.missing import missing_names

__all__ = ["describe_backend", "scaled_dot_product", "use_fused_attention"]  # from kernels, for users of this module

REGISTERED_ATTENTION_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {}


def register_attention_function(name: str, func: Callable[..., torch.Tensor]) -> None:
    """Offer an attention function under a name; a later registration of the same name is ignored."""
    if name in REGISTERED_ATTENTION_FUNCTIONS:
        logging.warning("attention function %s is registered already; the first one stays", name)
        return
    REGISTERED_ATTENTION_FUNCTIONS[name] = func


def get_attention_function(name: str, default: Any = ...) -> Any:
    """A registered attention function; `optimized` is the one in use. Raises KeyError without a default."""
    if name == "optimized":
        return optimized_attention
    if name in REGISTERED_ATTENTION_FUNCTIONS:
        return REGISTERED_ATTENTION_FUNCTIONS[name]
    if default is ...:
        raise KeyError(f"no attention function {name!r}; known: {', '.join(REGISTERED_ATTENTION_FUNCTIONS)}")
    return default


def wrap_attn(func: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let `transformer_options["optimized_attention_override"]` stand in for an attention function.

    The override is called `override(func, *args, **kwargs)`; calls it makes to `func` are not overridden again.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not kwargs.pop("_inside_attn_wrapper", False):
            options = kwargs.get("transformer_options") or {}
            override = options.get("optimized_attention_override")
            if override is not None:
                return override(functools.partial(wrapper, _inside_attn_wrapper=True), *args, **kwargs)
        return func(*args, **kwargs)

    return wrapper


def _split_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, skip_reshape: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, L, H*D] -> [B, H, L, D], unless already so."""
    if skip_reshape:
        return q, k, v
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return q, k, v


def _join_heads(out: torch.Tensor, skip_output_reshape: bool) -> torch.Tensor:
    """[B, H, L, D] -> [B, L, H*D], unless asked not to."""
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def broadcast_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """[L, S] or [B, L, S] -> [B or 1, 1, L, S]."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask.unsqueeze(0).unsqueeze(0)
    return mask.unsqueeze(1) if mask.ndim == 3 else mask


@wrap_attn
def attention_pytorch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention on torch's fused kernels.

    q, k, v: [B, L, H*D], or [B, H, L, D] with `skip_reshape`. Returns [B, L, H*D], or [B, H, L, D] with
    `skip_output_reshape`. `mask` is boolean (True = attend) or added to the scores.
    """
    q, k, v = _split_heads(q, k, v, heads, skip_reshape)
    return _join_heads(scaled_dot_product(q, k, v, broadcast_mask(mask)), skip_output_reshape)


@wrap_attn
def attention_basic(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention written out; scores in fp32 when `attn_precision` asks for it. Shapes as `attention_pytorch`."""
    q, k, v = _split_heads(q, k, v, heads, skip_reshape)
    if attn_precision == torch.float32:
        q, k = q.float(), k.float()
    scores = masked(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, broadcast_mask(mask))
    return _join_heads(scores.softmax(-1).to(v.dtype) @ v, skip_output_reshape)


@wrap_attn
def attention_split(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention a slice of queries at a time, for little memory. Shapes as `attention_pytorch`."""
    q, k, v = _split_heads(q, k, v, heads, skip_reshape)
    mask = broadcast_mask(mask)
    if attn_precision == torch.float32:
        q, k = q.float(), k.float()
    step = max(1, min(q.shape[2], (1 << 26) // max(1, q.shape[0] * q.shape[1] * k.shape[2])))
    parts = []
    for start in range(0, q.shape[2], step):
        if not q.is_cuda:
            comfy.model_management.throw_exception_if_processing_interrupted()
        rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start : start + step]
        parts.append(F.scaled_dot_product_attention(q[:, :, start : start + step], k, v.to(q.dtype), attn_mask=rows))
    return _join_heads(torch.cat(parts, dim=2).to(v.dtype), skip_output_reshape)


def _by_package(name: str) -> Callable[..., torch.Tensor]:
    """An attention function on the kernels of an optional package, or on torch's where there is none or it does not fit."""

    @wrap_attn
    def call(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        q, k, v = _split_heads(q, k, v, heads, skip_reshape)
        out = kernels.run_by(attention_choice.kernel_of_package(name), q, k, v, broadcast_mask(mask))
        return _join_heads(out, skip_output_reshape)

    call.__name__ = call.__qualname__ = f"attention_{name}"
    return call


attention_sage = _by_package("sage")
attention_flash = _by_package("flash")
attention_sub_quad = attention_split
attention_xformers = attention_pytorch

for _name, _function in (
    ("pytorch", attention_pytorch),
    ("basic", attention_basic),
    ("split", attention_split),
    ("sub_quad", attention_sub_quad),
    ("sage", attention_sage),
    ("flash", attention_flash),
):
    _function.rows_independent = True  # type: ignore[attr-defined]
    if attention_choice.is_installed(_name):
        register_attention_function(_name, _function)

optimized_attention: Callable[..., torch.Tensor] = attention_pytorch
optimized_attention_masked: Callable[..., torch.Tensor] = attention_pytorch


def optimized_attention_for_device(
    device: torch.device, mask: bool = False, small_input: bool = False
) -> Callable[..., torch.Tensor]:
    """The attention function to use on `device`."""
    if small_input:
        return attention_pytorch
    return optimized_attention_masked if mask else optimized_attention


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Who attends to whom in one attention.

    heads: query heads H. queries, keys: the tokens on either side; keys are those of the queries unless said otherwise.
    mask: for whole streams, on every rank, [Lq, Lk], [B, Lq, Lk] or [B, H or 1, Lq, Lk] with Lq possibly 1; boolean
    (True = attend) or added to the scores. kv_heads: heads of keys and values, a divisor of H (grouped queries, Ainslie
    et al. 2023). layer: what identifies the attention in its network, for strategies that keep keys and values between
    calls. causal: query i attends to keys 0 .. i only.
    """

    heads: int
    queries: Tokens
    keys: Tokens | None = None
    mask: torch.Tensor | None = None
    kv_heads: int | None = None
    layer: str | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        if self.shared_heads and self.heads % self.shared_heads:
            raise ValueError(
                f"{self.heads} query heads cannot share {self.shared_heads} key heads; the first must be a multiple"
            )
        if self.mask is None:
            return
        rows, columns = self.mask.shape[-2:]
        if rows not in (1, sum(self.queries.lengths)) or columns not in (1, sum(self.sources.lengths)):
            raise ValueError(
                f"an attention mask of {tuple(self.mask.shape)} for {sum(self.queries.lengths)} queries and "
                f"{sum(self.sources.lengths)} keys; masks are for the tokens of whole streams"
            )

    @property
    def sources(self) -> Tokens:
        """The tokens of keys and values."""
        return self.queries if self.keys is None else self.keys

    @property
    def shared_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def ordered(self) -> bool:
        """Whether the order of tokens matters."""
        return self.mask is not None or self.causal

    def block(
        self,
        device: torch.device,
        rows: torch.Tensor | None = None,
        heads: tuple[int, int] | None = None,
        columns: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """The mask of some queries and keys (their places in whole streams) and some heads, causality included.

        None: no mask.
        """
        mask = self.mask
        if mask is not None and rows is not None and mask.shape[-2] > 1:
            mask = mask.index_select(-2, rows)
        if mask is not None and heads is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask[:, heads[0] : heads[1]]
        if mask is not None and columns is not None and mask.shape[-1] > 1:
            mask = mask.index_select(-1, columns)
        if not self.causal:
            return mask
        places = torch.arange(sum(self.queries.lengths), device=device) if rows is None else rows
        keys = torch.arange(sum(self.sources.lengths), device=device) if columns is None else columns
        earlier = places[:, None] >= keys
        if mask is None:
            return earlier
        return mask & earlier if mask.dtype == torch.bool else mask.masked_fill(~earlier, float("-inf"))


class LocalMeeting:
    """An attention whose tokens are all on this rank."""

    def __init__(self, spec: AttentionSpec, compute: Compute) -> None:
        self._spec, self._compute = spec, compute

    def send(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._inputs = q, k, v

    def attend(self) -> None:
        q, k, v = self._inputs
        # A rank may have no heads where there are fewer than ranks.
        self._out = self._compute(q, k, v, self._spec.block(q.device)) if q.shape[1] else q

    def send_back(self) -> None:
        pass

    def result(self) -> torch.Tensor:
        return self._out


def replaced_attention(options: Any = None) -> bool:
    """Whether a custom node has put a function of its own in the place of this module's attention."""
    return (
        optimized_attention is not attention_pytorch
        or optimized_attention_masked is not attention_pytorch
        or "optimized_attention_override" in (options or {})
    )


def own_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The `Compute` of this module's kernels.

    Token plans may compute it in other ways (in parts, merged by log-sum-exp); of any other function they know nothing.
    """
    return scaled_dot_product(q, k, v, broadcast_mask(mask))


def meet(spec: AttentionSpec, call: DenoiserCall, compute: Compute | None = None) -> Meeting:
    """An attention in four steps; see `Meeting`. `compute`: a custom node's function, used instead of this module's."""
    options, plan = call.options, call.plan
    foreign = compute is not None or replaced_attention(options)

    def replaced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        k, v = kernels.repeat_heads(q, k, v)
        function = optimized_attention if mask is None else optimized_attention_masked
        return function(
            q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True, transformer_options=options
        )

    compute = compute or (replaced if foreign else own_attention)
    if plan is None or not (spec.queries.sharded or spec.sources.sharded):
        return LocalMeeting(spec, compute)
    return plan.meet(spec, compute, in_order=foreign or spec.ordered)


def joined_heads(out: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] -> [B, L, H*D]."""
    return out.transpose(1, 2).flatten(2)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, call: DenoiserCall
) -> torch.Tensor:
    """q [B, H, Lq, D], k and v [B, KV, Lk, D] of this rank's tokens, or whole -> [B, Lq, H*D]; see `AttentionSpec`."""
    meeting = meet(spec, call)
    meeting.send(q, k, v)
    meeting.attend()
    meeting.send_back()
    return joined_heads(meeting.result())


def default(value: Any, other: Any) -> Any:
    """`value`, or what stands in for None."""
    if value is not None:
        return value
    return other() if callable(other) else other


_UNET_PARTS = ("BasicTransformerBlock", "CrossAttention", "FeedForward", "GEGLU", "SpatialTransformer")
_look_up = missing_names(__name__, {"SpatialVideoTransformer": "the time axis of Stable Video Diffusion's UNet"})


def __getattr__(name: str) -> Any:
    if name in _UNET_PARTS:
        # They use this module; in it they are only for packs.
        return getattr(importlib.import_module("comfy.ldm.unet.transformer"), name)
    return _look_up(name)
