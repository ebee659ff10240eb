"""A broken parallel strategy: attention without its exchange. Each rank's tokens see only their like."""

from comfy.taco_dit.parallel.exchange import Here
from comfy.taco_dit.parallel.sequence_parallel import HeadMeeting


def _send(self, q, k, v):
    self._inputs = q, k, v


def _attend(self):
    self._out = self._compute(*self._inputs, None)


def _send_back(self):
    self._returning = Here(self._out)


HeadMeeting.send, HeadMeeting.attend, HeadMeeting.send_back = _send, _attend, _send_back
NODE_CLASS_MAPPINGS = {}
