"""Small values that the ranks of one group tell each other over the data plane.

Unlike `Lockstep.gather` this involves no other rank, so groups that make different calls do not wait for each other.
An abandoned prompt ends the wait, as it ends every collective.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch


def gather_values(group: Any, value: Any, device: torch.device) -> list[Any]:
    """Every rank's `value` (what JSON can say; tuples arrive as lists), in the group's order."""
    raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([raw.numel()], dtype=torch.int64, device=device)
    counts = group.all_gather(length, [1] * group.size).tolist()
    joined = bytes(group.all_gather(raw, counts).cpu().numpy())
    out, position = [], 0
    for count in counts:
        out.append(json.loads(joined[position : position + count]))
        position += count
    return out


def gather_among(group: Any, device: torch.device) -> Callable[[str, Any], list[Any]]:
    """A `gather(topic, value)` among the ranks of a group; without a group, a rank by itself."""
    if group is None:
        return lambda topic, value: [value]

    def gather(topic: str, value: Any) -> list[Any]:
        answers = gather_values(group, [topic, value], device)
        topics = {answer[0] for answer in answers}
        if len(topics) > 1:
            raise RuntimeError(f"ranks of one token group are at different places: {', '.join(sorted(topics))}")
        return [answer[1] for answer in answers]

    return gather
