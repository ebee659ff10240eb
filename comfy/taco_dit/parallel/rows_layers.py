"""Layers of convolutional networks on rows of a picture: convolutions, resizing, norms, products and attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .rows_plan import Exchange, Range, RowsPlan, common, joined_rows, own_rows
from .rows_tensor import Handler, Layout, RowsTensor, register, whole

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
        # An output belongs to the rank of the input row in the middle of its window.
        middle = (self.reach - 1) // 2 - padding
        ends = [min(max(-((middle - end) // stride), 0), height) for end in rows.starts()]
        ends[0], ends[-1] = 0, height
        self.made = [(a, max(a, b)) for a, b in zip(ends, ends[1:])]
        self.out = Layout(rows.axis, tuple(b - a for a, b in self.made))

    def span(self, rank: int) -> Range:
        """Input rows from one to before another, counted before padding, so possibly beyond the picture."""
        a, b = self.made[rank]
        return (a * self.stride - self.padding, (b - 1) * self.stride - self.padding + self.reach) if b > a else (0, 0)

    def wanted(self, rank: int) -> Range:
        """Those of the span that exist."""
        return common(self.span(rank), (0, self.rows.rows))


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
    own = own_rows(picture, (first, last))
    if first < 0:
        above = [_zero_rows(picture.local, axis, -first), *above]
    if last > picture.rows.rows:
        below = [*below, _zero_rows(picture.local, axis, last - picture.rows.rows)]
    return plan.compute(convolve, joined_rows(plan, above, own, below, axis), 0)


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
    """Constants or copies of borders around the picture: above the first row on the first rank, below the last on the last."""
    given = _arguments("input pad mode value", args, kwargs, mode="constant", value=None)
    picture, pads = given["input"], list(given["pad"])
    rows = picture.rows
    place = 2 * (picture.ndim - 1 - rows.axis)
    above, below = pads[place : place + 2] if place < len(pads) else (0, 0)
    here = (not above or rows.counts[0]) and (not below or rows.counts[-1])
    known = given["mode"] == "constant" or (given["mode"] == "replicate" and here)  # a rank without rows has no border
    if (above or below) and (not known or min(above, below) < 0 or rows.unit != 1):
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


def _cells(grow: bool) -> Handler:
    """`pixel_shuffle` (grow) and `pixel_unshuffle`, whose cells of rows are each on one rank."""

    name = "upscale_factor" if grow else "downscale_factor"

    def handler(func: Any, args: Any, kwargs: Any) -> Any:
        given = _arguments(f"input {name}", args, kwargs)
        picture, factor = given["input"], given[name]
        counts = picture.rows.counts
        whole_cells = grow or not any(count % factor for count in counts)
        if picture.rows.axis != picture.ndim - 2 or picture.rows.unit != 1 or not whole_cells:
            return NotImplemented
        counts = tuple(count * factor if grow else count // factor for count in counts)
        return picture.with_local(picture.plan.compute(func, picture.local, factor), Layout(picture.rows.axis, counts))

    return handler


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


def _statistics(local: torch.Tensor, groups: int) -> torch.Tensor:
    """Of each group of channels of [B, C, ...]: values, mean, sum of squared distances; [3, B * groups], fp32 (fp64 of fp64).

    They are computed by channel, in whatever order values are in memory, and channels are merged like ranks. Half-precision
    values are summed in fp32 without a copy in fp32: their own rounding is coarser than what cancels in these sums.
    """
    batch, channels = local.shape[:2]
    axes, each = tuple(range(2, local.ndim)), local.numel() // (batch * channels)
    half = local.dtype in (torch.float16, torch.bfloat16)
    if not each:
        return torch.zeros(3, batch * groups, dtype=torch.float32 if half else local.dtype, device=local.device)
    if half:
        mean = local.sum(axes, dtype=torch.float32) / each
        squares = torch.linalg.vector_norm(local, dim=axes, dtype=torch.float32).square()
        variance = (squares / each - mean.square()).clamp_min(0)
    else:
        variance, mean = torch.var_mean(local, dim=axes, correction=0)
    of_channels = torch.stack([torch.full_like(mean, each), mean, variance * each])
    mean, variance = merged_statistics(of_channels.view(3, batch * groups, -1).permute(2, 0, 1))
    each *= channels // groups
    return torch.stack([torch.full_like(mean, each), mean, variance * each])


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
    mine = plan.compute(_statistics, local, groups)
    gathered = plan.group.all_gather(plan.sendable(mine).unsqueeze(0), [1] * plan.size)
    if not local.numel():
        return picture
    mean, variance = merged_statistics(gathered)

    out = plan.compute(_normalised, local, mean, variance, given["weight"], given["bias"], groups, given["eps"])
    return picture.with_local(out)


def _normalised(
    local: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, weight: Any, bias: Any, groups: int, eps: float
) -> torch.Tensor:
    """A group norm [B, C, ...] with given mean and variance [B * groups], in one pass and in their precision."""
    shape = [*local.shape[:2], *([1] * (local.ndim - 2))]
    by_channel = local.shape[1] // groups
    mean, scale = (value.repeat_interleave(by_channel).view(shape[:2]) for value in (mean, (variance + eps).rsqrt()))
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.to(shift.dtype)
    return torch.addcmul(shift.view(shape), local, scale.view(shape), out=torch.empty_like(local))


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
register(_cells(True), "pixel_shuffle")
register(_cells(False), "pixel_unshuffle")
register(_group_norm, "group_norm")
register(_over_last_axes, "layer_norm rms_norm")
register(_linear, "linear")
register(_product, "matmul __matmul__ bmm")
register(_attention, "scaled_dot_product_attention")
register(_cudnn_attention, "_scaled_dot_product_cudnn_attention")
