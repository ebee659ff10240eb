"""Starting the program again from inside it: what ComfyUI-Manager's Restart button and its installations ask for.

A Manager that finds a session file named in `__COMFY_CLI_SESSION__` (comfy-cli's protocol) writes `<file>.reboot` and ends
the process; without one it would replace the process that it runs in, which is rank 0 only. So the program names such
a file in its user directory, unless comfy-cli did, and starts again, all ranks of it, where the request was written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import NoReturn

import folder_paths

SESSION = "__COMFY_CLI_SESSION__"
_OWN = "TACO_RESTART_FILE"


def offer(environ: MutableMapping[str, str]) -> None:
    """Name a session file, so that a restart can be asked for; nothing where comfy-cli named one, which restarts then.

    The user directory must have been set. Where it cannot be written to, nobody can ask.
    """
    if SESSION in environ:
        return
    folder = os.path.join(folder_paths.get_user_directory(), "taco_dit")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        logging.warning("%s cannot be made (%s): the Restart button of ComfyUI-Manager does not work", folder, error)
        return
    session = os.path.join(folder, f"session-{os.getpid()}")
    environ[SESSION], environ[_OWN] = session, session + ".reboot"


def requested(environ: Mapping[str, str]) -> bool:
    """Whether somebody asked for a restart that this program carries out itself."""
    return _OWN in environ and os.path.exists(environ[_OWN])


def cancel(environ: Mapping[str, str]) -> None:
    """Take back a request."""
    if requested(environ):
        os.remove(environ[_OWN])


def start_again() -> NoReturn:
    """Replace this process by a new one with the same command line and the same process id."""
    cancel(os.environ)
    for name in (_OWN, SESSION):
        os.environ.pop(name, None)
    logging.info("starting again")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
