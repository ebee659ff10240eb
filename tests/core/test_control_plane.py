"""The control plane: values, waits, events, streams; and that nobody else gets in."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import tempfile
import threading
import time

import pytest
import torch

from comfy.taco_dit.core import control_channel
from comfy.taco_dit.core.control_channel import ConnectionLost, Door, Forged, RemoteDoor, demand_proof, prove
from comfy.taco_dit.core.control_client import ControlClient
from comfy.taco_dit.core.control_hub import Hub
from comfy.taco_dit.core.control_plane import ControlPlaneError, connect
from comfy.taco_dit.core.socket_group import SocketGroup

SECRET = b"a secret of this test"


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.close()


@pytest.fixture
def clients(hub):
    made = [ControlClient(Door(hub.make_door())) for _ in range(2)]
    yield made
    for client in made:
        client.close()


@pytest.fixture
def remote(hub):
    """Two clients over TCP, and the port."""
    port = hub.listen_on(("127.0.0.1", 0), SECRET)
    made = [ControlClient(RemoteDoor(("127.0.0.1", port), SECRET)) for _ in range(2)]
    yield made, port
    for client in made:
        client.close()


def in_thread(function, *args):
    """Run it in a thread; a function that waits for its result, or raises what it raised."""
    found = []

    def run():
        try:
            found.append((function(*args), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join(20)
        assert found, "it still waits"
        if found[0][1] is not None:
            raise found[0][1]
        return found[0][0]

    return result


def exercise(first, second):
    """Values, waits and counters between two clients."""
    waits = in_thread(second.get, "later")
    first.set("now", b"\0here")
    assert second.get("now") == b"\0here" and first.peek("never") == b""
    first.set("later", b"x" * 10_000_000)
    assert len(waits()) == 10_000_000
    assert first.add("counter", 2) == 2 and second.add("counter", 3) == 5
    first.delete("now")
    assert second.peek("counter") == b"5"
    assert first.peek("now") == b""


def test_values(clients):
    exercise(*clients)


def test_values_between_hosts(remote):
    exercise(*remote[0])


def test_a_wait_ends_when_its_condition_says_so(clients):
    first, second = clients
    over = threading.Event()
    waits = in_thread(first.get, "never", over.is_set)
    over.set()
    first.poke()
    assert waits() is None
    second.set("never", b"late")
    assert first.get("never") == b"late"


def test_numbers_are_dropped(clients):
    first, second = clients
    for number in (1, 2, 10):
        first.set(f"epoch/{number}/a", b"1")
    second.open_pair("generation/1/x").close()
    assert first.count() == 4
    first.drop("epoch", 10)
    first.drop("generation", 2)
    assert first.count() == 1 and first.peek("epoch/10/a") == b"1"


def test_every_listener_gets_every_event_in_order(clients):
    first, second = clients
    heard = {first: [], second: []}
    first.append_event({"number": 1})
    first.listen(0, lambda number, event: heard[first].append((number, event["number"])))
    second.listen(1, lambda number, event: heard[second].append((number, event["number"])))
    for number in range(2, 50):
        assert clients[number % 2].append_event({"number": number}) == number
    end = time.monotonic() + 10
    while (len(heard[first]) < 49 or len(heard[second]) < 48) and time.monotonic() < end:
        time.sleep(0.01)
    assert heard[first] == [(n, n) for n in range(1, 50)] and heard[second] == heard[first][1:]
    assert first.last_event() == 49


def test_a_client_that_does_not_read_delays_nobody(hub, clients):
    door = Door(hub.make_door())
    deaf = door.open("control")
    from comfy.taco_dit.core.wire import encode

    deaf.send(encode(("get", 1, "much")))
    deaf.send(encode(("listen", 0)))
    first, second = clients
    second.peek("x")
    first.set("much", b"x" * 50_000_000)
    for _ in range(100):
        first.append_event({"text": "y" * 10_000})
    assert len(second.get("much")) == 50_000_000
    deaf.close()
    door.close()


def test_all_waits_end_with_the_hub(hub, clients):
    waits = in_thread(clients[0].get, "never")
    time.sleep(0.1)
    hub.close()
    with pytest.raises(ConnectionLost):
        waits()
    with pytest.raises(ConnectionLost):
        clients[1].append_event({})


def test_a_request_that_makes_no_sense_ends_that_connection_only(hub, clients, caplog):
    from comfy.taco_dit.core.wire import encode

    for request in (b"\x80\x04pickle", encode(("run", "code")), encode(5), encode(("set", "a")), encode(("handle", 1))):
        door = Door(hub.make_door())
        stranger = door.open("control")
        stranger.send(request)
        with pytest.raises(ConnectionLost):
            stranger.receive()
        stranger.close()
        door.close()
    assert caplog.text.count("a connection to the control plane is closed") == 5
    exercise(*clients)


def test_answers_to_a_program_that_was_replaced_by_execv_are_skipped(hub):
    theirs = hub.make_door()
    theirs.send(
        b'{"nonce": "old", "want": "control", "name": ""}'
    )  # by the program before, which never read the answer
    made = [ControlClient(Door(theirs)), ControlClient(Door(hub.make_door()))]
    exercise(*made)
    for client in made:
        client.close()


# --- groups ---------------------------------------------------------------------------------------------------------------


def exercise_groups(clients, ranks=3):
    """All collectives with uneven and empty parts, larger than any socket's buffer."""
    width = 70_001

    def work(rank):
        group = SocketGroup(clients[rank % len(clients)].open_pair, "generation/0/", range(ranks), rank)
        counts = [[(i + 2 * j) % 3 * width for j in range(ranks)] for i in range(ranks)]
        send = torch.cat([torch.full((counts[rank][j],), 10.0 * rank + j) for j in range(ranks)])
        mine = [counts[i][rank] for i in range(ranks)]
        out = torch.empty(sum(mine))
        group.all_to_all(out, send, mine, counts[rank])
        assert torch.equal(out, torch.cat([torch.full((n,), 10.0 * i + rank) for i, n in enumerate(mine)]))
        rows = [0, 3, 1][:ranks]
        local = torch.full((rows[rank], 2, 5), rank, dtype=torch.bfloat16).transpose(1, 2)
        gathered = group.all_gather(local, rows)
        assert gathered[:, 0, 0].tolist() == [float(i) for i, n in enumerate(rows) for _ in range(n)]
        for source in range(ranks):
            tensor = torch.full((7, 3), rank).t()
            group.broadcast(tensor, source)
            assert tensor.eq(source).all()
        return group

    groups = [in_thread(work, rank) for rank in range(ranks)]
    return [group() for group in groups]


