"""What the process that ranks are forked from has imported. No module may start a thread when it is imported."""

import importlib

import torch

MODULES = (
    "pytest", "demo.train", "execution", "comfy.model_management", "comfy.sd", "comfy.taco_dit.core.execution_engine",
    "comfy.taco_dit.core.lockstep", "comfy.taco_dit.parallel.exchange", "comfy.taco_dit.parallel.sequence_parallel",
    "tests.parallel.contract_cases", "tests.parallel.engine_cases", "tests.parallel.family_cases", "tests.parallel.ranks",
    "tests.parallel.spatial_cases", "comfy.ldm.aura.mmdit", "comfy.ldm.chroma.model", "comfy.ldm.hunyuan_video.model",
    "comfy.ldm.hydit.models", "comfy.ldm.lightricks.model", "comfy.ldm.lumina.model", "comfy.ldm.pixart.pixartms",
    "comfy.ldm.qwen_image.model", "comfy.ldm.wan.variants",
)  # fmt: skip

torch.set_num_threads(1)
for name in MODULES:
    importlib.import_module(name)
