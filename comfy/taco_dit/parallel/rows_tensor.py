"""A tensor whose rows are on several ranks: code that is written for whole pictures runs on it unchanged.

`RowsTensor` reports the shape of the whole tensor and holds this rank's rows of it. Operations of torch that are called
with it come to `__torch_function__`, where each is looked up by name: what treats rows separately runs on the rows that
are here, convolutions, group norms, attention and resizing exchange what they need (`spatial_parallel`), and what is not
known gets whole tensors, so that its result is right in any case. Whole tensors and rows can be combined.

The idea of a tensor that carries its distribution is that of GSPMD (Xu et al. 2021) and torch's DTensor, which has no
halo exchange along rows, needs equal or padded shards, and global process groups.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}
"""By the name of the function: `handler(function, args, kwargs)`, which returns `NotImplemented` for whole tensors."""


_said: set[str] = set()


def note_whole(name: str) -> None:
    """Say, the first time, that a function gets whole pictures."""
    if name not in _said:
        _said.add(name)
        logging.info("TACO-DiT: %s is not known to work on rows of a picture; it is given the whole picture", name)


def register(handler: Handler, names: str) -> None:
    """Let a handler treat the functions of these names."""
    HANDLERS.update(dict.fromkeys(names.split(), handler))


@dataclass(frozen=True)
class Layout:
    """Which rows each rank holds: `counts[r]` rows, in rank order, along `axis`, of `unit` entries each.

    `unit` is 1 in pictures; where a row of W cells was flattened to tokens it is W.
    """

    axis: int
    counts: tuple[int, ...]
    unit: int = 1

    @property
    def rows(self) -> int:
        """Rows of the whole tensor."""
        return sum(self.counts)

    def bounds(self, rank: int) -> tuple[int, int]:
        """[first, last + 1) of a rank's rows."""
        start = sum(self.counts[:rank])
        return start, start + self.counts[rank]

    def starts(self) -> list[int]:
        """The first row of each rank, and the number of rows."""
        return [0, *itertools.accumulate(self.counts)]

    def moved(self, axis: int) -> Layout:
        """The same rows along another axis."""
        return Layout(axis, self.counts, self.unit)

    def of_entries(self) -> Layout:
        """The same with each entry as a row."""
        return Layout(self.axis, tuple(count * self.unit for count in self.counts))


