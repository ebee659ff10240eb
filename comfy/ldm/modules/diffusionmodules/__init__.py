from typing import TYPE_CHECKING

from comfy.submodules import submodules

if not TYPE_CHECKING:
    __getattr__ = submodules(__name__)