def test_collectives(clients):
    for group in exercise_groups(clients):
        group.abort()


def test_collectives_between_hosts(remote):
    for group in exercise_groups(remote[0]):
        group.abort()


def test_leaving_a_group_frees_both_sides(clients):
    groups = [in_thread(SocketGroup, clients[rank].open_pair, "generation/0/", (0, 1), rank) for rank in range(2)]
    first, second = (group() for group in groups)
    waits = in_thread(first.all_gather, torch.ones(3), [3, 3])
    time.sleep(0.1)
    second.abort()
    with pytest.raises(ConnectionLost):
        waits()
    with pytest.raises(ConnectionLost):
        second.all_gather(torch.ones(3), [3, 3])
    first.abort()


# --- nobody else ----------------------------------------------------------------------------------------------------------


def test_a_connection_without_the_secret_is_refused_and_logged(remote, caplog):
    clients, port = remote
    with pytest.raises((Forged, ConnectionLost)):
        RemoteDoor(("127.0.0.1", port), b"another secret!!").open("control")
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(pickle.dumps("set") * 100)
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(1000):
                pass
    assert caplog.text.count("tried to connect to the control plane: refused") == 2
    exercise(*clients)


def test_the_host_must_know_the_secret_too():
    ours, theirs = socket.socketpair()
    server = in_thread(demand_proof, theirs, b"wrong")
    with pytest.raises((Forged, ConnectionLost)):
        prove(ours, SECRET)
    ours.close()
    with pytest.raises((Forged, ConnectionLost)):
        server()
    theirs.close()


@pytest.mark.parametrize("attack", ["change", "repeat", "leave out"])
def test_bytes_on_the_way_cannot_be_changed_repeated_or_left_out(attack):
    """Between two hosts, somebody who can touch the stream."""
    (ours, near), (far, theirs) = socket.socketpair(), socket.socketpair()

    def relay(count):
        data = b""
        while len(data) < count:
            data += near.recv(count - len(data))
        return data

    client = in_thread(prove, ours, SECRET)
    server = in_thread(demand_proof, theirs, SECRET)
    near.sendall(far.recv(32, socket.MSG_WAITALL))
    far.sendall(relay(64))
    near.sendall(far.recv(32, socket.MSG_WAITALL))
    sender, receiver = client(), server()
    frame = 8 + 32
    for message in (b"first!!!", b"second!!"):
        sender.send(message)
    first, second = relay(2 * frame), relay(2 * frame)
    far.sendall(first)
    assert receiver.receive() == b"first!!!"
    forged = {"change": second.replace(b"second", b"forged"), "repeat": first, "leave out": second[frame:]}[attack]
    far.sendall(forged)
    with pytest.raises(Forged):
        receiver.receive()
    for channel in (ours, near, far, theirs):
        channel.close()


def test_ranks_on_several_hosts_need_a_secret():
    for environ in ({}, {"TACO_CONTROL": "10.0.0.1:5000"}, {"TACO_CONTROL": "10.0.0.1:5000", "TACO_SECRET": "short"}):
        with pytest.raises(ControlPlaneError, match="TACO_SECRET"):
            connect(1, 4, {**environ, "LOCAL_WORLD_SIZE": "2"})


def test_a_directory_that_others_can_enter_is_refused(tmp_path, hub):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="others cannot enter"):
        hub.listen_at(str(tmp_path / "open" / "socket"))
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "mine").mkdir(mode=0o700)
    with pytest.raises(PermissionError):
        hub.listen_at(str(tmp_path / "link" / "socket"))


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="another user needs root to be tried")


@needs_root
def test_another_user_cannot_connect_to_the_socket(hub, monkeypatch, caplog):
    """Even where the directory lets them in, which it does not."""
    monkeypatch.setattr("comfy.taco_dit.core.control_hub.private_directory", lambda path: path)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "socket")
        hub.listen_at(path)
        os.chmod(path, 0o777)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            os.seteuid(65534)
            try:
                stranger.connect(path)
            finally:
                os.seteuid(0)
            stranger.settimeout(10)
            with contextlib.suppress(BrokenPipeError):
                stranger.send(b'{"nonce": "1", "want": "control", "name": ""}')
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
        assert "user 65534 tried to connect to the control plane: refused" in caplog.text
        door = control_channel.door_at(path)
        door.open("control").close()
        door.close()
