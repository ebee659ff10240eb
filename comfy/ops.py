"""Layers whose weights may be stored in another dtype or on another device than they compute in.

`disable_weight_init` layers leave their weights uninitialised and compute in place; `manual_cast` layers bring each
weight to the input's device and dtype when it is used, which is how offloaded, half-precision and fp8 weights run. A
layer's `weight_function` and `bias_function` lists (patches applied on the fly) are honoured by both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from comfy.cli_args import PerformanceFeature, args
from comfy.ldm.modules import eight_bit as in_eight_bits
from comfy.ldm.modules.eight_bit import FP8, EightBit, Rows

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def scaled_dot_product_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Torch's function of that name, for packs that call or replace it here."""
    return F.scaled_dot_product_attention(q, k, v, *args, **kwargs)


def cast_to(
    weight: torch.Tensor | None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    copy: bool = False,
    stream: Any = None,
) -> Any:
    """`weight` on `device` as `dtype`; the tensor itself when nothing changes and `copy` is False."""
    if weight is None:
        return None
    return weight.to(device=device, dtype=dtype, non_blocking=non_blocking, copy=copy)


def cast_to_input(
    weight: torch.Tensor | None, input: torch.Tensor, non_blocking: bool = False, copy: bool = True
) -> Any:
    """`weight` on the device and in the dtype of `input`."""
    return cast_to(weight, input.dtype, input.device, non_blocking=non_blocking, copy=copy)


def cast_bias_weight(
    s: Any,
    input: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    bias_dtype: torch.dtype | None = None,
    offloadable: bool = False,
) -> Any:
    """(weight, bias) of layer `s` ready to compute with `input`, on-the-fly patches applied.

    offloadable: newer ComfyUI's, return (weight, bias, what `uncast_bias_weight` gets afterwards).
    """
    if input is not None:
        dtype = dtype or (input.dtype if input.dtype not in FP8_DTYPES else torch.bfloat16)
        device = device or input.device
    non_blocking = device is not None and torch.device(device).type == "cuda"
    weight, bias = s.weight, getattr(s, "bias", None)
    stream = getattr(s, "streamed_weights", None)
    if stream is not None and device is not None and torch.device(device).type == "cuda":
        arrived = stream.take(s)  # on their way since the layers before this one
        weight, bias = arrived.get("weight", weight), arrived.get("bias", bias)
    if bias is not None:
        bias = _patched(bias, getattr(s, "bias_function", ()), bias_dtype or dtype, device, non_blocking)
    functions = getattr(s, "weight_function", ())
    eight_bit = getattr(s, "eight_bit", None)
    if functions or (eight_bit is not None and eight_bit.scale is None):
        weight = _real(s, weight, dtype, device, non_blocking)
    weight = _patched(weight, functions, dtype, device, non_blocking)
    return (weight, bias, None) if offloadable else (weight, bias)


def uncast_bias_weight(s: Any, weight: torch.Tensor, bias: torch.Tensor | None, offload_stream: Any) -> None:
    """Newer ComfyUI's end of the use of what `cast_bias_weight` gave; here memory is free when nobody holds it."""


def _real(
    layer: Any, weight: torch.Tensor, dtype: torch.dtype | None, device: torch.device | None, non_blocking: bool
) -> torch.Tensor:
    """A weight that is stored divided by a scale, as it is real: so functions between weights and layers see it."""
    eight_bit = getattr(layer, "eight_bit", None)
    scale = None if eight_bit is None else eight_bit.scale
    scale = getattr(layer, "scale_weight", None) if scale is None else scale
    if scale is None:
        return weight
    weight = cast_to(weight, dtype, device, non_blocking=non_blocking)
    return weight * scale.to(weight.device, weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))


def _patched(
    tensor: torch.Tensor,
    functions: Iterable[Callable[[torch.Tensor], torch.Tensor]],
    dtype: torch.dtype | None,
    device: torch.device | None,
    non_blocking: bool,
) -> torch.Tensor:
    functions = tuple(functions)
    tensor = cast_to(tensor, dtype, device, non_blocking=non_blocking, copy=bool(functions))
    for function in functions:
        tensor = function(tensor)
    return tensor


