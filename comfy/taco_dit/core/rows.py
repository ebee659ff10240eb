"""Whether the rows of a denoiser call (conditionings x pictures) may be evaluated on different ranks.

Rows are independent when every function that runs in or around the network treats each row by itself. Our own code
does. Code of custom nodes may let the pictures of a batch see one another (shared attention, reference pictures,
statistics over the batch), so rows are coupled while any is present, unless it declares `rows_independent = True`
(an attribute of the function, or of the object whose method it is).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import comfy.families
from comfy.denoiser_batch import DenoiserBatch
from comfy.ldm import dit
from comfy.ldm.modules import attention

from .plan import ParallelDims, share

Rows = list[tuple[int, list[int], tuple[int, int]]]
"""(place of a batch, some of its conditionings, [start, stop) of its pictures)."""

_WRAPPERS = ("apply_model", "diffusion_model")


def is_independent(function: Any) -> bool:
    """Whether a function declares that it treats each row by itself."""
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    return bool(getattr(function, "rows_independent", False) or getattr(owner, "rows_independent", False))


def _functions(options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(what it is, function) of all foreign code in `transformer_options`."""
    if options.get("optimized_attention_override") is not None:
        yield "an attention override", options["optimized_attention_override"]
    for kind, patches in options.get("patches", {}).items():
        yield from ((f"a {kind} patch", patch) for patch in patches)
    for kind, replacements in options.get("patches_replace", {}).items():
        yield from ((f"a replaced {kind} block", patch) for patch in replacements.values())
    for kind in _WRAPPERS:
        for wrappers in options.get("wrappers", {}).get(kind, {}).values():
            yield from ((f"a {kind} wrapper", wrapper) for wrapper in wrappers)


def _replaced(network: Any) -> Iterator[tuple[str, Any]]:
    """(what it is, function if there is one to ask) of all that is replaced in a network itself."""
    family = comfy.families.record_of(network)
    # A network may inherit from another family's.
    homes = ("comfy.",) if family is None else (family.network.partition(":")[0], "comfy.ldm.")
    for name in ("forward", "_forward", "forward_orig"):
        method = getattr(network, name, None)
        ours = name not in vars(network) and getattr(method, "__module__", homes[0]).startswith(homes)
        if method is not None and not ours:
            yield f"a replaced {name}", method
    blocks = dit.foreign_blocks(network)
    if blocks:
        yield f"{len(blocks)} replaced blocks", None
    function = getattr(network, "replaced_attention", lambda: None)()
    if function is not None:
        yield "a replaced attention function", function


def replaced_parts(network: Any) -> list[str]:
    """Parts of a network that are not ours: they may do something else in each call."""
    return [what for what, _ in _replaced(network)]


def _controls(batches: list[DenoiserBatch]) -> Iterator[tuple[str, Any]]:
    """(what it is, object) of control networks that are not ours, or whose method was replaced."""
    for control in {id(batch.control): batch.control for batch in batches}.values():
        while control is not None:
            if not type(control).__module__.startswith("comfy.control.") or "get_control" in vars(control):
                yield f"a control network ({type(control).__name__})", control
            control = getattr(control, "previous_controlnet", None)


def foreign_parts(network: Any, batches: list[DenoiserBatch], model_options: dict[str, Any]) -> list[str]:
    """What is in or around a network that may look at all rows of a call together, each kind once."""
    wrapper = model_options.get("model_function_wrapper")
    found = [] if wrapper is None else [("a model function wrapper", wrapper)]
    everywhere = [model_options.get("transformer_options", {})]
    everywhere += [batch.conditioning.get("transformer_options", {}) for batch in batches]
    for options in everywhere:
        found += _functions(options)
    found += [*_controls(batches), *_replaced(network)]
    for function in (attention.optimized_attention, attention.optimized_attention_masked):
        if function is not attention.attention_pytorch:
            found.append(("a replaced attention function", function))
    return list(dict.fromkeys(what for what, function in found if function is None or not is_independent(function)))


