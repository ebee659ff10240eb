"""Linears in eight bits: tokens and weights quantised by row, products by fp8 or int8 tensor cores.

Both sides are scaled symmetrically to their largest magnitude: every token by itself, when it is computed (Dettmers et
al. 2022, LLM.int8, "vector-wise"; Micikevicius et al. 2022, FP8 formats), every output channel of a weight once, when it is
loaded. A product is then the eight-bit product times both scales. It is lossy: e4m3 has 3 bits of mantissa, int8 has 127
steps.

On NVIDIA GPUs with Triton one kernel reads tokens once and writes them in eight bits, the tanh-GELU before it included;
elsewhere, and where torch compiles, the same is torch operations. On the CPU the same numbers are multiplied in fp32.

Shapes: M tokens, K inputs, N outputs. `Rows` stands in for tokens [.., K] between a kernel that writes eight bits and the
linear that reads them.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

SMALLEST_SCALE = 1e-12  # that of a row of zeros
_LARGEST_ROW = 16384  # channels that one program holds in registers
_FEWEST_INT8_ROWS = 17  # of torch's int8 product on CUDA


@dataclass(frozen=True)
class Format:
    """An eight-bit number format. largest: its largest magnitude. multiple: sizes of linears must be divisible by it."""

    name: str
    dtype: torch.dtype
    largest: float
    multiple: int


FP8 = Format("fp8", torch.float8_e4m3fn, 448.0, 16)
INT8 = Format("int8", torch.int8, 127.0, 8)
FORMATS = {form.name: form for form in (FP8, INT8)}


class Rows(NamedTuple):
    """Tokens in eight bits: `values` [.., K] times `scale` [.., 1] fp32. `dtype`: in which a product of them is returned."""

    values: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype


class BeforeGelu(NamedTuple):
    """Tokens [.., K] whose tanh-GELU is left to the kernel that quantises them."""

    tokens: torch.Tensor


class EightBit:
    """What a linear that multiplies in eight bits carries as its `eight_bit`.

    scale: [N] fp32, one for each row of the layer's weight, which then is in eight bits; None while the weight waits in
    host memory as it is in the file: it is quantised at each use then.
    """

    def __init__(self, form: Format, scale: torch.Tensor | None = None) -> None:
        self.form = form
        self.scale = scale


# --- quantising ----------------------------------------------------------------------------------------------------------


def to_steps(scaled: torch.Tensor, form: Format) -> torch.Tensor:
    """fp32 numbers within about +-largest as numbers of the format: the nearest; int8 rounds halves up."""
    if form is INT8:
        scaled = torch.floor(scaled + 0.5)
    return scaled.clamp(-form.largest, form.largest).to(form.dtype)


def quantise_weight(weight: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] -> (eight bits [N, K], scale [N] fp32)."""
    real = weight.float()
    scale = real.abs().amax(dim=1).div_(form.largest).clamp_(min=SMALLEST_SCALE)
    return to_steps(real / scale.unsqueeze(1), form), scale


def eight_bit_bytes(shape: Sequence[int]) -> int:
    """Bytes of a weight of this shape in eight bits, its scales included; a flat piece of one has no scales of its own."""
    return math.prod(shape) + (4 * shape[0] if len(shape) > 1 else 0)


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def quantise(  # type: ignore[no-untyped-def]  # Triton gives annotations a meaning of its own
        first, second, values, scales, width, second_width, first_row, second_row, largest, smallest,
        GELU: tl.constexpr, PAIR: tl.constexpr, INTEGER: tl.constexpr, BLOCK: tl.constexpr, SECOND_BLOCK: tl.constexpr,
    ):  # fmt: skip
        # One program: one token, of which `first` has the first channels and `second` the others.
        row = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, BLOCK)
        inside = cols < width
        a = tl.load(first + row * first_row + cols, mask=inside, other=0.0).to(tl.float32)
        if GELU and not PAIR:  # the tanh form by the logistic function: (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z))
            a = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
        amax = tl.max(tl.abs(a), axis=0)
        if PAIR:
            more = tl.arange(0, SECOND_BLOCK)
            there = more < second_width
            b = tl.load(second + row * second_row + more, mask=there, other=0.0).to(tl.float32)
            if GELU:
                b = b * tl.sigmoid(1.5957691216057308 * (b + 0.044715 * b * b * b))
            amax = tl.maximum(amax, tl.max(tl.abs(b), axis=0))
        scale = tl.maximum(amax / largest, smallest)
        tl.store(scales + row, scale)
        target = values + row * (width + second_width)
        a = a / scale
        if INTEGER:
            a = tl.floor(a + 0.5)
        a = tl.minimum(tl.maximum(a, -largest), largest)
        tl.store(target + cols, a.to(values.dtype.element_ty), mask=inside)
        if PAIR:
            b = b / scale
            if INTEGER:
                b = tl.floor(b + 0.5)
            b = tl.minimum(tl.maximum(b, -largest), largest)
            tl.store(target + width + more, b.to(values.dtype.element_ty), mask=there)

    return quantise


