"""What can be known to fail before any rank starts: a port that is taken, a file that a flag names and is not there.

Checked by the first process alone, so that a start that cannot succeed ends at once, in one line, with any number of
ranks. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket

from comfy.taco_dit.core.launcher import LaunchError, settings_file
from utils.extra_config import EXTRA_MODEL_PATHS, read_sections


def check_start(args: argparse.Namespace, root: str) -> None:
    """Raises LaunchError when the server could not listen, or a file that it would read is missing or malformed."""
    _check_files(args, root)
    if not args.quick_test_for_ci:
        for address in listen_addresses(args.listen):
            _check_address(address, args.port)


def listen_addresses(listen: str) -> list[str]:
    """`--listen`'s addresses."""
    return [address.strip() for address in listen.split(",") if address.strip()]


def extra_path_files(args: argparse.Namespace, root: str) -> list[str]:
    """The files with further model folders: a person's own where there is one, then those of the flag."""
    default = settings_file(args, root, EXTRA_MODEL_PATHS)
    files = [default] if os.path.isfile(default) else []
    return files + [path for group in args.extra_model_paths_config or [] for path in group]


def cannot_listen(address: str, port: int, error: OSError) -> str:
    """Why an address cannot be listened on, and what to do."""
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        remedy = "give an address of this machine with --listen"
    elif error.errno == errno.EACCES:
        remedy = "ports below 1024 are for the administrator; choose another one with --port"
    else:
        remedy = "is another server running? choose another one with --port"
    return f"cannot listen on {address}:{port} ({error.strerror or error}); {remedy}"


def _check_address(address: str, port: int) -> None:
    try:
        for family, kind, protocol, _, where in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(where)
                probe.listen(1)  # of two sockets that may share an address only one listens
    except OSError as error:
        raise LaunchError(cannot_listen(address, port, error)) from None


def _check_files(args: argparse.Namespace, root: str) -> None:
    if bool(args.tls_keyfile) != bool(args.tls_certfile):
        raise LaunchError("TLS needs both --tls-keyfile and --tls-certfile")
    for flag in ("tls_keyfile", "tls_certfile"):
        path = getattr(args, flag)
        if path and not os.path.isfile(path):
            raise LaunchError(f"--{flag.replace('_', '-')} {path}: there is no such file; give a PEM file")
    for path in extra_path_files(args, root):
        try:
            read_sections(path)
        except OSError as error:
            raise LaunchError(
                f"--extra-model-paths-config {path} cannot be read ({error.strerror}); give a YAML file with folders"
            ) from None
        except ValueError as error:
            raise LaunchError(str(error)) from None
    for flag in ("base_directory", "input_directory", "output_directory", "temp_directory"):
        path = getattr(args, flag)
        if path and os.path.exists(path) and not os.path.isdir(path):
            raise LaunchError(f"--{flag.replace('_', '-')} {path} is a file; give a folder")
