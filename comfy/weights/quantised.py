"""Which linears of a network multiply in eight bits, and their weights in that form.

A weight in fp8 stays as it is in its file; its layer's scale is the file's. Any other is quantised on the device by output
channel, after patches (`WeightStore._write`), in the memory that it has once it is there, so that captured CUDA graphs
stay valid. It is calculated from the original each time, so a LoRA that comes and goes leaves no trace.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

import comfy.families
import comfy.ops
from comfy.ldm.modules.eight_bit import FORMATS, FP8, EightBit, Format, eight_bit_bytes, quantise_weight

from .fetching import fetch, pairs_of
from .patching import real_value
from .records import Weight
from .table import PLAIN_TENSORS

BATCH_BYTES = 1 << 29  # of originals that are on a device together until they are quantised
NETWORK = "diffusion_model"


def _can_multiply(module: Any, shape: Sequence[int], form: Format) -> bool:
    """Whether a layer is a linear of ours, and what it has of its weight of a shape that the format's products take."""
    return isinstance(module, comfy.ops.disable_weight_init.Linear) and all(
        size > 0 and size % form.multiple == 0 for size in shape
    )


def _linears(model: Any) -> Iterator[tuple[str, Any]]:
    """(path in the model, module) of the linears that a family's record lets compute in eight bits: those of blocks."""
    network = getattr(model, NETWORK, None)
    record = None if network is None else comfy.families.record_of(network)
    if network is None or record is None:
        return
    for name, module in network.named_modules():
        matches = isinstance(module, torch.nn.Linear) and any(fnmatch.fnmatchcase(name, p) for p in record.splits)
        if matches and not any(fnmatch.fnmatchcase(name, pattern) for pattern in record.full_precision):
            yield f"{NETWORK}.{name}", module


def formats(store: Any, device: torch.device) -> dict[str, Format]:
    """{path of a linear: the format in which it multiplies} for the `linear_precision` of a network's store.

    auto: weights that are in fp8 in their file, on GPUs that multiply fp8. fp8, int8: all weights, but those of which flat
    pieces are held (sharded weights) only if their file has them in that format: pieces have no rows to be scaled.
    """
    precision = store.linear_precision
    if precision == "bf16" or (precision == "auto" and not comfy.model_management.supports_fp8_compute(device)):
        return {}
    form = FORMATS.get(precision, FP8)
    found = {}
    for path, module in _linears(store.model):
        weight, shape = store.source(f"{path}.weight"), store.wanted_shape(f"{path}.weight")
        as_in_file = weight.dtype == form.dtype
        if len(shape) == 1 and as_in_file:  # gathered before it is used
            shape = weight.shape
        if type(weight) not in PLAIN_TENSORS or len(shape) != 2 or not _can_multiply(module, shape, form):
            continue
        if precision != "auto" or as_in_file:
            found[path] = form
    return found


def saving(store: Any, device: torch.device) -> int:
    """Bytes that weights take less on the device in their eight-bit form."""
    saved = 0
    for path in formats(store, device):
        shape = store.wanted_shape(f"{path}.weight")
        saved += math.prod(shape) * store.source(f"{path}.weight").itemsize - eight_bit_bytes(shape)
    return saved


def _file_scale(module: Any, rows: int, device: torch.device) -> torch.Tensor:
    """The scale [rows] of a weight that its file has in eight bits, for the rows that the layer has."""
    scale = getattr(module, "scale_weight", None)
    value = torch.ones((), device=device) if scale is None else scale.detach().to(device, torch.float32).reshape(())
    return value.expand(rows).contiguous()


def _is_so(module: Any, form: Format | None, rows: int | None, device: torch.device) -> bool:
    """Whether a layer is prepared for `form` already. rows: of its scale, where that is from the file."""
    known = getattr(module, "eight_bit", None)
    if known is None or known.form is not form:
        return False
    return rows is None or (known.scale is not None and known.scale.device == device and len(known.scale) == rows)


def prepare(store: Any, device: torch.device, whole: bool) -> None:
    """Let the layers of a network know in which format they multiply; copies in another form are dropped.

    whole: all in full precision, for weights that are about to be saved.
    """
    wanted = {} if whole else formats(store, device)
    store.multiplies_in = next((form.name for form in wanted.values()), None)
    for path, module in store.model.named_modules():
        form = wanted.get(path)
        if form is None and getattr(module, "eight_bit", None) is None:
            continue
        weight = store.weight(f"{path}.weight")
        stored = form is not None and weight.source.dtype == form.dtype
        shape = weight.source.shape if len(weight.shape) == 1 else weight.shape
        if _is_so(module, form, shape[0] if stored else None, device):
            continue
        store._drop(weight)
        vars(module).pop("eight_bit", None)
        weight.eight_bit = None
        if form is not None:
            mark = EightBit(form, _file_scale(module, shape[0], device) if stored else None)
            vars(module)["eight_bit"] = mark
            weight.eight_bit = None if stored else mark
        store._moved()


def plain_again(store: Any) -> None:
    """Let a network that left its device compute in full precision."""
    prepare(store, torch.device("cpu"), whole=True)


def bring(store: Any, weights: Iterable[Weight]) -> None:
    """Originals to the device, a few at a time, and there quantised into the memory that the weights have or get."""
    batch: list[Weight] = []
    size = 0
    for weight in weights:
        batch.append(weight)
        size += weight.source.nbytes
        if size >= BATCH_BYTES:
            _bring(store, batch)
            batch, size = [], 0
    _bring(store, batch)


def _bring(store: Any, weights: list[Weight]) -> None:
    with torch.inference_mode(False):
        copies = [torch.empty(weight.shape, dtype=weight.source.dtype, device=store.device) for weight in weights]
    fetch(pair for weight, copied in zip(weights, copies) for pair in pairs_of(weight, copied))
    for weight, copied in zip(weights, copies):
        store._write(weight, real_value(store.model, weight.key, copied))


def quantised(weight: Weight, real: torch.Tensor) -> torch.Tensor:
    """A real value of a weight in its eight-bit form; its scale is written to where the layer has it."""
    eight_bit = weight.eight_bit
    assert eight_bit is not None
    with torch.inference_mode(False), torch.no_grad():
        values, scale = quantise_weight(real.detach(), eight_bit.form)
        if eight_bit.scale is None:
            eight_bit.scale = scale
        else:
            eight_bit.scale.copy_(scale)
    return values
