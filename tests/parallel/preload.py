"""What the process that ranks are forked from has imported. No module may start a thread when it is imported."""

import importlib

import torch

MODULES = (
    "pytest", "demo.train", "execution", "comfy.model_management", "comfy.sd", "comfy.taco_dit.core.execution_engine",
    "comfy.taco_dit.core.lockstep", "comfy.taco_dit.parallel.exchange", "comfy.taco_dit.parallel.sequence_parallel",
    "tests.parallel.contract_cases", "tests.parallel.engine_cases", "tests.parallel.ranks", "tests.parallel.spatial_cases",
)  # fmt: skip

torch.set_num_threads(1)
for name in MODULES:
    importlib.import_module(name)
