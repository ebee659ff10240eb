"""Why a plan was chosen and why another is not possible, as a code with numbers: programs and the page read the code,
which the page says in its own language, and people the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TEXTS = {
    "one_rank": "one rank",
    "off": "parallel.enabled is false, or a node switches it off",
    "conditionings": "{conds} conditionings on {groups} groups",
    "pictures": "{pictures} pictures on {groups} groups",
    "tokens": "{tokens} tokens and {heads} heads on {ranks} ranks",
    "rows": "{rows} rows of a picture on {ranks} ranks",
    "ring": "{tokens} tokens on {ranks} ranks",
    "ring_and_heads": "{tokens} tokens on {ranks} ranks, {heads} heads on {inner} of them",
    "ring_few_heads": "keys go round a ring of {ring}, as there are more ranks than heads",
    "ring_uneven_heads": "keys go round a ring of {ring}, as heads do not divide evenly over all",
    "repeat_faster": "{replicas} ranks repeat the same work: exchanging would take longer than it saves",
    "repeat_rest": "{replicas} ranks repeat the same work: nothing else can be split",
    "all_together": "a wrapper or patch needs all conditionings together",
    "rows_together": "a wrapper or patch needs conditionings and pictures together",
    "whole_tokens": "this network cannot run on a part of its tokens",
    "sequence_off": "parallel.sequence_parallel is false",
    "cfg_off": "parallel.cfg_parallel is false",
    "data_off": "parallel.data_parallel is false",
    "spatial_off": "parallel.spatial_parallel is false",
    "one_conditioning": "a call has 1 conditioning",
    "few_conditionings": "a call has {conds} conditionings",
    "one_picture": "a call has 1 picture",
    "few_pictures": "a call has {pictures} pictures",
    "degrees_fixed": "degrees in the configuration leave no room for it",
}


@dataclass(frozen=True)
class Reason:
    """One of `TEXTS` with its numbers."""

    code: str
    values: tuple[tuple[str, int], ...] = ()

    @property
    def text(self) -> str:
        """In English."""
        return TEXTS[self.code].format(**dict(self.values))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"code": self.code, **dict(self.values)}


def reason(code: str, **values: int) -> Reason:
    """A reason. Raises KeyError for a code that is not in `TEXTS`."""
    if code not in TEXTS:
        raise KeyError(code)
    return Reason(code, tuple(values.items()))
