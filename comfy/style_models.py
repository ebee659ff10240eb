"""Style models: prompt tokens made of a picture's features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
from comfy import weight_files
from comfy.clip_model import ACTIVATIONS, merge_heads, split_heads

StateDict = dict[str, torch.Tensor]


class _FusedAttention(torch.nn.Module):
    """Self-attention with the weight names of `torch.nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = torch.nn.Parameter(torch.empty(3 * width, width, **place), requires_grad=False)
        self.in_proj_bias = torch.nn.Parameter(torch.empty(3 * width, **place), requires_grad=False)
        self.out_proj = operations.Linear(width, width, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]."""
        fused = F.linear(x, self.in_proj_weight.to(x), self.in_proj_bias.to(x))
        q, k, v = (split_heads(part, self.heads) for part in fused.chunk(3, dim=-1))
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class _StyleLayer(torch.nn.Module):
    """Pre-norm transformer layer with OpenAI CLIP's weight names."""

    def __init__(self, width: int, heads: int, inner: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.ln_1 = operations.LayerNorm(width, **place)
        self.attn = _FusedAttention(width, heads, place, operations)
        self.ln_2 = operations.LayerNorm(width, **place)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": operations.Linear(width, inner, **place), "c_proj": operations.Linear(inner, width, **place)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](ACTIVATIONS["quick_gelu"](self.mlp["c_fc"](self.ln_2(x))))


class StyleAdapter(torch.nn.Module):
    """The style adapter of T2I-Adapter (Mou et al. 2023, arXiv 2302.08453) for CLIP-L features and SD 1's prompts."""

    HEADS = 8

    def __init__(self, sd: StateDict, device: Any = None, dtype: Any = None, operations: Any = None) -> None:
        """Sizes are those of the weights in `sd`."""
        super().__init__()
        operations = operations or comfy.ops.manual_cast
        place = {"device": device, "dtype": dtype}
        _, self.num_token, width = sd["style_embedding"].shape
        inner = sd["transformer_layes.0.mlp.c_fc.weight"].shape[0]
        layers = len({key.split(".")[1] for key in sd if key.startswith("transformer_layes.")})
        self.transformer_layes = torch.nn.Sequential(  # the files' spelling
            *(_StyleLayer(width, self.HEADS, inner, place, operations) for _ in range(layers))
        )
        self.style_embedding = torch.nn.Parameter(torch.empty(1, self.num_token, width, **place), requires_grad=False)
        self.ln_pre = operations.LayerNorm(width, **place)
        self.ln_post = operations.LayerNorm(width, **place)
        self.proj = torch.nn.Parameter(torch.empty(width, sd["proj"].shape[1], **place), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """CLIP-L's last hidden states [B, L, C] -> prompt tokens [B, num_token, context]."""
        tokens = self.style_embedding.to(x).expand(x.shape[0], -1, -1)
        x = self.transformer_layes(self.ln_pre(torch.cat([x, tokens], dim=1)))
        return self.ln_post(x[:, -self.num_token :]) @ self.proj.to(x)


class StyleModel:
    """A style model, where it computes and waits."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.patcher = comfy.model_patcher.ModelPatcher(
            model,
            load_device=comfy.model_management.text_encoder_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )

    def get_cond(self, input: Any) -> torch.Tensor:
        """Prompt tokens [B, L, context] of an image encoder's output, where that is."""
        comfy.model_management.load_model_gpu(self.patcher)
        features = input.last_hidden_state
        with torch.no_grad():
            return self.model(features.to(self.patcher.load_device)).to(features.device)


def load_style_model(ckpt_path: str) -> StyleModel:
    """The style model in a file: Flux Redux or T2I-Adapter's. Raises ValueError for other and incomplete files."""
    sd = comfy.utils.load_torch_file(ckpt_path, safe_load=True)
    place = {"device": torch.device("meta"), "dtype": comfy.utils.weight_dtype(sd)}
    model: torch.nn.Module
    if "redux_down.weight" in sd and "redux_up.weight" in sd:
        from comfy.ldm.flux.redux import ReduxImageEncoder

        model = ReduxImageEncoder(sd["redux_up.weight"].shape[1], sd["redux_down.weight"].shape[0], **place)
    elif "style_embedding" in sd and "proj" in sd:
        model = StyleAdapter(sd, **place)
    else:
        raise ValueError(f"{ckpt_path} holds no style model (Flux Redux, T2I-Adapter style); choose another file")
    lacking = model.load_state_dict(sd, strict=False, assign=True).missing_keys
    if lacking:
        raise ValueError(
            f"the style model {ckpt_path} lacks {len(lacking)} weights, first {lacking[0]}; use a complete file"
        )
    style = StyleModel(model.eval())
    style.patcher.weight_store.loaded_from |= weight_files.files_in(sd)
    return style
