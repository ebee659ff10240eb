"""Spatial parallelism of convolutional networks: the rows of a picture are dealt over ranks.

`RowsPlan.deal` makes a `RowsTensor` of a picture; a network that is called with it computes this rank's rows of
everything, and `RowsPlan.gathered` is the whole result. Convolutions exchange the rows next to a rank's own (halos),
group norms sum their statistics, queries of an attention stay and keys and values are gathered. All of it is exact: the
same sums as on one rank, up to the order of those over a group of channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import comfy.model_management
from comfy.taco_dit.core.plan import share

from .rows_tensor import Handler, Layout, RowsTensor, register, warn_once, whole

Range = tuple[int, int]
STATISTICS_PIECE = 1 << 23  # values whose fp32 copies are made at a time: they stay in a GPU's cache
_said: set[str] = set()


class RowsPlan:
    """The rows of pictures on the ranks of a group, and what is exchanged.

    group: a `Group` of the data plane; all its ranks make the same calls in the same order. device: of the tensors.
    A rank that runs out of memory goes on in step without computing, so that no other waits for it; `gathered` then raises
    the out-of-memory error on all ranks.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group = group
        self.size, self.index = group.size, group.index
        self.device = torch.empty(0, device=device).device  # with its index
        self.out_of_memory = False

    def note_whole(self, name: str) -> None:
        """`name` gets whole tensors."""
        warn_once(_said, name)

    def compute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function` of local tensors; after this rank ran out of memory, a result of the right shape without values."""
        if not self.out_of_memory:
            try:
                return function(*args, **kwargs)
            except comfy.model_management.OOM_EXCEPTION:
                self.out_of_memory = True
        shapes = pytree.tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, (args, kwargs))
        return function(*shapes[0], **shapes[1])

    def _sendable(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device) if tensor.is_meta else tensor

    # --- whole tensors and parts ---------------------------------------------------------------------------------------

    def deal(self, picture: torch.Tensor, axis: int = -2, unit: int = 1) -> RowsTensor:
        """This rank's rows of a whole tensor that every rank has, as even as possible in steps of `unit` rows."""
        axis %= picture.ndim
        height = picture.shape[axis]
        steps = -(-height // unit)
        ends = [min(share(steps, self.size, rank)[1] * unit, height) for rank in range(self.size)]
        rows = Layout(axis, tuple(end - start for start, end in zip([0, *ends], ends)))
        return RowsTensor(self.part(picture, rows).to(self.device), rows, self)

    def part(self, picture: torch.Tensor, rows: Layout) -> torch.Tensor:
        """This rank's rows of a whole tensor, as a view."""
        start, stop = rows.bounds(self.index)
        return picture.narrow(rows.axis, start * rows.unit, (stop - start) * rows.unit)

    def gathered(self, tensor: RowsTensor) -> torch.Tensor:
        """The whole tensor, on every rank. It has no meaning after `finish` would raise."""
        rows = tensor.rows
        local = self._sendable(tensor.local).movedim(rows.axis, 0).contiguous()
        joined = self.group.all_gather(local, [count * rows.unit for count in rows.counts])
        return joined.movedim(0, rows.axis)

    def finish(self) -> None:
        """At the end of a network's call: raises the out-of-memory error on all ranks when one of them had it."""
        mine = torch.full((1,), int(self.out_of_memory), dtype=torch.int32, device=self.device)
        if self.group.all_gather(mine, [1] * self.size).any():
            raise comfy.model_management.OOM_EXCEPTION(
                "a rank ran out of memory while rows of a picture were dealt over all"
            )

    # --- exchanges -----------------------------------------------------------------------------------------------------

    def redealt(self, tensor: RowsTensor, counts: tuple[int, ...]) -> torch.Tensor:
        """This rank's part when each rank holds `counts` rows."""
        target = Layout(tensor.rows.axis, counts, tensor.rows.unit)
        above, below = Exchange(self, tensor, [target.bounds(rank) for rank in range(self.size)]).result()
        return _joined(self, above, _own(tensor, target.bounds(self.index)), below, tensor.rows.axis)


def run_by_rows(
    network: Callable[[torch.Tensor], torch.Tensor],
    picture: torch.Tensor,
    group: Any,
    device: torch.device,
    unit: int = 1,
) -> torch.Tensor:
    """`network(picture)` of a picture [B, C, ..., H, W] that every rank of `group` has, as every rank gets the result.

    `network` may be any code for whole pictures whose result is a tensor. `unit`: rows that stay on one rank, best the
    factor by which the network makes pictures smaller. Raises the out-of-memory error on all ranks when one has it.
    """
    plan = RowsPlan(group, device)
    out: torch.Tensor = whole(network(plan.deal(picture, unit=unit)))
    plan.finish()
    return out


def takes_rows(network: torch.nn.Module) -> bool:
    """Whether a network can be called with rows: not if parts of it are compiled, which need tensors of torch's own."""
    for module in network.modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None or isinstance(
            module, torch.jit.ScriptModule
        )
        if compiled or type(module).__module__.startswith("torch._dynamo"):
            warn_once(_said, f"the compiled {type(network).__name__}")
            return False
    return True


class Exchange:
    """Rows on their way: each rank r gets the rows `wanted[r]` (from one to before another) that it does not hold.

    Sending begins at once; on GPUs on a stream of its own, so that computing goes on meanwhile. There is one message for
    each pair of ranks, between neighbours where each holds as many rows as a halo has.
    """

    def __init__(self, plan: RowsPlan, tensor: RowsTensor, wanted: Sequence[Range]) -> None:
        self._plan, self._axis = plan, tensor.rows.axis
        rows, local, me = tensor.rows, tensor.local, plan.index
        owned = [rows.bounds(rank) for rank in range(plan.size)]
        start = owned[me][0]
        self._shape = [*local.shape]
        entries = math.prod(size for axis, size in enumerate(local.shape) if axis != rows.axis) * rows.unit
        needed = [
            [_common(owned[source], wanted[target]) for target in range(plan.size)] for source in range(plan.size)
        ]
        for rank in range(plan.size):
            needed[rank][rank] = (0, 0)
        sent = [(a - start, b - start) for a, b in needed[me]]
        self._received = [needed[source][me] for source in range(plan.size)]
        self._unit = rows.unit
        self._pending: Any = None
        if not any(b > a for pairs in needed for a, b in pairs):
            self._buffer = local.new_empty(0)
            return
        pieces = [local.narrow(rows.axis, a * rows.unit, (b - a) * rows.unit).reshape(-1) for a, b in sent if b > a]
        send = plan._sendable(torch.cat(pieces) if pieces else local.new_empty(0))
        counts = [[(b - a) * entries for a, b in ranges] for ranges in (self._received, sent)]
        self._buffer = send.new_empty(sum(counts[0]))
        self._pending = plan.group.start_all_to_all(self._buffer, send, *counts)

    def result(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The rows above this rank's own and those below, in order; pieces of one tensor each."""
        if self._pending is not None:
            self._pending.wait()
        above: list[torch.Tensor] = []
        below: list[torch.Tensor] = []
        position = 0
        for source, (a, b) in enumerate(self._received):
            if b == a:
                continue
            shape = [*self._shape]
            shape[self._axis] = (b - a) * self._unit
            piece = self._buffer[position : position + math.prod(shape)].view(shape)
            position += piece.numel()
            (above if source < self._plan.index else below).append(piece)
        return above, below


def _common(a: Range, b: Range) -> Range:
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if stop > start else (0, 0)


def _own(tensor: RowsTensor, wanted: Range) -> torch.Tensor:
    """Those of the rows wanted that are here."""
    mine = tensor.rows.bounds(tensor.plan.index)
    start, stop = _common(mine, wanted)
    unit = tensor.rows.unit
    return tensor.local.narrow(tensor.rows.axis, max(0, start - mine[0]) * unit, (stop - start) * unit)


def _joined(
    plan: RowsPlan, above: list[torch.Tensor], own: torch.Tensor, below: list[torch.Tensor], axis: int
) -> torch.Tensor:
    if not above and not below:
        return own
    return plan.compute(torch.cat, [*above, own, *below], axis)


# --- convolutions -----------------------------------------------------------------------------------------------------


def _arguments(names: str, args: Any, kwargs: Any, **defaults: Any) -> dict[str, Any]:
    """Arguments by name, whether they were given by place or by keyword."""
    return {**defaults, **dict(zip(names.split(), args)), **kwargs}


def _each_axis(value: Any, axes: int) -> list[int]:
    """A setting of a convolution for each of its axes."""
    return [int(value)] * axes if isinstance(value, int) else [int(v) for v in value] * (axes // len(value))


class _Window:
    """A window that slides over rows: which outputs each rank makes, and which input rows it needs for them."""

    def __init__(self, rows: Layout, kernel: int, stride: int, padding: int, dilation: int) -> None:
        self.reach = dilation * (kernel - 1) + 1
        self.stride, self.padding, self.rows = stride, padding, rows
        height = (rows.rows + 2 * padding - self.reach) // stride + 1
        # The output j belongs to the rank of the input row j * stride, about the middle of its window.
        ends = [min(-(-end // stride), height) for end in rows.starts()]
        ends[-1] = height
        self.made = [(a, max(a, b)) for a, b in zip(ends, ends[1:])]
        self.out = Layout(rows.axis, tuple(b - a for a, b in self.made))

    def span(self, rank: int) -> Range:
        """Input rows from one to before another, counted before padding, so possibly beyond the picture."""
        a, b = self.made[rank]
        return (a * self.stride - self.padding, (b - 1) * self.stride - self.padding + self.reach) if b > a else (0, 0)

    def wanted(self, rank: int) -> Range:
        """Those of the span that exist."""
        return _common(self.span(rank), (0, self.rows.rows))


def _convolution(axes: int) -> Handler:
    """conv1d, conv2d or conv3d of a picture of which rows are dealt."""
    names = "input weight bias stride padding dilation groups"

    def handler(func: Any, args: Any, kwargs: Any) -> Any:
        given = _arguments(names, args, kwargs, bias=None, stride=1, padding=0, dilation=1, groups=1)
        picture, weight = given["input"], given["weight"]
        learned = weight, given["bias"]
        place = picture.rows.axis - picture.ndim + axes if isinstance(picture, RowsTensor) else -1
        unusual = isinstance(given["padding"], str) or isinstance(weight, RowsTensor)
        if place < 0 or picture.ndim != axes + 2 or picture.rows.unit != 1 or unusual:
            return NotImplemented
        stride, padding, dilation = (_each_axis(given[name], axes) for name in ("stride", "padding", "dilation"))
        kernel = list(weight.shape[2:])
        window = _Window(picture.rows, kernel[place], stride[place], padding[place], dilation[place])

        def convolve(part: torch.Tensor, above_and_below: int) -> torch.Tensor:
            pads = [above_and_below if axis == place else pad for axis, pad in enumerate(padding)]
            filters, bias = (value.to("meta") if part.is_meta and value is not None else value for value in learned)
            return func(part, filters, bias, stride, pads, dilation, given["groups"])

        local = _slid(picture, window, convolve)
        if local is None:
            sizes = [
                (size + 2 * pad - step * (width - 1) - 1) // hop + 1
                for size, width, hop, pad, step in zip(picture.shape[2:], kernel, stride, padding, dilation)
            ]
            sizes[place] = 0
            local = picture.local.new_empty([picture.shape[0], weight.shape[0], *sizes])
        return picture.with_local(local, window.out)

    return handler


def _slid(picture: RowsTensor, window: _Window, convolve: Callable[[torch.Tensor, int], torch.Tensor]) -> Any:
    """This rank's outputs of `convolve(part, rows of zeros above and below)`, or None where it makes none."""
    plan: RowsPlan = picture.plan
    exchange = Exchange(plan, picture, [window.wanted(rank) for rank in range(plan.size)])
    made = window.out.counts[plan.index]
    halo, axis = window.padding, picture.rows.axis
    # Windows around each row, and rows enough that the outputs that need a halo need it on one side only.
    centred = window.stride == 1 and window.reach == 2 * halo + 1 and made >= 2 * halo
    if centred and made:
        out = plan.compute(convolve, picture.local, halo)
        above, below = exchange.result()
        slabs = [([*above, picture.local.narrow(axis, 0, 2 * halo)], 0)] if above else []
        slabs += [([picture.local.narrow(axis, made - 2 * halo, 2 * halo), *below], made - halo)] if below else []
        if all(sum(piece.shape[axis] for piece in pieces) == 3 * halo for pieces, _ in slabs):
            return plan.compute(_with_borders, out, slabs, convolve, halo, axis) if slabs else out
    above, below = exchange.result()
    if not made:
        return None
    first, last = window.span(plan.index)
    own = _own(picture, (first, last))
    if first < 0:
        above = [_zero_rows(picture.local, axis, -first), *above]
    if last > picture.rows.rows:
        below = [*below, _zero_rows(picture.local, axis, last - picture.rows.rows)]
    return plan.compute(convolve, _joined(plan, above, own, below, axis), 0)


def _zero_rows(like: torch.Tensor, axis: int, rows: int) -> torch.Tensor:
    shape = [*like.shape]
    shape[axis] = rows
    return like.new_zeros(shape)


def _with_borders(
    out: torch.Tensor,
    slabs: list[tuple[list[torch.Tensor], int]],
    convolve: Callable[[torch.Tensor, int], torch.Tensor],
    halo: int,
    axis: int,
) -> torch.Tensor:
    """`out`, made as if the picture ended here, with the `halo` rows from each place on made from a slab of 3 `halo` rows.

    Most of the convolution so runs while halos are on their way, and on memory that was not copied to add them.
    """
    batch = out.shape[0]
    borders = convolve(torch.cat([torch.cat(pieces, axis) for pieces, _ in slabs]), 0)
    for border, (_, place) in zip(borders.split(batch), slabs):
        out.narrow(axis, place, halo).copy_(border)
    return out


def _pooling(axes: int) -> Handler:
    """Averages or largest values of windows."""

    def handler(func: Any, args: Any, kwargs: Any) -> Any:
        given = _arguments("input kernel_size stride padding", args[:4], kwargs, stride=None, padding=0)
        picture = given["input"]
        place = picture.rows.axis - picture.ndim + axes
        plain = len(args) <= 4 and set(kwargs) <= {"input", "kernel_size", "stride", "padding"}
        kernel, padding = _each_axis(given["kernel_size"], axes), _each_axis(given["padding"], axes)
        stride = _each_axis(given["stride"], axes) if given["stride"] else kernel
        if place < 0 or picture.rows.unit != 1 or not plain or any(padding):
            return NotImplemented
        window = _Window(picture.rows, kernel[place], stride[place], 0, 1)
        local = _slid(picture, window, lambda part, _: func(part, kernel, stride))
        if local is None:
            sizes = [(n - k) // s + 1 for n, k, s in zip(picture.shape[-axes:], kernel, stride)]
            sizes[place] = 0
            local = picture.local.new_empty([*picture.shape[:-axes], *sizes])
        return picture.with_local(local, window.out)

    return handler


def _padded(func: Any, args: Any, kwargs: Any) -> Any:
    """Constants around the picture; those above the first row go to the first rank, those below the last to the last."""
    given = _arguments("input pad mode value", args, kwargs, mode="constant", value=None)
    picture, pads = given["input"], list(given["pad"])
    rows = picture.rows
    place = 2 * (picture.ndim - 1 - rows.axis)
    above, below = pads[place : place + 2] if place < len(pads) else (0, 0)
    if (above or below) and (given["mode"] != "constant" or min(above, below) < 0 or rows.unit != 1):
        return NotImplemented
    counts = list(rows.counts)
    counts[0] += above
    counts[-1] += below
    if place < len(pads):
        mine = above if picture.plan.index == 0 else 0, below if picture.plan.index == picture.plan.size - 1 else 0
        pads[place : place + 2] = mine
    if not picture.local.numel() and given["mode"] != "constant":
        shape = [*picture.local.shape]
        for axis, total in zip(range(picture.ndim - 1, -1, -1), (a + b for a, b in zip(pads[::2], pads[1::2]))):
            shape[axis] += total
        return picture.with_local(picture.local.new_empty(shape))
    local = picture.plan.compute(func, picture.local, pads, given["mode"], given["value"])
    return picture.with_local(local, Layout(rows.axis, tuple(counts), rows.unit))


def _resized(func: Any, args: Any, kwargs: Any) -> Any:
    """Nearest neighbours: each rank makes the rows that are copies of its own."""
    names = "input size scale_factor mode"
    given = _arguments(names, args, kwargs, size=None, scale_factor=None, mode="nearest")
    picture = given["input"]
    axes = picture.ndim - 2
    place = picture.rows.axis - 2
    known = set(given) <= {*names.split(), "recompute_scale_factor", "align_corners", "antialias"}
    usual = not any(given.get(name) for name in ("recompute_scale_factor", "align_corners", "antialias"))
    if (
        given["mode"] not in ("nearest", "nearest-exact")
        or place < 0
        or picture.rows.unit != 1
        or not (known and usual)
    ):
        return NotImplemented
    size, factor = (
        None
        if given[name] is None
        else [given[name]] * axes
        if isinstance(given[name], (int, float))
        else [*given[name]]
        for name in ("size", "scale_factor")
    )
    height = picture.rows.rows
    numbers = torch.arange(height, dtype=torch.float64).view(1, 1, height)  # torch's own choice of each output's source
    source = func(
        numbers, None if size is None else size[place], None if factor is None else factor[place], given["mode"]
    ).view(-1).long()  # fmt: skip
    ends = torch.searchsorted(source, torch.tensor(picture.rows.starts())).tolist()
    out = Layout(picture.rows.axis, tuple(b - a for a, b in zip(ends, ends[1:])))
    start, stop = ends[picture.plan.index], ends[picture.plan.index + 1]
    mine = source[start:stop] - picture.rows.bounds(picture.plan.index)[0]
    sizes = [math.floor(n * factor[i]) if factor else size[i] for i, n in enumerate(picture.shape[2:])]  # type: ignore[index]
    sizes[place] = stop - start
    if not stop - start:
        return picture.with_local(picture.local.new_empty([*picture.shape[:2], *sizes]), out)
    local, rows_here = picture.local, picture.local.shape[picture.rows.axis]
    repeated = torch.arange(stop - start) * rows_here // (stop - start)
    if (stop - start) % rows_here or not torch.equal(mine, repeated):
        local = picture.plan.compute(torch.index_select, local, picture.rows.axis, mine.to(local.device))
    local = picture.plan.compute(func, local, sizes, None, given["mode"])
    return picture.with_local(local, out)


# --- norms ------------------------------------------------------------------------------------------------------------


def _statistics(values: torch.Tensor) -> torch.Tensor:
    """Of each row of [groups, n]: n, mean, sum of squared distances from it; [3, groups] in fp32 (fp64 of fp64)."""
    precise = values.dtype if values.dtype == torch.float64 else torch.float32
    if not values.shape[1]:
        return torch.zeros(3, values.shape[0], dtype=precise, device=values.device)
    step = values.shape[0] if values.dtype == precise else max(1, STATISTICS_PIECE // values.shape[1])
    found = [torch.var_mean(part.to(precise), dim=1, correction=0) for part in values.split(step)]
    variance, mean = (torch.cat(parts) for parts in zip(*found))
    return torch.stack([torch.full_like(mean, values.shape[1]), mean, variance * values.shape[1]])


def merged_statistics(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the values of all ranks, [groups] each, from `_statistics` of their parts, [ranks, 3, groups].

    The sum of squared distances from the common mean is that from each part's own mean, plus the distances of these
    (Chan, Golub & LeVeque 1979), so nothing cancels.
    """
    counts, means, squares = parts.unbind(1)
    total = counts.sum(0)
    mean = (means * (counts / total)).sum(0)
    return mean, (squares + (means - mean).square() * counts).sum(0) / total


def _group_norm(func: Any, args: Any, kwargs: Any) -> Any:
    names = "input num_groups weight bias eps"
    given = _arguments(names, args[:5], kwargs, weight=None, bias=None, eps=1e-5)
    picture, groups = given["input"], given["num_groups"]
    if not isinstance(picture, RowsTensor) or picture.rows.axis < 2 or picture.shape[1] % groups:
        return NotImplemented
    plan, local = picture.plan, picture.local
    batch, channels = local.shape[:2]
    mine = plan.compute(_statistics, local.reshape(batch * groups, local.numel() // (batch * groups)))
    gathered = plan.group.all_gather(plan._sendable(mine).unsqueeze(0), [1] * plan.size)
    if not local.numel():
        return picture
    mean, variance = merged_statistics(gathered)

    out = plan.compute(_normalised, local, mean, variance, given["weight"], given["bias"], groups, given["eps"])
    return picture.with_local(out)


def _normalised(
    local: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, weight: Any, bias: Any, groups: int, eps: float
) -> torch.Tensor:
    """A group norm [B, C, ...] with given mean and variance [B * groups].

    A batch norm with given statistics is one pass over memory, computed in the precision of the statistics.
    """
    batch, channels = local.shape[:2]
    scale, shift = (None if value is None else value.to(mean.dtype).repeat(batch) for value in (weight, bias))
    mean, variance = (value.repeat_interleave(channels // groups) for value in (mean, variance))
    flat = local.reshape(1, batch * channels, -1)
    return F.batch_norm(flat, mean, variance, scale, shift, eps=eps).view(local.shape)


def _over_last_axes(func: Any, args: Any, kwargs: Any) -> Any:
    """layer_norm and rms_norm of axes of which rows are none."""
    tensor = args[0]
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    if not isinstance(tensor, RowsTensor) or tensor.rows.axis >= tensor.ndim - len(shape):
        return NotImplemented
    return tensor.with_local(tensor.plan.compute(func, tensor.local, *args[1:], **kwargs))


# --- products and attention -------------------------------------------------------------------------------------------


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if not isinstance(tensor, RowsTensor) or tensor.rows.axis == tensor.ndim - 1:
        return NotImplemented
    return tensor.with_local(tensor.plan.compute(func, tensor.local, *args[1:], **kwargs))


def _product(func: Any, args: Any, kwargs: Any) -> Any:
    """Matrix products whose left side has rows as rows; the right side is needed whole."""
    left, right = args[:2]
    if not isinstance(left, RowsTensor) or left.rows.axis != left.ndim - 2 or right.ndim < 2:
        return NotImplemented
    local = left.plan.compute(func, left.local, whole(right))
    return left.with_local(local, left.rows.moved(local.ndim - 2))


def _attention(func: Any, args: Any, kwargs: Any) -> Any:
    """Queries stay; keys and values come from all ranks, in one message where they are alike."""
    given = _arguments("query key value attn_mask dropout_p is_causal", args, kwargs, attn_mask=None)
    q, k, v, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    usual = not given.get("is_causal") and not given.get("dropout_p")
    if not isinstance(q, RowsTensor) or q.rows.axis != q.ndim - 2 or not usual:
        return NotImplemented
    k, v = _keys_and_values(k, v)
    mask = whole(mask)
    if mask is not None and mask.ndim >= 2 and mask.shape[-2] != 1:
        mask = q.plan.part(mask, q.rows.moved(-2))
    options = {name: given[name] for name in ("scale", "enable_gqa") if name in given}
    if not q.local.numel():
        return q.with_local(q.local.new_empty([*q.local.shape[:-1], v.shape[-1]]))
    return q.with_local(q.plan.compute(func, q.local, k, v, attn_mask=mask, **options))


def _keys_and_values(k: Any, v: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole keys and values."""
    both = isinstance(k, RowsTensor) and isinstance(v, RowsTensor)
    if not (both and k.rows == v.rows and k.shape == v.shape and k.dtype == v.dtype):
        return whole(k), whole(v)
    pair = k.plan.compute(torch.stack, [k.local, v.local])
    together = whole(RowsTensor(pair, k.rows.moved(k.rows.axis + 1), k.plan))
    return together[0], together[1]


def _cudnn_attention(func: Any, args: Any, kwargs: Any) -> Any:
    """The kernel that our attention asks for by name on Hopper: (output, log-sum-exp if asked for, ...)."""
    q, k, v, bias, need_lse, *rest = args
    if not isinstance(q, RowsTensor) or q.rows.axis != q.ndim - 2 or bias is not None or need_lse or rest or kwargs:
        return NotImplemented
    k, v = _keys_and_values(k, v)
    if not q.local.numel():
        return q, None
    return q.with_local(q.plan.compute(lambda *parts: func(*parts, None, False)[0], q.local, k, v)), None


for _axes in (1, 2, 3):
    register(_convolution(_axes), f"conv{_axes}d")
    register(_pooling(_axes), f"avg_pool{_axes}d")
register(_padded, "pad")
register(_resized, "interpolate")
register(_group_norm, "group_norm")
register(_over_last_axes, "layer_norm rms_norm")
register(_linear, "linear")
register(_product, "matmul __matmul__ bmm")
register(_attention, "scaled_dot_product_attention")
register(_cudnn_attention, "_scaled_dot_product_cudnn_attention")
