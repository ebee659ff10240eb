"""One rank's life: rank 0 serves, the others follow."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.prestartup import Times

# How long Python lets one thread run while another waits. The server's thread gives way at each write to a page, so with
# Python's 5 ms a message to a hundred pages took half a second while a node was computing.
SWITCH_INTERVAL_S = 0.0005


def prepare(args: argparse.Namespace, root: str, for_all: bool = False) -> Times:
    """What comes before torch is imported: folders, and the packs' scripts, which may set what torch reads then.

    for_all: in the process that ranks are forked from.
    """
    from app.prestartup import run_prestartup_scripts

    rank = int(os.environ.get("RANK", "0"))
    apply_directories(args, root)
    _make_directories(first=rank == 0)
    return run_prestartup_scripts(args, None if for_all else rank)


def run_rank(args: argparse.Namespace, root: str, prepared: Times | None = None) -> int:
    """Set this process up as one rank and run it until it is stopped.

    `prepared` is what `prepare` returned where it has run, in the process that this one is a fork of. Raises ConfigError
    for a configuration that does not fit the ranks.
    """
    from app.prestartup import report, run_first_ranks_own

    rank = int(os.environ.get("RANK", "0"))
    _set_up_logging(args, rank)
    if prepared is None:
        prepared = prepare(args, root)
    elif rank == 0:
        prepared = [*prepared, *run_first_ranks_own(args)]
    report(prepared)
    from comfy import media
    from comfy.taco_dit.core.distributed_manager import RankInfo

    media.configure()
    info = RankInfo.from_environment(os.environ)
    runtime = _make_runtime(args, root, info)
    if info.rank == 0:
        return _serve(args, runtime)
    return _follow(args, runtime)


_OF_GPUS = ("--use-sage-attention", "--use-flash-attention")  # without effect on the CPU


def _name_flags_without_effect(args: argparse.Namespace) -> None:
    import torch

    from comfy.cli_args import WITHOUT_EFFECT, PerformanceFeature, build_parser

    on_cpu = args.cpu or not torch.cuda.is_available()
    named = (*WITHOUT_EFFECT, *(_OF_GPUS if on_cpu else ()))
    options = [(flag, action) for action in build_parser()._actions for flag in action.option_strings[:1]]
    given = [flag for flag, action in options if flag in named and getattr(args, action.dest) != action.default]
    if PerformanceFeature.CublasOps in args.fast:
        given.append(f"--fast {PerformanceFeature.CublasOps.value}")
    if given:
        logging.warning("without effect in this version: %s", ", ".join(given))


def _set_up_logging(args: argparse.Namespace, rank: int) -> None:
    """Rank 0 logs as asked; followers only warnings, each line beginning with the rank."""
    from app.logger import setup_logger

    if rank == 0:
        setup_logger(log_level=args.verbose, use_stdout=args.log_stdout)
        return
    logging.basicConfig(level=logging.WARNING, format=f"[rank {rank}] %(levelname)s %(message)s", force=True)


def apply_directories(args: argparse.Namespace, root: str) -> None:
    """Set the folders that the flags and configuration files name."""
    import folder_paths
    from app import demo
    from app.start_checks import extra_path_files
    from utils.extra_config import load_extra_path_config

    folder_paths.configure(args)
    for path in extra_path_files(args, root):
        load_extra_path_config(path)
    folder_paths.add_last_models(os.path.join(os.path.dirname(os.path.abspath(__file__)), "builtin_models"))
    if not args.no_demo:
        folder_paths.add_last_models(demo.MODELS)


def _make_directories(first: bool) -> None:
    """The folders that packs list; the first rank begins with an empty temp folder."""
    import folder_paths

    if first:
        _clean_temp()
    folder_paths.make_directories()


def _make_runtime(args: argparse.Namespace, root: str, info: Any) -> Any:
    import comfy.model_management as management
    from comfy.ldm.modules.attention import use_fused_attention
    from comfy.taco_dit import runtime
    from comfy.taco_dit.core.distributed_manager import TACODiTDistributedManager, rank_device
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy.taco_dit.core.launcher import read_config
    from comfy.taco_dit.core.lockstep import RankLockstep
    from comfy_execution.lockstep import Lockstep

    config = read_config(args, root, info.world_size)
    if not config.memory.enable_offload:
        args.highvram = True
    management.configure()
    use_fused_attention(config.optimization.use_flash_attention)
    device = rank_device(info, args.cpu)
    management.bind_device(device)
    _choose_attention(args, config.optimization.attention, device)
    manager = TACODiTDistributedManager(info, device)
    lockstep: Lockstep = Lockstep()
    if info.world_size > 1:
        ranked = RankLockstep(manager, config.recovery.answer_deadline_s)
        management.set_interrupt_check(ranked.interrupt_check)
        lockstep = ranked
    current = runtime.Runtime(config, manager, lockstep, TACODiTExecutionEngine(config, manager, lockstep))
    runtime.activate(current)
    return current


def _choose_attention(args: argparse.Namespace, configured: str, device: Any) -> None:
    """Use the attention kernels that are configured, or are named by ComfyUI's flags, or are the fastest here."""
    import folder_paths
    from comfy.ldm.modules import attention_choice, kernels
    from comfy.taco_dit.core.config_manager import ConfigError

    wanted = _attention_flag(args, device) or configured
    try:
        path = os.path.join(folder_paths.get_user_directory(), "taco_dit", "attention.json")
        kernels.use_kernels(*attention_choice.choose(device, wanted, path))
    except ValueError as error:
        raise ConfigError(f"optimization.{error}") from None


