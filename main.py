"""Start: read flags, decide devices and ranks, become N ranks (under a supervisor), then serve or follow.

python main.py                                  one rank per visible GPU, http://127.0.0.1:8188
python main.py --gpus 3,4,5 --port 12215        three GPUs
python main.py --cpu --taco-ranks 2             two ranks on the CPU
torchrun --nproc-per-node 4 main.py             started by torchrun directly, also on several hosts
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(ROOT, "main.py")
TEMPLATE = "TACO_TEMPLATE_FD"  # of a process that ranks are forked from
FORK = "TACO_FORK"  # 0: every rank is a program of its own from the start
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
NO_TELEMETRY = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}  # read by huggingface_hub, and by packs


def main(argv: list[str]) -> int:
    """Run the program; returns the exit status (2 for a command line or configuration that cannot work)."""
    # Ctrl-C before there is anything to be ended in order: at once, without a traceback from within an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from app import manager
    from comfy.cli_args import parse_command_line
    from comfy.taco_dit.core import launcher

    args = parse_command_line(argv)
    args.original_argv = list(argv)
    os.environ.update(NO_TELEMETRY)
    prepared = None
    if args.cuda_malloc:  # read by torch when it is imported
        chosen = [part for part in [os.environ.get(ALLOCATOR, "")] if part]
        os.environ[ALLOCATOR] = ",".join([*chosen, "backend:cudaMallocAsync"])
    if TEMPLATE in os.environ:
        from app.run import prepare
        from comfy.taco_dit.core.template import serve

        prepared = serve(lambda: prepare(args, ROOT, for_all=True))  # goes on from here in each rank
    try:
        if launcher.is_worker(os.environ):
            from app.run import run_rank

            launcher.die_with_parent()
            launcher.name_rank(os.environ)
            return run_rank(args, ROOT, prepared)
        if manager.PREPARING in os.environ:
            from app.run import prepare

            prepare(args, ROOT)
            return 0
        return _start(args, argv)
    except (launcher.LaunchError, launcher.ConfigError, manager.ManagerMissing) as error:
        print(f"TACO-DiT: {error}", file=sys.stderr, flush=True)
        return 2


def _start(args: argparse.Namespace, argv: list[str]) -> int:
    """Become the ranks that flags and GPUs ask for; the exit status. Raises LaunchError, ConfigError, ManagerMissing."""
    from app import manager, restart
    from app.start_checks import check_start
    from comfy.taco_dit.core import launcher

    manager.check(args)
    plan = launcher.plan_launch(args, os.environ, launcher.list_gpus())
    launcher.read_config(args, ROOT, plan.ranks)  # a mistake in it should show before ranks start
    check_start(args, ROOT)
    for message in filter(None, (plan.used, *plan.messages)):
        print(f"TACO-DiT: {message}", flush=True)
    if plan.cpu and not args.cpu:
        argv = [*argv, "--cpu"]
        args.cpu = True
    _do_what_was_put_off(args, argv)
    if plan.ranks > 1:
        fork = sys.platform == "linux" and os.environ.get(FORK) != "0"
        status = launcher.launch(plan, SCRIPT, argv, fork)
        if restart.requested(os.environ):
            restart.start_again()
        return status
    os.environ.update(launcher.worker_environment(plan, os.environ))
    from app.run import run_rank

    return run_rank(args, ROOT)


def _do_what_was_put_off(args: argparse.Namespace, argv: list[str]) -> None:
    """What ComfyUI-Manager put off until this start; a restart that it asks for afterwards is this start."""
    from app import manager, restart
    from app.run import apply_directories

    apply_directories(args, ROOT)
    restart.offer(os.environ)
    manager.do_what_was_put_off(SCRIPT, argv, os.environ)
    restart.cancel(os.environ)


if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    sys.exit(main(sys.argv[1:]))
