"""The prompts of a run: what each asks for, and how it may end."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from typing import Any

from tests.e2e.workflows import Prompt, flux, insert, node, picture_to_picture, with_lora

SUCCESS, ERROR, INTERRUPTED, REFUSED = "success", "error", "interrupted", "refused"
REFERENCE, BIG = "reference", "2 MB text"
REPLACED_LORA = "replaced.safetensors"
BIG_TEXT = "a fox jumps over the lazy dog while it snows, "


@dataclass(frozen=True)
class Made:
    """A prompt to post. `key`: prompts of the same key make the same picture (None: not compared); `ends`: how it may
    end without any fault in between; `text`: what the error must say."""

    kind: str
    prompt: Prompt
    key: str | None = None
    ends: frozenset[str] = frozenset({SUCCESS})
    text: str = ""


def named(prompt: Prompt, prefix: str) -> Prompt:
    """A copy whose files begin with `prefix`."""
    prompt = copy.deepcopy(prompt)
    for entry in prompt.values():
        if entry.get("class_type") == "SaveImage":
            entry["inputs"]["filename_prefix"] = prefix
    return prompt


def renewed(prompt: Prompt, label: str) -> Prompt:
    """A copy whose samplers run again, with the same result: a node with a new label feeds their latents."""
    prompt = copy.deepcopy(prompt)
    for name, entry in list(prompt.items()):
        link = entry["inputs"].get("latent_image")
        if "Sampler" in entry["class_type"] and isinstance(link, list):
            insert(prompt, f"renew_{name}", "ChaosPass", before=name, slot="latent_image", label=label)
    return prompt


class Prompts:
    """Makes prompts; from the tiny checkpoints, or variants of one workflow file in API form.

    Raises OSError when the file cannot be read, ValueError when it is no workflow that saves a picture.
    """

    def __init__(self, workflow: str | None = None) -> None:
        self._count = 0
        self._own: Prompt | None = None
        if workflow is not None:
            with open(workflow, encoding="utf-8") as file:
                content = json.load(file)
            own = content.get("prompt", content)  # as it is exported, or the body of POST /prompt
            if not any(isinstance(entry, dict) and entry.get("class_type") == "SaveImage" for entry in own.values()):
                raise ValueError(f"{workflow} has no SaveImage node; export a workflow with one in API form")
            self._own = own

    def _label(self) -> str:
        self._count += 1
        return f"label {self._count}"

    def reference(self) -> Made:
        """Always the same picture, sampled anew each time."""
        base = self._own or flux(seed=11, steps=3, cfg=4.5)
        return Made(REFERENCE, renewed(base, self._label()), REFERENCE)

    def long(self, seconds: float, decode_more: bool = False) -> Made:
        """A prompt that samples for some `seconds` (with a workflow file: as long as that takes)."""
        if self._own is not None:
            return Made("long", renewed(self._own, self._label()), REFERENCE)
        side = 384 if decode_more else 96
        steps = max(2, round(seconds / 0.1))
        label = self._label()
        prompt = insert(
            flux(seed=12, steps=steps, width=side, height=side), "watch", "TestModel", label="long", slow_ms=100,
            fail="never", fail_rank=0, fail_step=1,
        )  # fmt: skip
        return Made("long", renewed(prompt, label), f"long {steps} {side}")

    def smallest(self, seed: int) -> Made:
        """One step, 32x32 (with a workflow file: that)."""
        if self._own is not None:
            return Made("smallest", renewed(self._own, self._label()), REFERENCE)
        return Made("smallest", flux(seed=seed, steps=1, width=32, height=32), f"smallest {seed}")

    def random(self, rng: random.Random) -> Made:
        """One of several kinds; needs the tiny checkpoints."""
        kinds = {
            self._plain: 6, self._lora: 4, self._picture: 3, self._long: 3, self._invalid: 1.5, self._raises: 1.5,
            self._nested: 1, self._big: 0.7, self._bad_picture: 1,
        }  # fmt: skip
        return rng.choices(list(kinds), list(kinds.values()))[0](rng)

    def _plain(self, rng: random.Random) -> Made:
        width, height = rng.choice([(72, 104), (112, 80), (64, 64), (128, 96)])
        options: dict[str, Any] = {
            "width": width, "height": height, "batch": rng.choice([1, 1, 2]), "cfg": rng.choice([1.0, 4.5]),
            "seed": rng.randrange(3), "sampler": rng.choice(["euler", "dpmpp_2m", "heun", "euler_ancestral"]),
            "steps": rng.choice([2, 3]),
        }  # fmt: skip
        return Made("plain", renewed(flux(**options), self._label()), f"plain {sorted(options.items())}")

    def _lora(self, rng: random.Random) -> Made:
        strength, seed = rng.choice([None, 0.5, 1.0, -0.7]), rng.randrange(2)
        return Made("lora", renewed(with_lora(strength, seed=seed), self._label()), f"lora {strength} {seed}")

    def _picture(self, rng: random.Random) -> Made:
        seed = rng.randrange(2)
        prompt = picture_to_picture("start.png", seed=seed, cfg=rng.choice([1.0, 4.5]))
        prompt["latent"] = node("VAEEncode", pixels=["image", 0], vae=["load", 2])
        prompt["masked"] = node("SetLatentNoiseMask", samples=["latent", 0], mask=["image", 1])
        prompt["sample"]["inputs"]["latent_image"] = ["masked", 0]
        cfg = prompt["sample"]["inputs"]["cfg"]
        return Made("picture to picture", renewed(prompt, self._label()), f"picture {seed} {cfg}")

    def _long(self, rng: random.Random) -> Made:
        return self.long(rng.choice([2.0, 4.0]))

    def _invalid(self, rng: random.Random) -> Made:
        prompt = flux()
        prompt["sample"]["inputs"].update(rng.choice([{"steps": 0}, {"cfg": "much"}, {"model": ["nowhere", 0]}]))
        return Made("invalid", prompt, ends=frozenset({REFUSED}))

    def _raises(self, rng: random.Random) -> Made:
        rank = rng.randrange(2)
        prompt = insert(flux(seed=13), "trip", "TestFail", slot="latent_image", rank=rank, kind="plain")
        prompt = renewed(prompt, self._label())
        prompt["renew_trip"] = node("ChaosPass", latent_image=["latent", 0], label=self._label())
        prompt["trip"]["inputs"]["latent_image"] = ["renew_trip", 0]
        return Made("raises", prompt, ends=frozenset({ERROR}), text="on purpose")

    def _nested(self, rng: random.Random) -> Made:
        value: Any = "deep"
        for _ in range(rng.choice([50, 300])):
            value = [value]
        prompt = flux(seed=14)
        prompt["positive"]["inputs"]["text"] = value
        return Made("nested value", prompt, ends=frozenset({REFUSED, ERROR}))

    def _big(self, rng: random.Random) -> Made:
        length = 2 * 2**20
        text = (BIG_TEXT * (length // len(BIG_TEXT) + 1))[:length]
        prompt = flux(seed=15)
        prompt["note"] = node("TestOutput", label="big", text=text)
        return Made(BIG, renewed(prompt, self._label()), "big")

    def _bad_picture(self, rng: random.Random) -> Made:
        prompt = picture_to_picture("bad.png", seed=1)
        return Made("bad picture", prompt, ends=frozenset({REFUSED, ERROR, SUCCESS}))

    def replaced_lora(self, rng: random.Random) -> Made:
        """With the LoRA file that is replaced while the server runs: it may be bad just now."""
        strength = rng.choice([0.3, 0.6, 0.9])
        prompt = insert(flux(seed=16), "lora", "LoraLoaderModelOnly", lora_name=REPLACED_LORA, strength_model=strength)
        ends = frozenset({SUCCESS, ERROR, REFUSED})
        return Made("replaced LoRA", renewed(prompt, self._label()), f"replaced {strength}", ends)
