"""What a second host, and another user of the same host, find open: HTTP and nothing else.

The server runs in a network namespace of its own, joined by a cable to a second one, so that the machine's own network
stays as it is. Needs root and the commands of util-linux and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading

import pytest

from tests.e2e.server import ROOT, START_S, wait_until

NOBODY = 65534
PORT = 8188
NEAR, FAR = "10.77.0.1", "10.77.0.2"
# The first argument is a file for the process id that holds the second namespace, the rest is the server's command.
_SETUP = f"""
set -e
ip link set lo up
unshare -n sleep 600 &
echo $! > "$1.new"
sleep 0.5
ip link add near type veth peer name far netns $!
ip addr add {NEAR}/24 dev near
ip link set near up
nsenter -t $! -n ip addr add {FAR}/24 dev far
nsenter -t $! -n ip link set far up
nsenter -t $! -n ip link set lo up
mv "$1.new" "$1"
shift
exec "$@"
"""
# Which TCP ports of ADDRESS answer a connection by user UID.
_SCAN = """
import os, socket, sys
from concurrent.futures import ThreadPoolExecutor
os.setuid(int(sys.argv[2]))
def answers(port):
    with socket.socket() as probe:
        probe.settimeout(5)
        found = probe.connect_ex((sys.argv[1], port)) == 0
        return found and probe.getpeername() != probe.getsockname()  # not itself, by the number it got by chance
with ThreadPoolExecutor(8) as pool:
    print([port for port, found in enumerate(pool.map(answers, range(1, 65536)), 1) if found])
"""


def _possible() -> bool:
    if os.getuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    made = subprocess.run(
        ["unshare", "-n", "ip", "link", "add", "near", "type", "veth"], capture_output=True, check=False
    )
    return made.returncode == 0


def scan(namespace_of, address, user):
    """Open TCP ports of an address, seen from the network namespace of a process."""
    command = ["nsenter", "-t", str(namespace_of), "-n", sys.executable, "-c", _SCAN, address, str(user)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@pytest.mark.skipif(not _possible(), reason="needs root, unshare, nsenter and ip")
@pytest.mark.timeout(150)
def test_nothing_but_http_answers_other_hosts_and_other_users(base, tmp_path):
    command = ["unshare", "-n", "bash", "-c", _SETUP, "setup", str(tmp_path / "pid"), sys.executable, "-u", "main.py",
               "--cpu", "--taco-ranks", "3", "--listen", "0.0.0.0", "--port", str(PORT), "--base-directory", base,
               "--no-persist"]  # fmt: skip
    environment = {**os.environ, "TACO_TEST_RECORDS": str(tmp_path)}
    lines = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as server:  # fmt: skip
        reader = threading.Thread(target=lambda: lines.extend(server.stdout))
        reader.start()
        try:
            assert wait_until(lambda: any("To see the GUI" in line for line in lines), START_S), lines[-20:]
            second = int((tmp_path / "pid").read_text())
            assert scan(second, NEAR, NOBODY) == str([PORT]), "from another host"
            assert scan(server.pid, "127.0.0.1", NOBODY) == str([PORT]), "as another user of this host"
        finally:
            if (tmp_path / "pid").exists():
                os.kill(int((tmp_path / "pid").read_text()), 9)
            server.terminate()
            server.wait(20)
            reader.join(20)