class RowsTensor(torch.Tensor):
    """Rows of a tensor; `local` are this rank's, `rows` says which they are, `plan` exchanges with the other ranks."""

    local: torch.Tensor
    rows: Layout
    plan: Any

    @staticmethod
    def __new__(cls, local: torch.Tensor, rows: Layout, plan: Any) -> RowsTensor:
        shape = list(local.shape)
        shape[rows.axis] = rows.rows * rows.unit
        self: RowsTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=plan.device)
        self.local, self.rows, self.plan = local, rows, plan
        return self

    def with_local(self, local: torch.Tensor, rows: Layout | None = None) -> RowsTensor:
        """A tensor of other values, and of other rows."""
        return RowsTensor(local, rows or self.rows, self.plan)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RowsTensor({tuple(self.shape)}, {self.rows}, rank {self.plan.index})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = HANDLERS.get(name)
        if handler is not None and kwargs.get("out") is None:
            out = handler(func, args, kwargs)
            if out is not NotImplemented:
                return out
        return _on_whole(func, name, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _on_whole(func, _name(func), args, kwargs or {})


def _name(func: Any) -> str:
    """`add`, `conv2d`, `__getitem__`; `.shape` for what reads a property."""
    name = str(getattr(func, "__name__", func))
    if name in ("__get__", "__set__"):
        return ("." if name == "__get__" else "=") + str(func.__self__.__name__)
    return name.split(".")[0]


_FACTS = {
    ".shape", ".dtype", ".device", ".ndim", ".is_cuda", ".is_cpu", ".layout", ".requires_grad", ".is_sparse",
    ".is_quantized", ".is_nested", ".is_meta", ".is_mps", ".is_xpu", ".itemsize", ".nbytes", ".grad_fn", ".is_leaf",
    ".names", "._version", "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "element_size",
    "is_floating_point", "is_complex", "is_inference", "get_device", "__len__", "__hash__", "storage_offset",
    "is_tensor",
}  # fmt: skip


def _rows_in(args: Any) -> list[RowsTensor]:
    """All tensors of rows among arguments, lists and dicts included."""
    return [value for value in pytree.tree_leaves(args) if isinstance(value, RowsTensor)]


def whole(value: Any) -> Any:
    """The whole tensor on every rank, of a `RowsTensor`; anything else as it is."""
    return value.plan.gathered(value) if isinstance(value, RowsTensor) else value


def _on_whole(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Call what is not known to treat rows separately with whole tensors; what it writes into gets its rows back."""
    found = _rows_in((args, kwargs))
    note_whole(name)
    known: dict[int, torch.Tensor] = {}
    for tensor in found:
        if id(tensor) not in known:
            known[id(tensor)] = whole(tensor)
    whole_args, whole_kwargs = pytree.tree_map(lambda value: known.get(id(value), value), (args, kwargs))
    out = func(*whole_args, **whole_kwargs)
    written = _written(name, args, kwargs)
    if written is None:
        return out
    written.local.copy_(written.plan.part(known[id(written)], written.rows))
    return written


def _written(name: str, args: Any, kwargs: Any) -> RowsTensor | None:
    """The tensor of rows that a call writes into."""
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS
    target = args[0] if in_place and args else kwargs.get("out")
    return target if isinstance(target, RowsTensor) else None


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and", "or", "xor")
_IN_PLACE_OPERATORS = {f"__i{name}__" for name in _ARITHMETIC} | {"__setitem__"}


# --- each value by itself ---------------------------------------------------------------------------------------------


def _reference(args: Any, kwargs: Any) -> RowsTensor:
    """The tensor whose rows the result will have: the first one of the most axes."""
    return max(_rows_in((args, kwargs)), key=lambda tensor: tensor.ndim)


def aligned(tensor: Any, axis_from_end: int, like: RowsTensor) -> Any:
    """This rank's part of an operand that is broadcast against `like`, whose rows run along `axis_from_end` (negative)."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if isinstance(tensor, RowsTensor):
        same_axis = tensor.rows.axis - tensor.ndim == axis_from_end
        if same_axis and tensor.rows.of_entries().counts == like.rows.of_entries().counts:
            return tensor.local
        if same_axis and tensor.rows.unit == like.rows.unit and tensor.rows.rows == like.rows.rows:
            return tensor.plan.redealt(tensor, like.rows.counts)
        tensor = whole(tensor)
    if tensor.ndim < -axis_from_end or tensor.shape[axis_from_end] == 1:
        return tensor
    return like.plan.part(tensor, Layout(axis_from_end, like.rows.counts, like.rows.unit))


def _alike(tensor: RowsTensor, value: Any) -> bool:
    """Whether an operand is a number, or has the same shape and rows."""
    if isinstance(value, RowsTensor):
        return value.rows == tensor.rows and value.shape == tensor.shape
    return not isinstance(value, torch.Tensor)


def _pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Functions of each value, with operands broadcast against each other."""
    first = args[0] if args else None
    plain = not any(isinstance(value, torch.Tensor) for value in kwargs.values())
    if isinstance(first, RowsTensor) and plain and all(_alike(first, value) for value in args):
        mine = (value.local if isinstance(value, RowsTensor) else value for value in args)
        local = first.plan.compute(func, *mine, **kwargs)
        if _written(_name(func), args, kwargs) is None:
            return first.with_local(local)
        first.local = local
        return first
    like = _reference(args, kwargs)
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    axis = like.rows.axis - like.ndim
    if shape[axis] != like.shape[axis]:
        return NotImplemented  # one row, repeated
    written = _written(_name(func), args, kwargs)
    if written is not None and (written is not args[0] or written.rows != like.rows):
        return NotImplemented
    operands, options = pytree.tree_map(lambda value: aligned(value, axis, like), (args, kwargs))
    local = like.plan.compute(func, *operands, **options)
    if written is not None:
        written.local = local  # itself, or its shape after this rank ran out of memory
        return written
    return like.with_local(local, like.rows.moved(len(shape) + axis))


def _to(func: Any, args: Any, kwargs: Any) -> Any:
    """Other dtypes; what goes to another device goes there whole."""
    if not isinstance(args[0], RowsTensor) or any(isinstance(value, torch.Tensor) for value in args[1:]):
        return NotImplemented
    empty = torch.empty([0] * args[0].ndim, dtype=args[0].dtype, device=args[0].plan.device)
    probe = func(empty, *args[1:], **kwargs)
    if not isinstance(probe, torch.Tensor):
        return probe
    if probe.device != args[0].plan.device:
        return func(whole(args[0]), *args[1:], **kwargs)
    return args[0].with_local(args[0].plan.compute(func, args[0].local, *args[1:], **kwargs))


def _dropout(func: Any, args: Any, kwargs: Any) -> Any:
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return NotImplemented if training or not isinstance(args[0], RowsTensor) else args[0]


_UNARY = (
    "silu relu relu6 gelu sigmoid tanh softplus elu leaky_relu hardtanh hardswish mish logsigmoid exp expm1 log log2 sqrt "
    "rsqrt abs neg clamp clamp_min clamp_max clip sin cos square reciprocal round floor ceil sign nan_to_num isnan isfinite "
    "logical_not bitwise_not contiguous clone detach zeros_like ones_like empty_like"
)
_BINARY = (
    "add sub subtract rsub mul multiply div divide true_divide floor_divide pow maximum minimum fmod remainder addcmul "
    "addcdiv lerp where eq ne lt le gt ge logical_and logical_or copy masked_fill"
)
for _function in f"{_UNARY} {_BINARY}".split():
    register(_pointwise, f"{_function} {_function}_")
for _function in _ARITHMETIC:
    register(_pointwise, f"__{_function}__ __r{_function}__ __i{_function}__")
register(_pointwise, "__neg__ __pos__ __abs__ __invert__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__")
register(_to, "to float half bfloat16 double type cuda cpu")
register(_dropout, "dropout")


# --- shapes -----------------------------------------------------------------------------------------------------------


def _run(shape: Sequence[int], rows: Layout) -> tuple[int, int]:
    """Entries before the axis of rows, and entries of one row from there on, in memory order."""
    return math.prod(shape[: rows.axis]), rows.unit * math.prod(shape[rows.axis + 1 :])


def _reshaped(func: Any, args: Any, kwargs: Any) -> Any:
    """Other shapes of the same values in the same order, in which rows are still runs of one axis."""
    tensor = args[0]
    if not isinstance(tensor, RowsTensor):
        return NotImplemented
    shape = func(torch.empty(tensor.shape, device="meta"), *args[1:], **kwargs).shape
    before, run = _run(tensor.shape, tensor.rows)
    for axis, size in enumerate(shape):
        unit, rest = divmod(size, tensor.rows.rows) if tensor.rows.rows else (0, 1)
        if rest or not unit:
            continue
        rows = Layout(axis, tensor.rows.counts, unit)
        if _run(shape, rows) == (before, run):
            mine = [*shape[:axis], tensor.local.shape[tensor.rows.axis] // tensor.rows.unit * unit, *shape[axis + 1 :]]
            return tensor.with_local(tensor.plan.compute(torch.reshape, tensor.local, mine), rows)
    return _several_rows_as_one(tensor, shape, before, run)


def _several_rows_as_one(tensor: RowsTensor, shape: Sequence[int], before: int, run: int) -> Any:
    """Another shape in which some rows become one, so many on each rank: rows of cells as (rows, rows of a cell)."""
    for axis, size in enumerate(shape):
        entries = math.prod(shape[axis + 1 :])
        if math.prod(shape[:axis]) != before or not run or entries % run:
            continue
        several = entries // run
        if size * several == tensor.rows.rows and not any(count % several for count in tensor.rows.counts):
            rows = Layout(axis, tuple(count // several for count in tensor.rows.counts))
            mine = [*shape[:axis], rows.counts[tensor.plan.index], *shape[axis + 1 :]]
            return tensor.with_local(tensor.plan.compute(torch.reshape, tensor.local, mine), rows)
    return NotImplemented


def _permuted(func: Any, args: Any, kwargs: Any) -> Any:
    """Another order of axes."""
    tensor = args[0]
    if not isinstance(tensor, RowsTensor):
        return NotImplemented
    probe = [3 if axis == tensor.rows.axis else 2 for axis in range(tensor.ndim)]  # found again by its size
    axis = list(func(torch.empty(probe, device="meta"), *args[1:], **kwargs).shape).index(3)
    return tensor.with_local(tensor.plan.compute(func, tensor.local, *args[1:], **kwargs), tensor.rows.moved(axis))


def _axes(args: Any, kwargs: Any, place: int, default: Any, ndim: int) -> list[int]:
    """The axes that a call names at position `place`, or by keyword, as numbers from 0."""
    dims = kwargs.get("dim", kwargs.get("dims", args[place] if len(args) > place else default))
    dims = [dims] if isinstance(dims, int) else list(dims if dims is not None else range(ndim))
    return [dim % ndim for dim in dims]


def _along(place: int, default: Any = 0) -> Handler:
    """Functions along axes of which rows are none; these stay, or all go."""

    def handler(func: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        if not isinstance(tensor, RowsTensor):
            return NotImplemented
        axes = _axes(args, kwargs, place, default, tensor.ndim)
        if tensor.rows.axis in axes:
            return NotImplemented
        before = sum(axis < tensor.rows.axis for axis in axes)

        def dealt(part: torch.Tensor) -> RowsTensor:
            gone = before if part.ndim < tensor.ndim else 0
            return tensor.with_local(part, tensor.rows.moved(tensor.rows.axis - gone))

        out = tensor.plan.compute(func, tensor.local, *args[1:], **kwargs)
        return dealt(out) if isinstance(out, torch.Tensor) else tuple(dealt(part) for part in out)

    return handler


def _repeated(func: Any, args: Any, kwargs: Any) -> Any:
    """`repeat_interleave`; repeated rows stay on their rank."""
    tensor, repeats = args[:2] if len(args) > 1 else (args[0], kwargs.get("repeats"))
    axes = _axes(args, kwargs, 2, None, tensor.ndim)
    if len(axes) > 1 or not isinstance(repeats, int) or not isinstance(tensor, RowsTensor) or tensor.rows.unit != 1:
        return NotImplemented
    counts = (
        tuple(count * repeats for count in tensor.rows.counts) if axes[0] == tensor.rows.axis else tensor.rows.counts
    )
    local = tensor.plan.compute(torch.repeat_interleave, tensor.local, repeats, axes[0])
    return tensor.with_local(local, Layout(tensor.rows.axis, counts))


def _new(func: Any, args: Any, kwargs: Any) -> Any:
    """Whole tensors of the same dtype on the same device, whose values do not come from this one."""
    return func(torch.empty(0, dtype=args[0].dtype, device=args[0].plan.device), *args[1:], **kwargs)


def _concatenated(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = list(args[0] if args else kwargs["tensors"])
    like = _reference(tensors, {})
    if any(tensor.ndim != like.ndim for tensor in tensors):
        return NotImplemented
    if like.rows.axis in _axes(args, kwargs, 1, 0, like.ndim):
        return NotImplemented
    axis = like.rows.axis - like.ndim
    mine = [aligned(tensor, axis, like) for tensor in tensors]
    return like.with_local(like.plan.compute(torch.cat, mine, _axes(args, kwargs, 1, 0, like.ndim)[0]))


def _indexed(func: Any, args: Any, kwargs: Any) -> Any:
    """Integers, slices, new axes and `...`, where all rows are taken."""
    tensor, key = args
    if not isinstance(tensor, RowsTensor):
        return NotImplemented
    parts = list(key) if isinstance(key, tuple) else [key]
    if any(not (part is None or part is Ellipsis or type(part) in (int, slice)) for part in parts):
        return NotImplemented
    left_out = [slice(None)] * (tensor.ndim - sum(part is not None and part is not Ellipsis for part in parts))
    place = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts[place : place + 1] = left_out
    source = target = 0
    for part in parts:
        if part is not None and source == tensor.rows.axis:
            if part != slice(None):
                return NotImplemented
            break
        source += part is not None
        target += type(part) is not int
    return tensor.with_local(tensor.plan.compute(func, tensor.local, tuple(parts)), tensor.rows.moved(target))


register(_reshaped, "view reshape flatten unflatten squeeze unsqueeze")
register(_permuted, "permute transpose movedim moveaxis swapaxes swapdims")
register(_along(2), "chunk split tensor_split")
register(_along(1), "narrow cumsum index_select select unbind")
register(_along(1, None), "mean sum amax amin prod logsumexp")
register(_along(2, 1), "normalize")
register(_repeated, "repeat_interleave")
register(_new, "new_zeros new_ones new_empty new_full")
register(_along(1, -1), "softmax log_softmax")
register(_concatenated, "cat concat")
register(_indexed, "__getitem__")