def _attention_flag(args: argparse.Namespace, device: Any) -> str | None:
    """The kernel that a flag of ComfyUI names, on GPUs."""
    flags = {
        "sage": args.use_sage_attention,
        "flash": args.use_flash_attention,
        "pytorch": args.use_pytorch_cross_attention,
    }
    return next((name for name, given in flags.items() if given and device.type == "cuda"), None)


def _load_nodes(args: argparse.Namespace, server: Any, loop: asyncio.AbstractEventLoop, manager: Any) -> None:
    import nodes
    from app import manager as comfyui_manager
    from comfy.taco_dit.core.pack_turns import PackTurns

    turns = PackTurns(manager.control, manager.rank)
    loop.run_until_complete(
        nodes.init_extra_nodes(
            init_custom_nodes=not args.disable_all_custom_nodes or bool(args.whitelist_custom_nodes),
            init_api_nodes=not args.disable_api_nodes,
            turn=turns.turn,
            skips=lambda path: comfyui_manager.skips(args, path, manager.rank),
        )
    )
    turns.over()
    server.add_routes()


def _serve(args: argparse.Namespace, current: Any) -> int:
    import comfy.model_management as management
    from app import demo, manager
    from app.start_checks import listen_addresses
    from comfy_execution.worker import PromptWorker, cache_choice
    from execution import PromptQueue
    from server import PromptServer

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server = PromptServer(loop)
    panel = _make_panel(server, current)
    demo.add_workflows()
    manager.start(args)
    queue = PromptQueue(server, _open_store(args))
    _load_nodes(args, server, loop, current.manager)
    announce = getattr(current.lockstep, "announce", None)
    cache_type, cache_args = cache_choice(args)
    worker = PromptWorker(
        queue,
        server,
        lockstep=current.lockstep,
        announce=announce,
        cache_type=cache_type,
        cache_args=cache_args,
        summary=current.engine.summary,
        on_done=panel.prompt_done,
        rerun=current.config.recovery.rerun_prompts,
    )
    panel.set_ranks(_join(current, panel))
    _measure(args, current)
    _say_hello(args, current, panel.rank_infos)
    _name_flags_without_effect(args)
    if args.quick_test_for_ci:
        if announce is not None:
            announce({"kind": "stop"})
        return 0

    def work() -> None:
        management.enter_device_thread()
        worker.run()

    threading.Thread(target=work, daemon=True, name="prompt worker").start()
    panel.monitor.start()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, loop.stop)
    try:
        loop.create_task(server.publish_loop())
        logging.info("Starting server")  # ComfyUI-Manager takes this line for the end of the start
        addresses = [(address, args.port) for address in listen_addresses(args.listen)]
        shown = not args.dont_print_server
        loop.run_until_complete(server.start_multi_address(addresses, _opener(args), verbose=shown))
        loop.run_forever()
    except (OSError, ValueError) as error:  # an address that is taken, TLS files that cannot be used
        logging.error("%s", error)
        return 2
    except SystemExit as end:  # a pack's route ends the program: ComfyUI-Manager's Restart
        if end.code:
            raise
    finally:
        queue.close()  # a prompt that runs is not over: after the next start it runs again
        management.interrupt_current_processing()
        if announce is not None and not queue.currently_running:
            announce({"kind": "stop"})
        _clean_temp()
    _exit_soon()
    return 0


def _open_store(args: argparse.Namespace) -> Any:
    """Where queue and history are kept; None when they are in memory only."""
    import folder_paths
    from comfy_execution.prompt_store import open_store

    if args.no_persist or args.quick_test_for_ci:
        return None
    return open_store(os.path.join(folder_paths.get_user_directory(), "taco_dit", "prompts.sqlite3"))


