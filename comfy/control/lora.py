"""Control LoRA (Stability AI, 2023): a control network that is a low-rank difference to its diffusion model.

It has no weights of its own where the model's do: it reads the model's as they are, patches included, and adds the low-rank
part layer by layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import comfy.model_management
import comfy.ops
import comfy.utils

from .base import ControlBase
from .network import ControlNet

StateDict = dict[str, torch.Tensor]


class _LowRankOperations(comfy.ops.manual_cast):
    """Layers with a low-rank part: `up` [out, rank], `down` [rank, in] (of convolutions [rank, in, k, k])."""

    class Linear(comfy.ops.manual_cast.Linear):
        up: torch.Tensor | None = None
        down: torch.Tensor | None = None

        def forward(self, input: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            out = super().forward(input, *args, **kwargs)
            if self.up is None or self.down is None:
                return out
            low = F.linear(input, self.down.flatten(1).to(input))
            return out + F.linear(low, self.up.flatten(1).to(input))

    class Conv2d(comfy.ops.manual_cast.Conv2d):
        up: torch.Tensor | None = None
        down: torch.Tensor | None = None

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            out = super().forward(input)
            if self.up is None or self.down is None:
                return out
            down = self.down.to(input).reshape(-1, *self.weight.shape[1:])
            low = F.conv2d(input, down, None, self.stride, self.padding, self.dilation)
            return out + F.conv2d(low, self.up.to(input).flatten(1)[:, :, None, None])


class ControlLora(ControlNet):
    """See the module. The network is made before each sampling run and dropped after it."""

    def __init__(self, control_weights: StateDict | None, global_average_pooling: bool = False, **kwargs: Any) -> None:
        super().__init__(None, global_average_pooling=global_average_pooling)
        self.control_weights = control_weights or {}

    def copy(self) -> Any:
        """Another use of the same weights."""
        other = type(self)(self.control_weights)
        self.copy_to(other)
        return other

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Make the network from the model's weights. Raises ValueError when the model is another than it was made for."""
        super().pre_run(model, percent_to_timestep_function)
        dtype = model.manual_cast_dtype or model.get_dtype()
        self.manual_cast_dtype = dtype
        self.control_model = self._network(model, dtype)

    def _network(self, model: Any, dtype: torch.dtype) -> torch.nn.Module:
        from comfy.cldm.cldm import ControlNet as Network

        device = comfy.model_management.get_torch_device()
        own = {k: v.to(device=device, dtype=dtype) for k, v in self.control_weights.items() if k != "lora_controlnet"}
        sizes = {name: value for name, value in model.model_config.unet_config.items() if name != "out_channels"}
        sizes["hint_channels"] = own["input_hint_block.0.weight"].shape[1]
        network = Network(**{**sizes, "dtype": dtype, "device": torch.device("meta"), "operations": _LowRankOperations})
        base = model.diffusion_model.state_dict()
        weights = {key: own.get(key, base.get(key)) for key in network.state_dict()}
        lacking = [key for key, value in weights.items() if value is None]
        try:
            if lacking:
                raise RuntimeError(f"no weight {lacking[0]}")
            network.load_state_dict(weights, assign=True)
            for key, value in own.items():
                layer, _, kind = key.rpartition(".")
                if kind in ("up", "down"):
                    setattr(network.get_submodule(layer), kind, value)
        except (RuntimeError, AttributeError) as error:
            raise ValueError(
                f"this control LoRA does not fit the model it is applied to ({error}); use the model it was made for"
            ) from error
        return network.eval().requires_grad_(False)

    def get_models(self) -> list[Any]:
        """Those of the rest of the chain: this network is none that is placed."""
        return ControlBase.get_models(self)

    def inference_memory_requirements(self, dtype: torch.dtype | None) -> float:
        """Bytes of the low-rank weights, too."""
        own = comfy.utils.calculate_parameters(self.control_weights) * comfy.model_management.dtype_size(dtype)
        return own + super().inference_memory_requirements(dtype)

    def cleanup(self) -> None:
        """Drop the network with the run."""
        self.control_model = None
        super().cleanup()


def load(sd: StateDict, model: Any, options: dict[str, Any]) -> ControlLora:
    """A control LoRA of a state dict."""
    return ControlLora(sd, global_average_pooling=bool(options.get("global_average_pooling")))
