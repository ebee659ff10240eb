"""xfuser does the attentions that its limits allow; every other one goes through our own exchange."""

from __future__ import annotations

import pytest
import torch

from comfy.ldm import dit
from comfy.ldm.modules.attention import AttentionSpec
from comfy.taco_dit.parallel.sequence_parallel import HeadMeeting, RowMeeting
from comfy.taco_dit.parallel.xfuser_engine import UspMeeting, XfuserPlan


class _TwoRanks:
    """An exchange that is never used."""

    size, index = 2, 0


SHARDS = dit.Tokens((8, 4), True)
CASES = [
    (AttentionSpec(4, SHARDS), False, UspMeeting),
    (AttentionSpec(4, SHARDS), True, HeadMeeting),
    (AttentionSpec(3, SHARDS), False, HeadMeeting),
    (AttentionSpec(4, SHARDS, kv_heads=2), False, HeadMeeting),
    (AttentionSpec(4, dit.Tokens((7, 4), True)), False, HeadMeeting),
    (AttentionSpec(4, SHARDS, dit.Tokens((8,), True)), False, HeadMeeting),
    (AttentionSpec(4, SHARDS, dit.Tokens((8,))), False, RowMeeting),
]


@pytest.mark.parametrize("spec,in_order,kind", CASES)
def test_what_fits_goes_to_xfuser(spec: AttentionSpec, in_order: bool, kind: type) -> None:
    plan = XfuserPlan(_TwoRanks(), lambda q, k, v: q + k + v)  # type: ignore[arg-type]
    meeting = plan.meet(spec, lambda q, k, v, mask: q, in_order)
    assert type(meeting) is kind
    if kind is UspMeeting:
        q = torch.ones(1, 4, 6, 8)
        meeting.send(q, q, q)
        meeting.attend()
        meeting.send_back()
        assert torch.equal(meeting.result(), 3 * q)
