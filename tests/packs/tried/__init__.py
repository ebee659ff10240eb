"""A pack with one node for each thing that `tools.try_pack` should find."""

import os
import random

import torch

RANK = int(os.environ.get("RANK", "0"))


def _node(function, inputs, returns, **more):
    declared = {"required": inputs}
    members = {"INPUT_TYPES": classmethod(lambda cls: declared), "RETURN_TYPES": returns, "FUNCTION": "run",
               "CATEGORY": "tried", "run": function, **more}  # fmt: skip
    return type("Tried", (), members)


class Rope:
    """A value of the pack's own."""

    def __init__(self, length):
        self.length = length


def _fail_elsewhere(self, value):
    if RANK:
        raise ValueError("not on this rank")
    return (value,)


def _needs_a_service(self):
    raise ConnectionError("no service")


NUMBER = ("INT", {"default": 3, "min": 1, "max": 9})
NODE_CLASS_MAPPINGS = {
    "TriedInvert": _node(lambda self, image, mask: (1 - image, mask), {"image": ("IMAGE",), "mask": ("MASK",)},
                         ("IMAGE", "MASK")),
    "TriedRope": _node(lambda self, length: (Rope(length),), {"length": NUMBER}, ("ROPE",)),
    "TriedLength": _node(lambda self, rope: (rope.length,), {"rope": ("ROPE",)}, ("INT",)),
    "TriedByRank": _node(lambda self, image: (image + RANK,), {"image": ("IMAGE",)}, ("IMAGE",)),
    "TriedByRanks": _node(lambda self, value: (value + int(os.environ.get("WORLD_SIZE", "1")),), {"value": NUMBER},
                          ("INT",)),
    "TriedRandom": _node(lambda self: (random.random(), torch.rand(2)), {}, ("FLOAT", "MASK")),
    "TriedElsewhere": _node(_fail_elsewhere, {"value": NUMBER}, ("INT",)),
    "TriedService": _node(_needs_a_service, {}, ("STRING",)),
    "TriedChoice": _node(lambda self, file: (file,), {"file": ([],)}, ("STRING",)),
    "TriedLonely": _node(lambda self, what: (1,), {"what": ("NOBODY_GIVES_THIS",)}, ("INT",)),
    "TriedSigmas": _node(lambda self, model, sigmas: (model, sigmas * 0.5), {"model": ("MODEL",), "sigmas": ("SIGMAS",)},
                         ("MODEL", "SIGMAS")),
}  # fmt: skip
