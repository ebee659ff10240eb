"""Text encoders: one file per family, on the networks of `comfy.clip_model`, `t5` and `bert`."""

from typing import TYPE_CHECKING

from comfy.submodules import submodules

if not TYPE_CHECKING:
    __getattr__ = submodules(__name__)