def _conv_transpose(
    layer: Any, convolve: Any, input: torch.Tensor, output_size: list[int] | None, axes: int
) -> torch.Tensor:
    """A transposed convolution over `axes` axes with the layer's cast weights."""
    padding = layer._output_padding(
        input, output_size, layer.stride, layer.padding, layer.kernel_size, axes, layer.dilation
    )
    weight, bias = cast_bias_weight(layer, input)
    return convolve(input, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)


class CastWeightBiasOp:
    """Mixin: whether weights are cast at each use, and the patches applied to them then."""

    comfy_cast_weights = False
    # replaced as a whole, never appended to: a pack's layer may leave out `__init__`
    weight_function: Sequence[Callable[[torch.Tensor], torch.Tensor]] = ()
    bias_function: Sequence[Callable[[torch.Tensor], torch.Tensor]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_function, self.bias_function = [], []

    def reset_parameters(self) -> None:
        """Weights come from a file; initialising them would only cost time."""

    @property
    def casts(self) -> bool:
        """Whether the next forward goes through `forward_comfy_cast_weights`."""
        return bool(self.comfy_cast_weights or self.weight_function or self.bias_function)

    def _load_from_state_dict(
        self: Any, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Take tensors as they are stored (memory-mapped, in their dtype) instead of copying them in."""
        own = dict(self.named_parameters(recurse=False))
        for name, parameter in own.items():
            value = state_dict.get(prefix + name)
            if value is None:
                continue
            if value.shape != parameter.shape:
                errors.append(
                    f"{prefix}{name} has shape {tuple(value.shape)} in the file but {tuple(parameter.shape)} in the model"
                )
                continue
            if parameter.is_meta or local_metadata.get("assign_to_params_buffers"):
                setattr(self, name, torch.nn.Parameter(value, requires_grad=False))
            else:
                with torch.no_grad():
                    parameter.copy_(value)
        if strict:
            missing.extend(prefix + name for name in own if prefix + name not in state_dict)


def _eight_bit_product(layer: Any, form: EightBit, input: torch.Tensor | Rows) -> torch.Tensor:
    """The product of a layer that multiplies in eight bits, wherever its weights are and with what is patched at use."""
    device = input.values.device if isinstance(input, Rows) else input.device
    as_stored = form.scale is not None and not layer.weight_function and layer.weight.dtype == form.form.dtype
    dtype = form.form.dtype if as_stored else torch.float32
    weight, bias = cast_bias_weight(layer, dtype=dtype, device=device, bias_dtype=input.dtype)
    return in_eight_bits.linear(layer, input, weight, bias)


class disable_weight_init:  # noqa: N801 (ComfyUI's name)
    """Torch's layers without initialisation; they compute in their weights' dtype."""

    class Linear(CastWeightBiasOp, torch.nn.Linear):
        eight_bit: EightBit | None = None
        """Set where it multiplies in eight bits."""

        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            weight, bias = cast_bias_weight(self, input)
            return F.linear(input, weight, bias)

        def forward(self, input: torch.Tensor | Rows, *args: Any, **kwargs: Any) -> torch.Tensor:
            """input: tokens [.., in], or the same in eight bits where `eight_bit.reads_rows` says so."""
            if self.eight_bit is not None:
                return _eight_bit_product(self, self.eight_bit, input)
            assert isinstance(input, torch.Tensor)
            return self.forward_comfy_cast_weights(input) if self.casts else super().forward(input)

        forward.takes_rows = True  # type: ignore[attr-defined]

    class Conv1d(CastWeightBiasOp, torch.nn.Conv1d):
        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(input, *cast_bias_weight(self, input))

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.forward_comfy_cast_weights(*args, **kwargs) if self.casts else super().forward(*args, **kwargs)

    class Conv2d(CastWeightBiasOp, torch.nn.Conv2d):
        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(input, *cast_bias_weight(self, input))

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.forward_comfy_cast_weights(*args, **kwargs) if self.casts else super().forward(*args, **kwargs)

    class Conv3d(CastWeightBiasOp, torch.nn.Conv3d):
        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(input, *cast_bias_weight(self, input))

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.forward_comfy_cast_weights(*args, **kwargs) if self.casts else super().forward(*args, **kwargs)

    class ConvTranspose1d(CastWeightBiasOp, torch.nn.ConvTranspose1d):
        def forward_comfy_cast_weights(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
            return _conv_transpose(self, F.conv_transpose1d, input, output_size, 1)

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.forward_comfy_cast_weights(*args, **kwargs) if self.casts else super().forward(*args, **kwargs)

    class ConvTranspose2d(CastWeightBiasOp, torch.nn.ConvTranspose2d):
        def forward_comfy_cast_weights(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
            return _conv_transpose(self, F.conv_transpose2d, input, output_size, 2)

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.forward_comfy_cast_weights(*args, **kwargs) if self.casts else super().forward(*args, **kwargs)

    class GroupNorm(CastWeightBiasOp, torch.nn.GroupNorm):
        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            weight, bias = cast_bias_weight(self, input)
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.forward_comfy_cast_weights(*args, **kwargs) if self.casts else super().forward(*args, **kwargs)

    class LayerNorm(CastWeightBiasOp, torch.nn.LayerNorm):
        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            weight = bias = None
            if self.weight is not None:
                weight, bias = cast_bias_weight(self, input)
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.forward_comfy_cast_weights(*args, **kwargs) if self.casts else super().forward(*args, **kwargs)

    class RMSNorm(CastWeightBiasOp, torch.nn.RMSNorm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.bias: torch.Tensor | None = None  # packs' own casts read it of every layer

        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            weight = cast_bias_weight(self, input)[0] if self.weight is not None else None
            return F.rms_norm(input, self.normalized_shape, weight, self.eps)

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.forward_comfy_cast_weights(*args, **kwargs) if self.casts else super().forward(*args, **kwargs)

    class Embedding(CastWeightBiasOp, torch.nn.Embedding):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.bias: torch.Tensor | None = None  # as above

        def forward_comfy_cast_weights(self, input: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
            dtype = out_dtype
            if self.weight.dtype in (torch.float16, torch.bfloat16):
                out_dtype = None
            weight, _ = cast_bias_weight(self, device=input.device, dtype=out_dtype)
            out = F.embedding(
                input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
            )
            return out if dtype is None else out.to(dtype)

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.casts:
                return self.forward_comfy_cast_weights(*args, **kwargs)
            kwargs.pop("out_dtype", None)
            return super().forward(*args, **kwargs)

    @classmethod
    def conv_nd(cls, dims: int, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """A convolution over 2 or 3 axes."""
        if dims not in (2, 3):
            raise ValueError(f"convolutions exist over 2 or 3 axes here, not {dims}")
        return (cls.Conv2d if dims == 2 else cls.Conv3d)(*args, **kwargs)


class manual_cast(disable_weight_init):  # noqa: N801 (ComfyUI's name)
    """`disable_weight_init` with every weight cast to the input at use."""

    class Linear(disable_weight_init.Linear):
        comfy_cast_weights = True

    class Conv1d(disable_weight_init.Conv1d):
        comfy_cast_weights = True

    class Conv2d(disable_weight_init.Conv2d):
        comfy_cast_weights = True

    class Conv3d(disable_weight_init.Conv3d):
        comfy_cast_weights = True

    class ConvTranspose1d(disable_weight_init.ConvTranspose1d):
        comfy_cast_weights = True

    class ConvTranspose2d(disable_weight_init.ConvTranspose2d):
        comfy_cast_weights = True

    class GroupNorm(disable_weight_init.GroupNorm):
        comfy_cast_weights = True

    class LayerNorm(disable_weight_init.LayerNorm):
        comfy_cast_weights = True

    class RMSNorm(disable_weight_init.RMSNorm):
        comfy_cast_weights = True

    class Embedding(disable_weight_init.Embedding):
        comfy_cast_weights = True


def fp8_linear(layer: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor | None:
    """The layer's product computed in fp8 by tensor cores, or None where shapes or dtypes do not allow it.

    Weights are scaled by `layer.scale_weight` where the file has one. input: [..., in] bf16 or fp16, weight: [out, in]
    e4m3. Returns [..., out] in the input's dtype.
    """
    weight = layer.weight
    if not input.is_cuda or weight.dtype != FP8.dtype or input.dtype not in (torch.bfloat16, torch.float16):
        return None
    if weight.shape[0] % FP8.multiple or weight.shape[1] % FP8.multiple or getattr(layer, "weight_function", None):
        return None
    if getattr(layer, "streamed_weights", None) is not None:
        return None  # it waits in host memory: cast_bias_weight brings it over in time
    scale = getattr(layer, "scale_weight", None)
    one = torch.ones((), device=input.device) if scale is None else scale.to(input.device, torch.float32).reshape(())
    bias = None if layer.bias is None else layer.bias.to(input.device, input.dtype)
    rows = in_eight_bits.quantise(input, FP8)
    return in_eight_bits.product(rows, weight.to(input.device), one.expand(weight.shape[0]).contiguous(), bias)


class fp8_ops(manual_cast):  # noqa: N801 (ComfyUI's name)
    """`manual_cast` whose linears multiply in fp8 where weights are fp8 and the GPU can."""

    class Linear(manual_cast.Linear):
        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            out = fp8_linear(self, input) if not self.bias_function else None
            return super().forward_comfy_cast_weights(input) if out is None else out


def scaled_fp8_ops(
    fp8_matrix_mult: bool = False, scale_input: bool = False, override_dtype: torch.dtype | None = None
) -> type[manual_cast]:
    """Operations for files whose fp8 linears carry `scale_weight` (and `scale_input`): weight = stored * scale."""

    class scaled(manual_cast):  # noqa: N801
        class Linear(manual_cast.Linear):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                device = kwargs.get("device")
                self.scale_weight = torch.nn.Parameter(
                    torch.ones((), device=device, dtype=torch.float32), requires_grad=False
                )
                self.scale_input = (
                    torch.nn.Parameter(torch.ones((), device=device, dtype=torch.float32), requires_grad=False)
                    if scale_input
                    else None
                )

            def _load_from_state_dict(
                self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
                missing: list[str], unexpected: list[str], errors: list[str],
            ) -> None:  # fmt: skip
                # Layers kept in high precision have no scale in the file.
                for name in ("scale_weight", "scale_input"):
                    scale = state_dict.get(prefix + name)
                    if scale is not None:
                        state_dict[prefix + name] = scale.reshape(())
                    elif getattr(self, name, None) is not None:
                        state_dict[prefix + name] = torch.ones((), dtype=torch.float32)
                super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

            def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
                if fp8_matrix_mult and not self.bias_function:
                    out = fp8_linear(self, input)
                    if out is not None:
                        return out
                weight, bias = cast_bias_weight(self, input)
                scale = self.scale_weight.to(weight.device, weight.dtype)
                if not self.weight_function:
                    weight = weight * scale
                return F.linear(input, weight, bias)

            def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: Any) -> torch.Tensor:
                """Stored weight -> real weight, for patching."""
                return weight.to(torch.float32) * self.scale_weight.to(weight.device, torch.float32)

            def set_weight(
                self, weight: torch.Tensor, inplace_update: bool = False, seed: int | None = None, **_: Any
            ) -> None:
                """Real weight -> stored weight."""
                from comfy.float import stochastic_rounding

                stored = weight / self.scale_weight.to(weight.device, weight.dtype)
                stored = stochastic_rounding(stored, self.weight.dtype, seed=seed or 0)
                if inplace_update:
                    self.weight.data.copy_(stored)
                else:
                    self.weight = torch.nn.Parameter(stored, requires_grad=False)

    return scaled


def pick_operations(
    weight_dtype: torch.dtype | None,
    compute_dtype: torch.dtype | None,
    load_device: torch.device | None = None,
    disable_fast_fp8: bool = False,
    fp8_optimizations: bool = False,
    scaled_fp8: torch.dtype | None = None,
) -> type[disable_weight_init]:
    """The layer classes for weights stored as `weight_dtype` and computed as `compute_dtype` (None: as stored)."""
    from comfy.model_management import supports_fp8_compute

    can_multiply = supports_fp8_compute(load_device)
    fast = PerformanceFeature.Fp8MatrixMultiplication in args.fast or fp8_optimizations
    if scaled_fp8 is not None:
        return scaled_fp8_ops(fp8_matrix_mult=can_multiply and fast and not disable_fast_fp8, scale_input=True)
    if can_multiply and fast and not disable_fast_fp8 and weight_dtype in FP8_DTYPES:
        return fp8_ops
    if compute_dtype is None or weight_dtype == compute_dtype:
        return disable_weight_init
    return manual_cast
