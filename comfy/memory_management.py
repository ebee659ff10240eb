"""What packs ask newer ComfyUI about its memory management."""

from __future__ import annotations

aimdo_enabled = False
"""Whether weights are paged in on demand by the package comfy-aimdo; they are placed by `comfy.weights` here."""
