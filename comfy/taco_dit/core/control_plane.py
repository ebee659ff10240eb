"""How the ranks of a job find the control hub, and the names that they and the supervisor use there."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping

from .config_manager import ConfigError
from .control_channel import Door, Forged, RemoteDoor, door_at
from .control_client import ControlClient
from .control_hub import Hub

DOOR = "TACO_CONTROL_FD"  # descriptor of the door that the supervisor gave this process
ADDRESS = "TACO_CONTROL"  # HOST:PORT where rank 0 hosts the hub of a job on several hosts
SECRET = "TACO_SECRET"  # what all ranks of a job on several hosts know and nobody else
INCARNATION = "TACO_INCARNATION"  # number of the process among those that stood for its rank, from 0
SHORTEST_SECRET = 16
RANK_0_RESTARTED = "rank 0 restarted in its process"  # the reason it gives for having all followers replaced
STOPPING = "stopping"  # set by rank 0 before it tells the others to stop: ranks that end after that are not replaced
HEALTHY = "healthy"  # number of the last prompt that succeeded: ends of ranks after it begin a new series


class ControlPlaneError(ConfigError):
    """An environment in which ranks cannot find each other safely; the message says what to set."""


def connect(rank: int, world_size: int, environ: Mapping[str, str]) -> tuple[ControlClient, Hub | None]:
    """This rank's connection, and the hub where this process hosts it: rank 0 does unless the supervisor does.

    Raises ControlPlaneError.
    """
    if DOOR in environ:
        import socket

        return ControlClient(Door(socket.socket(fileno=os.dup(int(environ[DOOR]))))), None
    hub = Hub() if rank == 0 else None
    if int(environ.get("LOCAL_WORLD_SIZE", world_size)) < world_size:
        address, secret = _remote(environ)
        try:
            if hub is not None:
                hub.listen_on(address, secret)
            return ControlClient(RemoteDoor(address, secret)), hub
        except Forged:
            raise ControlPlaneError(f"the rank at {ADDRESS}={environ[ADDRESS]} has another {SECRET}") from None
        except OSError as error:
            raise ControlPlaneError(
                f"{ADDRESS}={environ[ADDRESS]} cannot be used: {error}; is {SECRET} the same on all hosts?"
            ) from None
    path = _path(environ)
    if hub is not None:
        hub.listen_at(path)
    return ControlClient(door_at(path)), hub


def _remote(environ: Mapping[str, str]) -> tuple[tuple[str, int], bytes]:
    host, _, port = environ.get(ADDRESS, "").rpartition(":")
    secret = environ.get(SECRET, "")
    if not host or not port.isdigit() or len(secret) < SHORTEST_SECRET:
        raise ControlPlaneError(
            f"ranks on several hosts need {ADDRESS}=HOST:PORT, an address of rank 0's host in the network between them, "
            f"and {SECRET}, the same text of at least {SHORTEST_SECRET} characters on all hosts; set both before torchrun"
        )
    return (host.strip("[]"), int(port)), secret.encode()


def _path(environ: Mapping[str, str]) -> str:
    """The UNIX socket of a job that torchrun, or a test, started on this host."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    job = hashlib.sha256("\0".join(environ.get(name, "") for name in names).encode()).hexdigest()[:24]
    return os.path.join(tempfile.gettempdir(), f"taco-dit-{os.getuid()}", job)
