"""Degrees of a plan, and what is to be split: plain values, without torch.

Three axes split a call, from the outside in: conditionings (`cfg`), pictures (`data`), tokens (`ring`, then `ulysses`).
Neighbouring ranks share tokens, because that axis communicates most, and of these the nearest exchange heads. Of UNets they
share the rows of pictures instead (`spatial`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of one plan. Rank = ((cfg * data_degree + data) * replicas + replica) * picture_degree + token index.

    Token index = ring * ulysses_degree + ulysses, or the place of a picture's rows.
    """

    cfg_degree: int = 1
    data_degree: int = 1
    ulysses_degree: int = 1
    replicas: int = 1
    """Ranks that repeat each other's work because nothing is left to split."""
    ring_degree: int = 1
    spatial_degree: int = 1

    def __post_init__(self) -> None:
        for name in ("cfg_degree", "data_degree", "ulysses_degree", "replicas", "ring_degree", "spatial_degree"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.spatial_degree > 1 and self.sequence_degree > 1:
            raise ValueError("pictures are shared by their rows or by their tokens, not by both")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.cfg_degree * self.data_degree * self.picture_degree * self.replicas

    @property
    def sequence_degree(self) -> int:
        """Number of ranks that share the tokens of a picture."""
        return self.ulysses_degree * self.ring_degree

    @property
    def picture_degree(self) -> int:
        """Number of ranks that share a picture, by its tokens or by its rows."""
        return self.sequence_degree * self.spatial_degree

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(cfg, data, token, replica) index of a rank."""
        rank, token = divmod(rank, self.picture_degree)
        rank, replica = divmod(rank, self.replicas)
        cfg, data = divmod(rank, self.data_degree)
        return cfg, data, token, replica

    def token_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the other tokens, or rows, of this rank's pictures."""
        first = rank - rank % self.picture_degree
        return tuple(range(first, first + self.picture_degree))

    def ulysses_group(self, rank: int) -> tuple[int, ...]:
        """Ranks of the token group that exchange heads with this one: neighbours."""
        first = rank - rank % self.ulysses_degree
        return tuple(range(first, first + self.ulysses_degree))

    def ring_group(self, rank: int) -> tuple[int, ...]:
        """Ranks of the token group among which this one's keys and values go round."""
        members = self.token_group(rank)
        return members[members.index(rank) % self.ulysses_degree :: self.ulysses_degree]

    def row_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the other conditionings and pictures, one for each (cfg, data), in that order."""
        stride = self.picture_degree * self.replicas
        return tuple(range(rank % stride, self.world_size, stride))

    def describe(self) -> str:
        """`cfg 2 x ulysses 2 x ring 2`; `one rank` when nothing is split."""
        parts = [
            f"{name} {degree}"
            for name, degree in (
                ("cfg", self.cfg_degree),
                ("data", self.data_degree),
                ("ulysses", self.ulysses_degree),
                ("ring", self.ring_degree),
                ("spatial", self.spatial_degree),
                ("replicas", self.replicas),
            )
            if degree > 1
        ]
        return " x ".join(parts) or "one rank"


@dataclass(frozen=True)
class Workload:
    """What is known of a denoiser call when its plan is chosen."""

    conds: int
    pictures: int
    tokens: int
    heads: int
    hidden_size: int
    rows_split: bool = True
    """Whether conditionings and pictures may be evaluated on different ranks."""
    tokens_split: bool = True
    """Whether the network can run on a part of its tokens."""
    picture_rows: int = 0
    """Rows of cells of a picture of which the network can run on a part; 0: it needs whole pictures."""


def share(total: int, parts: int, index: int) -> tuple[int, int]:
    """[start, stop) of part `index` when `total` items are distributed as evenly as possible; parts may be empty."""
    return total * index // parts, total * (index + 1) // parts
