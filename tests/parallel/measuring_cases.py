"""What ranks do in tests/core/test_measuring.py."""

from __future__ import annotations

from unittest import mock

import torch

from comfy.taco_dit.core import measuring
from comfy.taco_dit.core.config_manager import TacoConfig
from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
from comfy.taco_dit.core.lockstep import RankLockstep

from .engine_cases import Model, batch


def measured_together(manager, path, broken=None):
    """Profile, and a run under it; `broken`: a rank on which measuring fails."""
    lockstep = RankLockstep(manager)
    engine = TACODiTExecutionEngine(TacoConfig(), manager, lockstep)
    fault = RuntimeError("no multiprocessor") if broken == manager.rank else None
    with mock.patch.object(measuring, "device_rates", side_effect=fault, wraps=measuring.device_rates), \
            mock.patch.object(measuring, "LIMIT_S", 1.0 if broken is not None else 30.0):  # fmt: skip
        engine.profile = measuring.agreed_profile(manager, path, False, True)
    lockstep.join({})
    if manager.rank == 0:
        lockstep.announce({"kind": "prompt"})
    else:
        next(lockstep.commands())
    lockstep.begin("measured")
    engine.begin_run()
    with torch.inference_mode():
        engine.evaluate(Model(), [batch(2, 12, 12, [0, 1])], {})
    run = engine.end_run()
    lockstep.end()
    return {
        "profile": engine.profile.as_dict(), "plan": run.plan, "predicted_ms": run.predicted_ms,
        "measured_ms": run.mean_call_ms, "summary": engine.summary(),
    }  # fmt: skip


def started_again(manager, path):
    """The second call finds what the first one agreed on, without measuring."""
    first = measuring.agreed_profile(manager, path, False, True)
    with mock.patch.object(measuring, "measure", side_effect=AssertionError("measured again")):
        return measuring.agreed_profile(manager, path, False, True) == first
