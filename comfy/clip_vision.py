"""CLIP vision encoders: not in this version; the names exist for packs that import them."""

from __future__ import annotations

from comfy.missing import missing_class, missing_function

Output = missing_class("Output", "CLIP vision")
ClipVisionModel = missing_class("ClipVisionModel", "CLIP vision")
clip_preprocess = missing_function("CLIP vision")
load = missing_function("CLIP vision")
load_clipvision_from_sd = missing_function("CLIP vision")
