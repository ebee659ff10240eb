"""A V1 pack in one file: nodes that draw numbers nobody gave a seed for."""

import random

import numpy as np
import torch


class SampleDice:
    """A number of steps, a seed, a strength and a picture, each drawn from another global generator."""

    CATEGORY = "samples"
    FUNCTION = "roll"
    RETURN_TYPES = ("INT", "INT", "FLOAT", "IMAGE")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls):
        return random.random()

    def roll(self):
        strength = round(float(np.random.rand()) * 0.3 + 0.5, 3)
        return random.randint(1, 5), int(torch.randint(2**31, ())), strength, torch.rand(1, 8, 8, 3)


NODE_CLASS_MAPPINGS = {"SampleDice": SampleDice}
