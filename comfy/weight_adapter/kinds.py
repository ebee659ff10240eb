"""The kinds of adapters: LoRA (Hu et al. 2021), LoHa and LoKr (Yeh et al. 2023, LyCORIS), GLoRA (Chavan et al. 2023),
OFT (Qiu et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch

from .base import WeightAdapterBase

# (up, down, mid) names by trainer.
_LORA_NAMES = (
    ("{}.lora_up.weight", "{}.lora_down.weight", "{}.lora_mid.weight"),
    ("{}_lora.up.weight", "{}_lora.down.weight", None),
    ("{}.lora_B.weight", "{}.lora_A.weight", None),
    ("{}.lora.up.weight", "{}.lora.down.weight", None),
    ("{}.lora_B", "{}.lora_A", None),
    ("{}.lora_linear_layer.up.weight", "{}.lora_linear_layer.down.weight", None),
    ("{}.lora_B.default.weight", "{}.lora_A.default.weight", None),
)


def _take(lora: dict[str, torch.Tensor], used: set[str], key: str) -> torch.Tensor | None:
    value = lora.get(key)
    if value is not None:
        used.add(key)
    return value


def _matrix(factors: tuple[torch.Tensor | None, ...], dtype: torch.dtype, device: torch.device) -> list[Any]:
    return [None if f is None else f.to(device=device, dtype=dtype) for f in factors]


def _tucker(core: torch.Tensor, inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """Core [r, r, kh, kw] with factors inner [r, in] and outer [r, out] -> [out, in, kh, kw]."""
    return torch.einsum("ijkl,jr,ip->prkl", core, inner, outer)


class LoRAAdapter(WeightAdapterBase):
    """weight + alpha / rank * up @ down."""

    name = "lora"

    @classmethod
    def load(
        cls, x: str, lora: dict[str, torch.Tensor], alpha: float | None, dora_scale: torch.Tensor | None,
        loaded_keys: set[str] | None = None,
    ) -> WeightAdapterBase | None:  # fmt: skip
        for up_name, down_name, mid_name in _LORA_NAMES:
            up_key = up_name.format(x)
            if up_key not in lora:
                continue
            used = {up_key}
            down = _take(lora, used, down_name.format(x))
            if down is None:
                raise ValueError(f"the adapter has {up_key} but not {down_name.format(x)}; the file is incomplete")
            mid = _take(lora, used, mid_name.format(x)) if mid_name else None
            reshape = _take(lora, used, f"{x}.reshape_weight")
            shape = None if reshape is None else tuple(int(v) for v in reshape.tolist())
            return cls(used, (lora[up_key], down, alpha, mid, dora_scale, shape))
        return None

    def new_shape(self) -> tuple[int, ...] | None:
        return self.weights[5]

    def difference(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        up, down, mid = _matrix((self.weights[0], self.weights[1], self.weights[3]), dtype, device)
        alpha = 1.0 if self.weights[2] is None else self.weights[2] / down.shape[0]
        if mid is not None:  # LoCon's core tensor of a convolution
            swapped = down.transpose(0, 1).flatten(1) @ mid.transpose(0, 1).flatten(1)
            down = swapped.reshape(down.shape[1], down.shape[0], mid.shape[2], mid.shape[3]).transpose(0, 1)
        return alpha * (up.flatten(1) @ down.flatten(1)).reshape(shape), self.weights[4]


class LoHaAdapter(WeightAdapterBase):
    """weight + alpha / rank * (w1a @ w1b) * (w2a @ w2b), elementwise."""

    name = "loha"

    @classmethod
    def load(
        cls, x: str, lora: dict[str, torch.Tensor], alpha: float | None, dora_scale: torch.Tensor | None,
        loaded_keys: set[str] | None = None,
    ) -> WeightAdapterBase | None:  # fmt: skip
        if f"{x}.hada_w1_a" not in lora:
            return None
        used: set[str] = set()
        factors = [_take(lora, used, f"{x}.hada_{n}") for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
        return cls(used, (factors[0], factors[1], alpha, factors[2], factors[3], factors[4], factors[5], dora_scale))

    def difference(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        w1a, w1b, _, w2a, w2b, t1, t2, scale = self.weights
        w1a, w1b, w2a, w2b, t1, t2 = _matrix((w1a, w1b, w2a, w2b, t1, t2), dtype, device)
        alpha = 1.0 if self.weights[2] is None else self.weights[2] / w1b.shape[0]
        first = w1a @ w1b if t1 is None else _tucker(t1, w1b, w1a)
        second = w2a @ w2b if t2 is None else _tucker(t2, w2b, w2a)
        return alpha * (first * second).reshape(shape), scale


class LoKrAdapter(WeightAdapterBase):
    """weight + alpha / rank * kron(w1, w2), either factor possibly low-rank itself."""

    name = "lokr"

    @classmethod
    def load(
        cls, x: str, lora: dict[str, torch.Tensor], alpha: float | None, dora_scale: torch.Tensor | None,
        loaded_keys: set[str] | None = None,
    ) -> WeightAdapterBase | None:  # fmt: skip
        used: set[str] = set()
        names = ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")
        factors = [_take(lora, used, f"{x}.lokr_{n}") for n in names]
        if not used:
            return None
        w1, w2, w1a, w1b, w2a, w2b, t2 = factors
        if (w1 is None and (w1a is None or w1b is None)) or (w2 is None and (w2a is None or w2b is None)):
            raise ValueError(f"the LoKr adapter of {x} lacks a factor; the file is incomplete")
        return cls(used, (w1, w2, alpha, w1a, w1b, w2a, w2b, t2, dora_scale))

    def difference(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        w1, w2, alpha, w1a, w1b, w2a, w2b, t2, scale = self.weights
        w1, w2, w1a, w1b, w2a, w2b, t2 = _matrix((w1, w2, w1a, w1b, w2a, w2b, t2), dtype, device)
        rank = None
        if w1 is None:
            w1, rank = w1a @ w1b, w1b.shape[0]
        if w2 is None:
            rank = w2b.shape[0]
            w2 = w2a @ w2b if t2 is None else _tucker(t2, w2b, w2a)
        if w2.ndim == 4:
            w1 = w1.unsqueeze(2).unsqueeze(2)
        factor = alpha / rank if alpha is not None and rank is not None else 1.0
        return factor * torch.kron(w1, w2).reshape(shape), scale


class GLoRAAdapter(WeightAdapterBase):
    """weight + b2 @ b1 + weight @ a2 @ a1, each scaled by alpha / rank."""

    name = "glora"

    @classmethod
    def load(
        cls, x: str, lora: dict[str, torch.Tensor], alpha: float | None, dora_scale: torch.Tensor | None,
        loaded_keys: set[str] | None = None,
    ) -> WeightAdapterBase | None:  # fmt: skip
        if f"{x}.a1.weight" not in lora:
            return None
        used: set[str] = set()
        a1, a2, b1, b2 = (_take(lora, used, f"{x}.{n}.weight") for n in ("a1", "a2", "b1", "b2"))
        return cls(used, (a1, a2, b1, b2, alpha, dora_scale))

    def difference(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        a1, a2, b1, b2, alpha, scale = self.weights
        a1, a2, b1, b2 = (m.flatten(1) for m in _matrix((a1, a2, b1, b2), dtype, device))
        flat = weight.to(dtype).flatten(1)
        # Two layouts exist; in the older one b2 maps to the output and a1 from the input.
        older = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
        rank = a1.shape[0] if older else a2.shape[0]
        factor = 1.0 if alpha is None else alpha / rank
        if older:
            change = b2 @ b1 + (flat @ a2) @ a1
        else:
            change = b1 @ b2 + (flat @ a1) @ a2
        return factor * change.reshape(shape), scale


class OFTAdapter(WeightAdapterBase):
    """Blocks of the weight's rows, each turned by a rotation: Cayley's map of a skew matrix whose norm alpha bounds."""

    name = "oft"

    @classmethod
    def load(
        cls, x: str, lora: dict[str, torch.Tensor], alpha: float | None, dora_scale: torch.Tensor | None,
        loaded_keys: set[str] | None = None,
    ) -> WeightAdapterBase | None:  # fmt: skip
        blocks = lora.get(f"{x}.oft_blocks")
        if blocks is None or blocks.ndim != 3:
            return None
        used = {f"{x}.oft_blocks"}
        return cls(used, (blocks, _take(lora, used, f"{x}.rescale"), alpha, dora_scale))

    def difference(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        blocks, rescale = _matrix(self.weights[:2], torch.float32, device)
        alpha, scale = self.weights[2:]
        skew = blocks - blocks.transpose(1, 2)
        if alpha:
            skew = skew * (alpha / (skew.norm() + 1e-8)).clamp(max=1.0)
        identity = torch.eye(blocks.shape[1], device=device)
        rotation = torch.linalg.solve(identity - skew, identity + skew, left=False)
        rows = weight.float().unflatten(0, blocks.shape[:2])
        turned = torch.einsum("kij,ki...->kj...", rotation, rows).flatten(0, 1)
        turned = turned if rescale is None else rescale * turned
        return (turned - weight).to(dtype), scale