def _join(current: Any, panel: Any = None) -> list[dict[str, Any]]:
    """This rank is ready; on rank 0 wait for the others and keep the panel's list of members current."""
    info = current.manager.describe()
    if current.manager.world_size == 1:
        return [info]
    if panel is not None:
        current.lockstep.on_members = panel.set_ranks
    return current.lockstep.join(info)


def _measure(args: argparse.Namespace, current: Any) -> None:
    """Give the engine the numbers of this machine, on which plans depend; the same on all ranks."""
    import folder_paths
    from comfy.taco_dit.core import measuring, step_records

    user = folder_paths.get_user_directory()
    engine = current.engine
    engine.profile = measuring.agreed_profile(
        current.manager, os.path.join(user, measuring.FILE), engine.runner.cuda_graph, args.taco_measure
    )
    if current.manager.rank == 0:
        engine.records_file = os.path.join(user, step_records.FILE)


def _make_panel(server: Any, current: Any) -> Any:
    """The panel, its part of the page, and the collection of warnings for it."""
    import nodes
    from app.panel import WEB_FOLDER, WEB_NAME, Panel
    from comfy.taco_dit.utils.monitor import Monitor

    panel = Panel(server, current, Monitor(current.manager, current.engine))
    panel.collect_warnings(os.environ)
    nodes.EXTENSION_WEB_DIRS[WEB_NAME] = WEB_FOLDER
    server.panel = panel
    server.taco_status = panel.status
    return panel


def _exit_soon() -> None:
    """End the process, or start it again if that was asked for, even if a computation is stuck in the worker thread."""
    from app import restart
    from comfy.taco_dit.core.launcher import is_worker

    if restart.requested(os.environ) and not is_worker(os.environ):
        restart.start_again()
    logging.info("Stopped")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _opener(args: argparse.Namespace) -> Any:
    if not args.auto_launch:
        return None

    def open_browser(scheme: str, address: str, port: int) -> None:
        import webbrowser

        host = "127.0.0.1" if address in ("0.0.0.0", "::") else address
        webbrowser.open(f"{scheme}://{host}:{port}")

    return open_browser


def _follow(args: argparse.Namespace, current: Any) -> int:
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod
    from comfy.taco_dit.utils.events import EventHandler
    from comfy.taco_dit.utils.monitor import Monitor
    from comfy_execution.worker import PromptWorker, cache_choice
    from server import PromptServer

    comfy.utils.set_progress_bar_enabled(False)  # only rank 0 shows a progress bar on the console
    args.preview_method = LatentPreviewMethod.NoPreviews
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server = PromptServer(loop, listening=False)
    logging.getLogger().setLevel(logging.ERROR)  # rank 0 lists the packs that could not be imported
    _load_nodes(args, server, loop, current.manager)
    logging.getLogger().setLevel(logging.WARNING)
    cache_type, cache_args = cache_choice(args)
    worker = PromptWorker(None, server, lockstep=current.lockstep, cache_type=cache_type, cache_args=cache_args)
    monitor = Monitor(current.manager, current.engine)
    logging.getLogger().addHandler(EventHandler(monitor.events, monitor.rank))
    _join(current)
    _measure(args, current)
    monitor.start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python cannot handle the signal while it blocks in the store
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    worker.follow(current.lockstep.commands())
    return 0


def _clean_temp() -> None:
    import folder_paths

    shutil.rmtree(folder_paths.get_temp_directory(), ignore_errors=True)


def _say_hello(args: argparse.Namespace, current: Any, infos: list[dict[str, Any]]) -> None:
    import torch

    from comfy.ldm.modules.attention import describe_backend

    logging.info("TACO-DiT on torch %s, configuration: %s", torch.__version__, current.config.source)
    logging.info("%s", describe_backend(current.manager.device))
    for info in infos:
        free, total = info["memory_free"] / 2**30, info["memory_total"] / 2**30
        logging.info("rank %d: %s %s, %.1f of %.1f GiB free", info["rank"], info["device"], info["name"], free, total)
    if not args.cpu and current.manager.device.type == "cpu":
        logging.warning(
            "torch %s cannot use a GPU here, so this computes on the CPU, which is slow; install a torch for CUDA, or a "
            "newer driver (python -m comfy.taco_dit.doctor examines both)",
            torch.__version__,
        )
    if current.engine.profile.measured:
        logging.info("machine: %s", current.engine.profile.describe())
