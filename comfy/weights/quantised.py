"""Which linears of a network multiply in eight bits, and their weights in that form.

A weight in fp8 stays as it is in its file; its layer's scale is the file's. Any other is quantised on the device by output
channel, after patches (`WeightStore._write`), in the memory that it has once it is there, so that captured CUDA graphs
stay valid. It is calculated from the original each time, so a LoRA that comes and goes leaves no trace.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

import comfy.families
import comfy.ops
from comfy.ldm.modules.eight_bit import FORMATS, FP8, EightBit, Format, quantise_weight

from .patching import real_value
from .records import Weight

BATCH_BYTES = 1 << 29  # of originals that are on a device together until they are quantised
NETWORK = "diffusion_model"


def _can_multiply(module: Any, form: Format) -> bool:
    """Whether a layer is a linear of ours, of a size that the format's products take."""
    return (
        isinstance(module, comfy.ops.disable_weight_init.Linear)
        and module.in_features % form.multiple == 0
        and module.out_features % form.multiple == 0
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


def formats(model: Any, precision: str, device: torch.device, source: Any) -> dict[str, Format]:
    """{path of a linear: the format in which it multiplies} for a `linear_precision`; `source(key)`: a weight's original.

    auto: weights that are in fp8 in their file, on GPUs that multiply fp8. fp8, int8: all weights.
    """
    if precision == "bf16" or (precision == "auto" and not comfy.model_management.supports_fp8_compute(device)):
        return {}
    form = FORMATS.get(precision, FP8)
    found = {}
    for path, module in _linears(model):
        plain = type(weight := source(f"{path}.weight")) in (torch.Tensor, torch.nn.Parameter)
        if plain and _can_multiply(module, form) and (precision != "auto" or weight.dtype == form.dtype):
            found[path] = form
    return found


def bytes_of(module: Any, name: str) -> int:
    """Bytes that a weight or buffer takes on the device."""
    tensor = getattr(module, name)
    eight_bit = getattr(module, "eight_bit", None)
    if name != "weight" or eight_bit is None:
        return tensor.nbytes
    return tensor.numel() + 4 * tensor.shape[0]


def saving(wanted: Mapping[str, Format], source: Any) -> int:
    """Bytes that weights take less on the device in their eight-bit form."""
    weights = [source(f"{path}.weight") for path in wanted]
    return sum(weight.nbytes - weight.numel() - 4 * weight.shape[0] for weight in weights)


def _file_scale(module: Any, device: torch.device) -> torch.Tensor:
    """The scale [N] of a weight that its file has in eight bits."""
    scale = getattr(module, "scale_weight", None)
    value = torch.ones((), device=device) if scale is None else scale.detach().to(device, torch.float32).reshape(())
    return value.expand(module.out_features).contiguous()


def _is_so(module: Any, form: Format | None, stored: bool, device: torch.device) -> bool:
    """Whether a layer is prepared for `form` already."""
    known = getattr(module, "eight_bit", None)
    return known is not None and known.form is form and (not stored or known.scale.device == device)


def prepare(store: Any, device: torch.device, whole: bool) -> None:
    """Let the layers of a network know in which format they multiply; copies in another form are dropped.

    whole: all in full precision, for weights that are about to be saved.
    """
    wanted = {} if whole else formats(store.model, store.linear_precision, device, store.source)
    store.multiplies_in = next((form.name for form in wanted.values()), None)
    for path, module in store.model.named_modules():
        form = wanted.get(path)
        if form is None and getattr(module, "eight_bit", None) is None:
            continue
        weight = store.weight(f"{path}.weight")
        stored = form is not None and weight.source.dtype == form.dtype
        if _is_so(module, form, stored, device):
            continue
        store._drop(weight)
        vars(module).pop("eight_bit", None)
        weight.eight_bit = None
        if form is not None:
            mark = EightBit(form, _file_scale(module, device) if stored else None)
            vars(module)["eight_bit"] = mark
            weight.eight_bit = None if stored else mark
        store._moved()


def plain_again(store: Any) -> None:
    """Let a network that left its device compute in full precision."""
    prepare(store, torch.device("cpu"), whole=True)


def bring(store: Any, weights: Iterable[Weight], fetch: Any) -> None:
    """Originals to the device, a few at a time, and there quantised into the memory that the weights have or get."""
    batch: list[Weight] = []
    size = 0
    for weight in weights:
        batch.append(weight)
        size += weight.source.nbytes
        if size >= BATCH_BYTES:
            _bring(store, batch, fetch)
            batch, size = [], 0
    _bring(store, batch, fetch)


def original(store: Any, weight: Weight) -> torch.Tensor:
    """Where the original of a weight is copied to: memory of its own on the device."""
    return torch.empty_like(weight.source, device=store.device, memory_format=torch.contiguous_format)


def _bring(store: Any, weights: list[Weight], fetch: Any) -> None:
    with torch.inference_mode(False):
        pairs = [(weight.source, original(store, weight)) for weight in weights]
    fetch(pairs)
    for weight, (_, copied) in zip(weights, pairs):
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


def real_from(weight: Weight, stored: torch.Tensor) -> torch.Tensor:
    """The real value, fp32, of a weight that is stored in eight bits."""
    assert weight.eight_bit is not None and weight.eight_bit.scale is not None
    return stored.to(torch.float32) * weight.eight_bit.scale.unsqueeze(1)
