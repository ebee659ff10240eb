"""Flux's control networks: a copy of its first blocks, whose picture tokens are projected to residuals.

Layouts: XLabs (2024), InstantX (2024), MistoLine (TheMisto 2024). In the diffusion model's network there are more
blocks than here, so each residual serves several of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from comfy.ldm import dit

from .model import Flux

# blocks of FLUX.1, for which all these networks were trained
MAIN_DOUBLE, MAIN_SINGLE = 19, 38

# (kernel size, stride) of each convolution that brings a picture to the latent's size
_XLABS = ((3, 1), (3, 1), (3, 2), (3, 1), (3, 2), (3, 1), (3, 2), (3, 1))
_MISTOLINE = ((3, 1), (1, 1), (3, 1), (3, 2), (3, 1), (3, 2), (3, 1), (3, 2), (1, 1), (3, 1))
_HINT_CHANNELS = 16


def _hint_convolutions(shapes: Sequence[tuple[int, int]], place: dict[str, Any], operations: Any) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (kernel, stride) in enumerate(shapes):
        channels = _HINT_CHANNELS if i else 3
        layers += [nn.SiLU()] if i else []
        layers.append(operations.Conv2d(channels, _HINT_CHANNELS, kernel, stride=stride, padding=kernel // 2, **place))
    return nn.Sequential(*layers)


class MistolineProjection(nn.Module):
    """A linear with SiLU behind it."""

    def __init__(self, width: int, operations: Any, **place: Any) -> None:
        super().__init__()
        self.linear = operations.Linear(width, width, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]."""
        return nn.functional.silu(self.linear(x))


class MistolineHint(nn.Module):
    """The convolutions of MistoLine under its name of them."""

    def __init__(self, operations: Any, **place: Any) -> None:
        super().__init__()
        self.encoder = _hint_convolutions(_MISTOLINE, place, operations)

    def forward(self, hint: torch.Tensor) -> torch.Tensor:
        """[B, 3, 8h, 8w] -> [B, 16, h, w]."""
        return self.encoder(hint)


class ControlNetFlux(Flux):
    """See the module. Between blocks its picture tokens may be sharded; residuals are gathered, once each.

    latent_input: the hint is a latent of `control_latent_channels` channels, else a picture in 0..1.
    num_union_modes: kinds of hints that one network knows; the kind is one more prompt token.
    """

    takes_call = True

    def __init__(
        self,
        latent_input: bool = False,
        num_union_modes: int = 0,
        mistoline: bool = False,
        control_latent_channels: int | None = None,
        dtype: Any = None,
        device: Any = None,
        operations: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(final_layer=False, dtype=dtype, device=device, operations=operations, **kwargs)
        place = {"dtype": dtype, "device": device}
        width = self.hidden_size

        def projections(count: int) -> nn.ModuleList:
            if mistoline:
                return nn.ModuleList(MistolineProjection(width, operations, **place) for _ in range(count))
            return nn.ModuleList(operations.Linear(width, width, **place) for _ in range(count))

        self.controlnet_blocks = projections(self.params.depth)
        self.controlnet_single_blocks = projections(self.params.depth_single_blocks)
        self.latent_input = latent_input
        self.mistoline = mistoline
        self.num_union_modes = num_union_modes
        self.controlnet_mode_embedder = None
        if num_union_modes:
            self.controlnet_mode_embedder = operations.Embedding(num_union_modes, width, **place)
        channels = self.in_channels
        if control_latent_channels is not None:
            channels = control_latent_channels * self.patch_size**2
        self.pos_embed_input = operations.Linear(channels, width, bias=True, **place)
        if mistoline:
            self.input_cond_block = MistolineHint(operations, **place)
        elif not latent_input:
            self.input_hint_block = _hint_convolutions(_XLABS, place, operations)

    def hint_tokens(self, hint: torch.Tensor) -> torch.Tensor:
        """A hint's embedded patches [n, L, C]: n pictures [n, 3, 8h, 8w] in 0..1, or latents [n, C, h, w]."""
        if not self.latent_input:
            convolutions = self.input_cond_block if self.mistoline else self.input_hint_block
            hint = convolutions(hint * 2.0 - 1.0)
        return self.pos_embed_input(self.process_img(hint)[0])

    def mode_tokens(self, control_type: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Tokens [B, n, C] of the kinds of hint that were chosen. Raises ValueError for kinds the network does not know."""
        if self.controlnet_mode_embedder is None:
            return like[:, :0]
        unknown = [kind for kind in control_type if not 0 <= kind < self.num_union_modes]
        if unknown:
            raise ValueError(
                f"this union ControlNet knows kinds 0 to {self.num_union_modes - 1}, not {unknown[0]}; choose another "
                "type, or auto"
            )
        modes = torch.tensor(list(control_type), dtype=torch.int64, device=like.device)
        return self.controlnet_mode_embedder(modes, out_dtype=like.dtype).expand(like.shape[0], -1, -1)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        hint: torch.Tensor | None = None,
        control_type: Sequence[int] = (),
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """Residuals of latents x [B, 16, h, w] and a hint with one row or B, as whole tokens [B, L, C]:
        `input` for each double and `output` for each single block of FLUX.1.
        """
        if hint is None:
            raise ValueError("a ControlNet needs a hint picture")
        call = dit.call_of(transformer_options)
        img, ids = self.process_img(x)
        img = self.img_in(img) + self.hint_tokens(hint)
        txt = self.txt_in(context)
        txt = torch.cat([self.mode_tokens(control_type, txt), txt], dim=1)
        pe = self.pe_embedder(torch.cat((ids.new_zeros((*txt.shape[:2], 3)), ids), dim=1))
        state = dit.DiTState(
            streams={"txt": txt, "img": img},
            tokenwise={"pe": dit.TokenAxis(pe, ("txt", "img"), 2)},
            sample={"vec": self.conditioning_vector(timesteps, y, guidance, img), "attn_mask": None},
        )
        residuals: dict[str, list[torch.Tensor]] = {"input": [], "output": []}

        def collect(block: dit.Block, state: dit.DiTState) -> None:
            assert block.residual is not None
            source = block.residual.source
            projections = self.controlnet_blocks if source == "input" else self.controlnet_single_blocks
            projected = projections[block.index](state.streams["img"])
            residuals[source].append(state.with_stream("img", projected).whole("img"))

        dit.run_blocks(self, state, call, after=collect)
        return {
            "input": self._for_main(residuals["input"], MAIN_DOUBLE),
            "output": self._for_main(residuals["output"], MAIN_SINGLE),
        }

    def _for_main(self, residuals: list[torch.Tensor], blocks: int) -> list[torch.Tensor]:
        """A residual for each of the main network's blocks: those of latents are for neighbouring blocks, the others take
        turns.
        """
        if not residuals:
            return []
        each = math.ceil(blocks / len(residuals))
        if self.latent_input:
            return [residual for residual in residuals for _ in range(each)][:blocks]
        return (residuals * each)[:blocks]
