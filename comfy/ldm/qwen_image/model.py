"""Qwen-Image and Qwen-Image-Edit: text and picture tokens with weights of their own and joint attention (Wu et al. 2025).

Shapes: B pictures, T frames (layers), L tokens in the order (frame, row, column), C channels, H heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import comfy.ops
import comfy.patcher_extension
from comfy.ldm import dit
from comfy.ldm.common_dit import patches_of
from comfy.ldm.flux.layers import EmbedND, timestep_embedding
from comfy.ldm.modules.attention import AttentionSpec, joined_heads, meet
from comfy.ldm.modules.copy_runs import joined_tokens
from comfy.ldm.modules.mlp import FeedForward, TimestepEmbedding
from comfy.ldm.modules.modulate import add_gated, add_gated_norm_modulate, norm_modulate, spread_rows
from comfy.ldm.modules.norm_rope import norm_by_head_and_rotate
from comfy.missing import missing_names

_EPS = 1e-6
_ARGUMENTS = dit.BlockArguments(
    tokens={"txt": ("txt",), "img": ("img",)},
    values={"vec": "vec", "pe": "pe"},
    optional=frozenset({"encoder_hidden_states_mask", "img_rows"}),
    hidden={"encoder_hidden_states_mask": "mask", "img_rows": "img_rows"},
    renamed={"img": "hidden_states", "txt": "encoder_hidden_states", "vec": "temb", "pe": "image_rotary_emb"},
    patch_values={"x": "x"},
)


class Attention(nn.Module):
    """The weights of the joint attention; `add_*` and `norm_added_*` are the text's."""

    def __init__(self, dim: int, heads: int, head_dim: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            setattr(self, name, operations.Linear(dim, inner, **place))
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, operations.RMSNorm(head_dim, eps=_EPS, **place))
        self.to_out = nn.ModuleList([operations.Linear(inner, dim, **place), nn.Identity()])
        self.to_add_out = operations.Linear(inner, dim, **place)

    def heads_of(self, names: Sequence[str], x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, v [B, H, L, D] of a stream [B, L, C]; `names` of its three linears and two norms."""
        q, k, v = (getattr(self, name)(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in names[:3])
        q_scale, k_scale = (comfy.ops.cast_to_input(getattr(self, name).weight, x, copy=False) for name in names[3:])
        return (*norm_by_head_and_rotate(q, k, q_scale, k_scale, table, _EPS), v)


_IMAGE = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


@dit.own_block
class QwenImageTransformerBlock(nn.Module):
    """Joint attention and one MLP a stream, both modulated by the time."""

    def __init__(
        self, dim: int, num_attention_heads: int, attention_head_dim: int, dtype: Any = None, device: Any = None,
        operations: Any = comfy.ops.manual_cast,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.dim, self.num_heads = dim, num_attention_heads
        for stream in ("img", "txt"):
            modulation = nn.Sequential(nn.SiLU(), operations.Linear(dim, 6 * dim, **place))
            setattr(self, f"{stream}_mod", modulation)
            for n in (1, 2):
                norm = operations.LayerNorm(dim, elementwise_affine=False, eps=_EPS, **place)
                setattr(self, f"{stream}_norm{n}", norm)
            setattr(self, f"{stream}_mlp", FeedForward(dim, 4, place, operations))
        self.attn = Attention(dim, num_attention_heads, attention_head_dim, place, operations)

    @dit.stage
    def _into_attention(
        self, names: Sequence[str], x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return self.attn.heads_of(names, norm_modulate(x, scale, shift, _EPS), table)

    @dit.stage
    def _after_attention(
        self, stream: str, x: torch.Tensor, out: torch.Tensor, mods: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """x [B, L, C] with the attention's output [B, L, H*D] and the MLP's."""
        _, _, gate, shift, scale, mlp_gate = mods
        project = self.attn.to_out[0] if stream == "img" else self.attn.to_add_out
        x, normed = add_gated_norm_modulate(x, project(out), gate, scale, shift, _EPS)
        return add_gated(x, getattr(self, f"{stream}_mlp")(normed), mlp_gate)

    def _modulations(self, stream: str, state: dit.DiTState, call: dit.DenoiserCall) -> list[torch.Tensor]:
        """Shift, scale, gate of the attention and of the MLP, [B, 1 or L, C] each."""
        vec, module = state.sample["vec"], getattr(self, f"{stream}_mod")
        ready = call.prepared.get(id(module))
        table = module(vec if vec.ndim == 3 else vec.unsqueeze(1)) if ready is None else ready
        if table.shape[1] == 1:
            return list(table.chunk(6, dim=-1))
        if stream == "txt":
            return list(table[:, :1].chunk(6, dim=-1))
        rows = state.local("img_rows")
        return [spread_rows(part, rows) for part in table.chunk(6, dim=-1)]

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The block on the streams `txt` and `img`."""
        txt, img = state.streams["txt"], state.streams["img"]
        sizes = [txt.shape[1], img.shape[1]]
        mods = {stream: self._modulations(stream, state, call) for stream in ("txt", "img")}
        tables = state.local("pe").transpose(1, 2).split(sizes, dim=2)
        parts = [
            self._into_attention(names, x, *mods[stream][:2], table)
            for names, (stream, x), table in zip((_TEXT, _IMAGE), state.streams.items(), tables)
        ]
        spec = AttentionSpec(self.num_heads, state.tokens(), mask=state.sample["mask"], layer=call.layer)
        meeting = meet(spec, call)
        meeting.send(*(joined_tokens(*pair) for pair in zip(*parts)))
        meeting.attend()
        meeting.send_back()
        outs = joined_heads(meeting.result()).split(sizes, dim=1)
        streams = {
            stream: self._after_attention(stream, x, out, mods[stream])
            for (stream, x), out in zip(state.streams.items(), outs)
        }
        return state.replace(streams=streams)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        img_rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole picture tokens [B, L_img, C] and text tokens [B, L_txt, C] -> text, picture.

        temb [B, C], or [B, 2, C] with `img_rows` [L_img] naming each picture token's row; image_rotary_emb
        [1 or B, L_txt + L_img, 1, D/2, 2, 2]; encoder_hidden_states_mask: added to the joint scores.
        """
        assert temb is not None and image_rotary_emb is not None
        call = dit.call_of(transformer_options)
        streams = {"txt": encoder_hidden_states, "img": hidden_states}
        state = _state(streams, temb, image_rotary_emb, encoder_hidden_states_mask, img_rows)
        state = self.forward_state(state.shard(call.plan), call)
        return state.whole("txt"), state.whole("img")


def _state(
    streams: dict[str, torch.Tensor], vec: torch.Tensor, pe: torch.Tensor, mask: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> dit.DiTState:  # fmt: skip
    """The whole state of the blocks; arguments as of `QwenImageTransformerBlock.forward`."""
    tokenwise = {"pe": dit.TokenAxis(pe, ("txt", "img"), 1)}
    if rows is not None:
        tokenwise["img_rows"] = dit.TokenAxis(rows, ("img",), 0)
    return dit.DiTState(streams, tokenwise, {"vec": vec, "mask": mask})


class _TimeEmbed(nn.Module):
    """Times [B] -> [B, C]."""

    def __init__(self, dim: int, additional: bool, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, dim, place, operations)
        self.addition_t_embedding = operations.Embedding(2, dim, **place) if additional else None

    def forward(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out = self.timestep_embedder(timestep_embedding(t, 256).to(dtype))
        if self.addition_t_embedding is not None:
            kind = torch.zeros(t.shape[0], dtype=torch.long, device=t.device)
            out = out + self.addition_t_embedding(kind).to(out)
        return out


class LastLayer(nn.Module):
    """The modulated norm before the projection to patches."""

    def __init__(self, dim: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.linear = operations.Linear(dim, 2 * dim, **place)
        self.norm = operations.LayerNorm(dim, _EPS, elementwise_affine=False, **place)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """x [B, L, C], temb [B, C] -> [B, L, C]."""
        scale, shift = self.linear(nn.functional.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
        return norm_modulate(x, scale, shift, _EPS)


class QwenImageTransformer2DModel(nn.Module):
    """The diffusion transformer of Qwen-Image, its edit and its layered versions."""

    def __init__(
        self, patch_size: int = 2, in_channels: int = 64, out_channels: int = 16, num_layers: int = 60,
        attention_head_dim: int = 128, num_attention_heads: int = 24, joint_attention_dim: int = 3584,
        axes_dims_rope: Sequence[int] = (16, 56, 56), default_ref_method: str = "index",
        use_additional_t_cond: bool = False, image_model: str | None = None, final_layer: bool = True,
        dtype: Any = None, device: Any = None, operations: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        operations = operations or comfy.ops.disable_weight_init
        place = {"dtype": dtype, "device": device}
        self.dtype, self.patch_size = dtype, patch_size
        self.in_channels, self.out_channels = in_channels, out_channels
        self.hidden_size = self.inner_dim = dim = num_attention_heads * attention_head_dim
        self.num_heads, self.default_ref_method = num_attention_heads, default_ref_method
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(f"axes_dims_rope {list(axes_dims_rope)} must add up to the head size {attention_head_dim}")
        if default_ref_method == "index_timestep_zero":
            self.register_buffer("__index_timestep_zero__", torch.empty(0, device=device))
        self.pe_embedder = EmbedND(attention_head_dim, 10000, list(axes_dims_rope))
        self.time_text_embed = _TimeEmbed(dim, use_additional_t_cond, place, operations)
        self.txt_norm = operations.RMSNorm(joint_attention_dim, eps=_EPS, **place)
        self.img_in = operations.Linear(in_channels, dim, **place)
        self.txt_in = operations.Linear(joint_attention_dim, dim, **place)
        self.transformer_blocks = nn.ModuleList(
            QwenImageTransformerBlock(dim, num_attention_heads, attention_head_dim, operations=operations, **place)
            for _ in range(num_layers)
        )
        if final_layer:
            self.norm_out = LastLayer(dim, place, operations)
            self.proj_out = operations.Linear(dim, patch_size * patch_size * out_channels, **place)

    # --- the contract: embed, blocks, head ---------------------------------------------------------------------

    def embed(
        self,
        tokens: torch.Tensor,
        ids: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None,
        known: int,
        start: int,
        call: dit.DenoiserCall,
    ) -> dit.DiTState:
        """Patches [B, L, in] with places ids [1, L, 3], text [B, m, joint] -> whole state of `txt` and `img`.

        known: how many of the last picture tokens are at time 0. start: place of the first text token on all axes.
        """
        places = torch.arange(start, start + context.shape[1], device=tokens.device, dtype=torch.float32)
        values = {
            "img": self.img_in(tokens),
            "txt": self.txt_in(self.txt_norm(context)),
            "img_ids": ids,
            "txt_ids": places.view(1, -1, 1).expand(1, -1, 3),
        }
        values = dit.patched_inputs(call.options, values)
        vec, rows = self.time_text_embed(t, tokens.dtype), None
        if known:
            clean = self.time_text_embed(torch.zeros_like(t), tokens.dtype)
            vec = torch.stack((vec, clean), dim=1)
            rows = (torch.arange(tokens.shape[1], device=tokens.device) >= tokens.shape[1] - known).long()
        pe = self.pe_embedder(torch.cat((values["txt_ids"], values["img_ids"]), dim=1)).movedim(1, 2)
        mask = None if attention_mask is None else _joint_mask(attention_mask, values["img"])
        return _state({"txt": values["txt"], "img": values["img"]}, vec, pe, mask, rows)

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order."""
        return tuple(
            dit.Block(
                f"transformer_blocks.{i}", block, _ARGUMENTS, i, replace_key=("double_block", i),
                patches_after=("double_block",), residual=dit.Residual("img", "input", i),
            )
            for i, block in enumerate(self.transformer_blocks)
        )  # fmt: skip

    def prepared_layers(self, state: dit.DiTState) -> list[dit.PreparedLayer]:
        """All blocks' modulations, which need nothing but the time's vector [B, C]."""
        vec = state.sample["vec"]
        if vec.ndim != 2:
            return []
        mods = [getattr(block, f"{stream}_mod") for block in self.transformer_blocks for stream in ("img", "txt")]
        ours = [mod for mod in mods if type(mod) is nn.Sequential and "forward" not in vars(mod)]
        return [dit.PreparedLayer(mod, 6 * self.inner_dim, functools.partial(mod, vec)) for mod in ours]

    def head(self, state: dit.DiTState) -> torch.Tensor:
        """Picture tokens of the state -> [B, L, patch^2 * out_channels], whole."""
        vec = state.sample["vec"]
        out = self.proj_out(self.norm_out(state.streams["img"], vec if vec.ndim == 2 else vec[:, 0]))
        return state.with_stream("img", out).whole("img")

    # --- latents to patches and back ---------------------------------------------------------------------------

    def process_img(
        self, x: torch.Tensor, index: int = 0, h_offset: int = 0, w_offset: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Size]:
        """Latent [B, C, T, h, w] -> patches [B, L, C*p*p], their places [1, L, 3] about the centre, the padded shape."""
        patch = self.patch_size
        tokens, shape = patches_of(x, patch)
        frames, rows, cols = shape[2], shape[3] // patch, shape[4] // patch
        first_row, first_col = ((offset + patch // 2) // patch for offset in (h_offset, w_offset))
        axes = [
            torch.arange(frames, device=x.device) + (index if frames == 1 else 0),
            torch.arange(first_row, first_row + rows, device=x.device) - rows // 2,
            torch.arange(first_col, first_col + cols, device=x.device) - cols // 2,
        ]
        ids = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(torch.float32)
        return tokens, ids.reshape(1, -1, 3), shape

    def _with_references(
        self, tokens: torch.Tensor, ids: torch.Tensor, refs: Sequence[torch.Tensor], method: str
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Reference latents [B, C, T, h, w] appended as tokens, and how many tokens each has."""
        height = width = index = 0
        counts = []
        for ref in refs:
            h_offset = w_offset = 0
            if method in ("index", "index_timestep_zero"):
                index += 1
            elif method == "negative_index":
                index -= 1
            else:
                index = 1
                if ref.shape[-2] + height > ref.shape[-1] + width:
                    w_offset = width
                else:
                    h_offset = height
                height, width = max(height, ref.shape[-2] + h_offset), max(width, ref.shape[-1] + w_offset)
            more, places, _ = self.process_img(ref, index=index, h_offset=h_offset, w_offset=w_offset)
            tokens, ids = torch.cat((tokens, more), dim=1), torch.cat((ids, places), dim=1)
            counts.append(more.shape[1])
        return tokens, ids, counts

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: list[torch.Tensor] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature, which custom nodes inspect)
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict the flow of latents x [B, C, T, h, w] at times [B] given text [B, m, joint] -> [B, C_out, T, h, w].

        attention_mask [B, m]: 0 for text tokens to leave out. ref_latents: pictures to edit, [B, C, T, h, w] each.
        """
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
            ),
        ).execute(x, timestep, context, attention_mask, guidance, ref_latents, transformer_options, **kwargs)

    def _forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: list[torch.Tensor] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
        control: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if x.ndim != 5:
            raise ValueError(f"Qwen-Image works on latents [B, C, frames, height, width], got {tuple(x.shape)}")
        tokens, ids, shape = self.process_img(x)
        own, known = tokens.shape[1], 0
        start = max(shape[-2], shape[-1]) // self.patch_size // 2
        if ref_latents:
            method = kwargs.get("ref_latents_method", self.default_ref_method)
            tokens, ids, counts = self._with_references(tokens, ids, ref_latents, method)
            transformer_options = {**transformer_options, "reference_image_num_tokens": counts}
            known = sum(counts) if method == "index_timestep_zero" else 0
        call = dit.call_of(transformer_options, control)
        state = self.embed(tokens, ids, timestep, context, attention_mask, known, start, call)
        state = state.replace(sample={**state.sample, "x": x})
        out = self.head(dit.run_blocks(self, state, call))[:, :own]
        patch, rows, cols = self.patch_size, shape[3] // self.patch_size, shape[4] // self.patch_size
        out = out.unflatten(-1, (-1, patch, patch)).unflatten(1, (shape[2], rows, cols)).permute(0, 4, 1, 2, 5, 3, 6)
        return out.flatten(5, 6).flatten(3, 4)[..., : x.shape[3], : x.shape[4]]


def _joint_mask(mask: torch.Tensor, img: torch.Tensor) -> torch.Tensor:
    """A mask of text tokens [B, m] -> what is added to the joint scores [B, 1, 1, m + L]."""
    if not mask.is_floating_point():
        mask = (mask - 1).to(img.dtype) * torch.finfo(img.dtype).max
    return nn.functional.pad(mask.to(img), (0, img.shape[1])).reshape(mask.shape[0], 1, 1, -1)


__getattr__ = missing_names(
    __name__, dict.fromkeys(("GELU", "QwenTimestepProjEmbeddings", "apply_rotary_emb"), "ComfyUI's part of Qwen-Image")
)