def has_foreign_code(network: Any, batches: Sequence[DenoiserBatch], model_options: dict[str, Any]) -> bool:
    """Whether anything in or around a network is not ours, and so must see whole tokens."""
    everywhere = [model_options.get("transformer_options", {})]
    everywhere += [batch.conditioning.get("transformer_options", {}) for batch in batches]
    functions = (attention.optimized_attention, attention.optimized_attention_masked)
    return (
        any(True for options in everywhere for _ in _functions(options))
        or any(True for _ in _replaced(network))
        or any(function is not attention.attention_pytorch for function in functions)
    )


def can_deal_rows(network: Any, batches: Sequence[DenoiserBatch], model_options: dict[str, Any]) -> bool:
    """Whether a network of which all layers are ours can be called with rows of pictures (`row_unit`).

    Patches and replacements can be given whole pictures; what runs around or instead of our own layers cannot, and may not
    know what it is given.
    """
    if not getattr(network, "row_unit", 0) or replaced_parts(network):
        return False
    everywhere = [model_options.get("transformer_options", {})]
    everywhere += [batch.conditioning.get("transformer_options", {}) for batch in batches]
    if any(
        any(options.get("wrappers", {}).get("diffusion_model", {}).values())
        or options.get("patches", {}).get("forward_timestep_embed_patch")
        for options in everywhere
    ):
        return False
    functions = (attention.optimized_attention, attention.optimized_attention_masked)
    return all(function is attention.attention_pytorch for function in functions)


def all_layers_are_ours(network: Any) -> bool:
    """Whether no part of a network is compiled, hooked or foreign, and so takes tensors of torch's own only."""
    return all(map(_is_ours, network.modules()))


def _is_ours(module: Any) -> bool:
    """Whether a module runs the forward of a class of torch's or ours."""
    kind, own = type(module), vars(module)
    return (
        kind.__module__.startswith(("torch.nn.", "comfy."))
        and kind.forward.__module__.startswith(("torch.nn.", "comfy."))
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
    )


def can_cut(batches: list[DenoiserBatch]) -> bool:
    """Whether every tensor of the batches has an axis by which conditionings and pictures can be separated."""
    try:
        for batch in batches:
            batch.select_conds([0])
            batch.select_samples(0, 1)
    except ValueError:
        return False
    return True


def rows_of(batches: list[DenoiserBatch], dims: ParallelDims, cfg: int, data: int) -> Rows:
    """What the row group (cfg, data) evaluates."""
    units = [(i, c) for i, batch in enumerate(batches) for c in range(len(batch.cond_or_uncond))]
    start, stop = share(len(units), dims.cfg_degree, cfg)
    out: Rows = []
    for i, c in units[start:stop]:
        if out and out[-1][0] == i:
            out[-1][1].append(c)
        else:
            out.append((i, [c], share(batches[i].batch_size, dims.data_degree, data)))
    return out


def collect_rows(batches: list[DenoiserBatch], dims: ParallelDims, outs: list[Any], gather: Any) -> list[Any]:
    """Predictions of each batch [k * B, C, ...] from those of all row groups.

    outs: this row group's predictions. `gather(flat, counts)` joins the flat tensors of all row groups in order: rows
    of a call may differ in size, so they are sent flat.
    """
    owners = [(c, d) for c in range(dims.cfg_degree) for d in range(dims.data_degree)]
    assigned = [rows_of(batches, dims, c, d) for c, d in owners]
    width = [batch.x[0].numel() for batch in batches]
    counts = [sum(len(conds) * (b - a) * width[i] for i, conds, (a, b) in rows) for rows in assigned]
    flat = torch.cat([out.reshape(-1) for out in outs])
    whole = gather(flat, counts)
    results = [torch.empty(batch.x.shape, dtype=flat.dtype, device=flat.device) for batch in batches]
    position = 0
    for rows in assigned:
        for i, conds, (start, stop) in rows:
            batch = batches[i]
            shape = (len(conds), stop - start, *batch.x.shape[1:])
            size = math.prod(shape)
            view = results[i].view(len(batch.cond_or_uncond), batch.batch_size, *batch.x.shape[1:])
            view[conds[0] : conds[-1] + 1, start:stop] = whole[position : position + size].view(shape)
            position += size
    return results