@functools.cache
def kernels_available() -> bool:
    """Whether kernels written in Triton can run here."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


def _fits(*tensors: torch.Tensor) -> bool:
    """Whether the kernel covers these tokens."""
    if torch.compiler.is_compiling() or not all(t.is_cuda and t.shape[-1] <= _LARGEST_ROW for t in tensors):
        return False
    return kernels_available() and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _block(width: int) -> int:
    return 1 << max(0, width - 1).bit_length()


def quantise(
    x: torch.Tensor,
    form: Format,
    second: torch.Tensor | None = None,
    gelu: bool = False,
    dtype: torch.dtype | None = None,
) -> Rows:
    """Tokens x [.., K], with the channels of `second` [.., K2] after them, in eight bits: one scale for each token.

    gelu: through the tanh-GELU first, `second` if it is given, else x. dtype: of products of them, by default x's.
    """
    parts = [x] if second is None else [x, second]
    if _fits(*parts) and x.numel():
        return _quantise_by_kernel(parts, form, gelu, dtype or x.dtype)
    parts = [part.float() for part in parts]
    if gelu:
        parts[-1] = F.gelu(parts[-1], approximate="tanh")
    whole = parts[0] if second is None else torch.cat(parts, dim=-1)
    scale = whole.abs().amax(dim=-1, keepdim=True).div(form.largest).clamp(min=SMALLEST_SCALE)
    return Rows(to_steps(whole / scale, form), scale, dtype or x.dtype)


def _quantise_by_kernel(parts: list[torch.Tensor], form: Format, gelu: bool, dtype: torch.dtype) -> Rows:
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    flat = [part if part.stride(-1) == 1 else part.contiguous() for part in flat]
    widths = [part.shape[1] for part in flat]
    shape = parts[0].shape[:-1]
    values = torch.empty((*shape, sum(widths)), dtype=form.dtype, device=parts[0].device)
    scale = torch.empty((*shape, 1), dtype=torch.float32, device=parts[0].device)
    pair = len(flat) == 2
    _kernel()[(flat[0].shape[0],)](
        flat[0], flat[-1], values, scale, widths[0], widths[1] if pair else 0, flat[0].stride(0), flat[-1].stride(0),
        form.largest, SMALLEST_SCALE, GELU=gelu, PAIR=pair, INTEGER=form is INT8, BLOCK=_block(widths[0]),
        SECOND_BLOCK=_block(widths[-1]), num_warps=4 if sum(widths) <= 2048 else 8 if sum(widths) <= 8192 else 16,
    )  # fmt: skip
    return Rows(values, scale, dtype)


# --- products ------------------------------------------------------------------------------------------------------------


def product(rows: Rows, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """rows [.., K] times weight [N, K] (eight bits, `scale` [N] fp32), plus bias [N] in any dtype: [.., N] in `rows.dtype`."""
    values = rows.values.reshape(-1, rows.values.shape[-1])
    row_scale = rows.scale.reshape(-1, 1)
    if not values.is_cuda:
        out = _product_on_cpu(values, weight).mul_(row_scale).mul_(scale)
        out = out if bias is None else out.add_(bias.float())
    elif weight.dtype == torch.int8:
        out = _int8_product(values, weight) * row_scale * scale
        out = out if bias is None else out + bias
    else:
        # By row, torch multiplies into bf16 only, and takes a bias of that dtype.
        out = torch._scaled_mm(
            values,
            weight.t(),
            scale_a=row_scale,
            scale_b=scale.unsqueeze(0),
            bias=None if bias is None else bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return out.to(rows.dtype).reshape(*rows.values.shape[:-1], weight.shape[0])


def _product_on_cpu(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same numbers multiplied on the CPU: [M, N] fp32. Sums of int8 products are exact, as on tensor cores."""
    if weight.dtype == torch.int8:
        return torch._int_mm(values, weight.t()).float()
    return values.float() @ weight.float().t()


def _int8_product(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """values [M, K] times weight [N, K] transposed, int32 [M, N]; with few rows, zeros are multiplied too."""
    count = values.shape[0]
    if count < _FEWEST_INT8_ROWS:
        values = F.pad(values, (0, 0, 0, _FEWEST_INT8_ROWS - count))
    return torch._int_mm(values, weight.t())[:count]


def linear(layer: Any, x: torch.Tensor | Rows, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of a layer with an `eight_bit` and the weight that it has now, on the device and perhaps patched.

    x: tokens [.., K], quantised or not. weight: in eight bits if the layer's `EightBit` has a scale, else as it is real.
    """
    eight_bit: EightBit = layer.eight_bit
    scale = eight_bit.scale
    if scale is None or weight.dtype != eight_bit.form.dtype:
        weight, scale = quantise_weight(weight, eight_bit.form)
    rows = x if isinstance(x, Rows) else quantise(x, eight_bit.form)
    return product(rows, weight, scale, bias)


# --- what networks ask for -----------------------------------------------------------------------------------------------


def reads_rows(layer: nn.Module) -> TypeGuard[Any]:
    """Whether a layer takes `Rows`: a linear that multiplies in eight bits, by a forward of its own, a weight that is there.

    Somebody else's forward, on the class or on the layer, and hooks get tokens.
    """
    eight_bit = getattr(layer, "eight_bit", None)
    return (
        eight_bit is not None
        and eight_bit.scale is not None
        and not (layer.weight_function or layer.bias_function)
        and "forward" not in vars(layer)
        and getattr(type(layer).forward, "takes_rows", False)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )
