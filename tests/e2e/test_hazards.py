"""The twelve things that break a program that becomes one of several ranks one by one.

Each hazard has a test that was seen to fail with its cure taken out; only the tests of step noise (10) and of serving
while rank 0 waits (12) have not been tried so.
"""

from __future__ import annotations

import io
import os
import socket
import time
import urllib.request

import psutil
import pytest
from PIL import Image

from tests.e2e.compare import furthest
from tests.e2e.server import Server
from tests.e2e.workflows import changed, flux, insert, node, parts, picture_to_picture


def all_equal(records, ranks):
    """The lines that every rank wrote down, which must be the same."""
    assert sorted(records) == list(range(ranks)), f"only ranks {sorted(records)} wrote something down"
    assert all(lines == records[0] for lines in records.values()), records
    return records[0]


# --- 1 and 2: what runs next ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_hazard_1_outputs_run_in_one_order(serve, ranks):
    """Every process has hash values of its own (PYTHONHASHSEED=random), so an order out of a set would differ."""
    names = [f"output {letter}" for letter in "qwertzuiop"]

    def order(server, label):
        server.run({name: node("TestOutput", label=label, text=name) for name in names})
        return all_equal(server.records(label), server.ranks)

    assert order(serve(ranks), "order") == order(serve(1), f"order{ranks}") == names


def test_hazard_1_pictures_of_many_outputs(serve):
    """Two samplers behind outputs whose order a set would shuffle: ranks in different samplers would wait for ever."""
    prompt = {}
    for i in range(3):
        prompt |= {f"{i}{k}": v for k, v in flux(seed=500 + i, cfg=4.5).items()}
        for name in flux():
            inputs = prompt[f"{i}{name}"]["inputs"]
            inputs.update({k: [f"{i}{v[0]}", v[1]] for k, v in inputs.items() if isinstance(v, list)})
    found, expected = serve(3).pictures(prompt), serve(1).pictures(prompt)
    assert len(found) == 3 and furthest(found, expected) <= 1


def test_hazard_2_asynchronous_nodes_that_finish_in_another_order_on_each_rank(serve):
    prompt = {}
    delays = {"a": "0.5,0.0,0.2", "b": "0.0,0.5,0.3", "c": "0.2,0.2,0.0"}
    for i, (name, seconds) in enumerate(delays.items()):
        branch = flux(seed=510 + i)
        branch["late"] = node("TestAsync", label="late", delays=seconds, value=510 + i)
        branch["sample"]["inputs"]["seed"] = ["late", 0]
        branch["note"] = node("TestRecord", label="turns", text=name, value=["sample", 0])
        for key, value in branch.items():
            value["inputs"] = {
                k: [f"{name}{v[0]}", v[1]] if isinstance(v, list) else v for k, v in value["inputs"].items()
            }
            prompt[f"{name}{key}"] = value
    server = serve(3)
    outcome = server.run(prompt)
    for name, picture in zip("abc", range(3)):
        (image,) = outcome.outputs[f"{name}save"]["images"]
        expected = serve(1).pictures(flux(seed=510 + picture))[0]
        with Image.open(io.BytesIO(server.file(image))) as found:
            assert furthest(_pixels(found), expected) <= 1
    late = server.records("late")
    assert sorted(late) == [0, 1, 2] and len({tuple(lines) for lines in late.values()}) > 1, "nothing was out of order"
    assert sorted(all_equal(server.records("turns"), 3)) == ["a", "b", "c"]


def _pixels(image):
    import numpy as np

    return np.asarray(image.convert("RGB")).astype(int)


# --- 3: free memory ------------------------------------------------------------------------------------------------


def test_hazard_3_free_memory_that_differs_between_ranks(serve):
    """Rank 0 would evaluate both conditionings in one call, the others one after the other: other collectives."""
    prompt = flux(seed=520, cfg=4.5)
    expected = serve(1).pictures(prompt)
    insert(prompt, "parallel", "TACODiTModelLoader", enable_taco_dit=True, auto_detect=True,
           sequence_parallel_degree=1, cfg_parallel=False, use_flash_attention=True)  # fmt: skip
    insert(prompt, "memory", "TestFreeMemory", slot="latent_image", label="free")
    insert(prompt, "enough", "TestFreeMemoryEnd", before="decode", slot="samples")
    for ranks in (2, 3):
        server = serve(ranks)
        assert furthest(server.pictures(prompt), expected) <= 1
        free = server.records("free")
        assert len({lines[0] for lines in free.values()}) == 2, "ranks were meant to believe different things"
        assert "cfg" not in server.json("/taco_dit/status")["last_run"]["plan"]


# --- 4 and 5: devices, ports ---------------------------------------------------------------------------------------


def test_hazard_4_every_rank_its_own_device(monkeypatch):
    """No GPU here, so what would be asked of torch is looked at: the local rank's GPU, in the worker's thread too."""
    import torch

    import comfy.model_management as management
    from comfy.taco_dit.core.distributed_manager import RankInfo, rank_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    infos = [RankInfo(rank, 6, rank % 3, 3) for rank in range(6)]
    assert [rank_device(info, cpu=False).index for info in infos] == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match="needs GPU number 3 but only 3 are visible"):
        rank_device(RankInfo(3, 4, 3, 4), cpu=False, environ={})
    monkeypatch.setenv("NCCL_HOSTID", "")  # so that what is set below is taken back
    assert rank_device(RankInfo(3, 4, 3, 4), cpu=False, environ={"TACO_SHARE_GPU": "1"}).index == 0
    bound = []
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    monkeypatch.setattr(management.args, "cpu", False)
    monkeypatch.setattr(management, "cpu_state", management.CPUState.GPU)
    monkeypatch.setattr(management, "_bound_device", None)
    management.bind_device(torch.device("cuda", 2))
    management.enter_device_thread()
    assert management.get_torch_device() == torch.device("cuda", 2)
    assert [torch.device(device) for device in bound[:2]] == [torch.device("cuda", 2)] * 2


def test_hazard_4_ranks_say_where_they_compute(serve):
    status = serve(3).json("/taco_dit/status")
    assert [(info["rank"], info["device"]) for info in status["ranks"]] == [(i, "cpu") for i in range(3)]
    assert len({info["pid"] for info in status["ranks"]}) == 3


def test_hazard_5_only_rank_0_serves(serve):
    server = serve(4)
    serving = set()
    for rank, pid in enumerate(server.pids()):
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and _answers_http(connection.laddr.port):
                serving.add((rank, connection.laddr.port))
    assert serving == {(0, server.port)}


def listening(process):
    """(kind, address) of every socket of a process that others can connect to."""
    found = []
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM:
            found.append(("port", connection.laddr.port))
    return found + [("name", c.laddr) for c in process.net_connections("unix") if c.laddr]


def test_hazard_5_no_port_but_http_is_open(serve):
    """Neither other hosts nor other users of this one find anything to talk to, also while ranks exchange tensors."""
    server = serve(3)
    supervisor = psutil.Process(server.process.pid)
    prompt = insert(flux(seed=73, steps=50), "watch", "TestModel", label="ports", slow_ms=20, fail="never",
                    fail_rank=0, fail_step=1)  # fmt: skip
    with server.page() as page:
        page.post(prompt)
        page.wait("progress", lambda m: m["data"]["value"] == 3)
        open_now = {process.pid: listening(process) for process in (supervisor, *map(psutil.Process, server.pids()))}
        page.finish(60)
    assert open_now.pop(server.pids()[0]) == [("port", server.port)]
    assert list(open_now.values()) == [[], [], []]


def _answers_http(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/prompt", timeout=0.5) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


# --- 6: caches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks_that_change", "runs"), [("1,2", 1), ("0", 2), ("", 1), ("0,1,2", 2)])
def test_hazard_6_is_changed_is_what_rank_0_says(serve, ranks_that_change, runs):
    server = serve(3)
    label = f"changed-{ranks_that_change.replace(',', '')}-"
    prompt = flux(seed=530)
    prompt["changes"] = node("TestChanged", label=label, ranks=ranks_that_change)
    prompt["sample"]["inputs"]["seed"] = ["changes", 0]
    first = server.run(prompt)
    second = server.run(prompt)
    assert all_equal(server.records(label), 3) == ["run"] * runs
    assert ("changes" in second.of("execution_cached")[0]["nodes"]) == (runs == 1)
    assert furthest(first.pictures(), second.pictures()) == 0


def test_hazard_6_free_reaches_every_rank(serve):
    server = serve(3)
    prompt = {
        "count": node("TestChanged", label="freed", ranks=""),
        "out": node("TestRecord", label="loaded", text="loaded models", value=["count", 0]),
    }
    server.pictures(flux(seed=531))
    server.run(prompt)
    server.run(prompt)
    assert all_equal(server.records("freed"), 3) == ["run"]
    assert int(all_equal(server.records("loaded"), 3)[-1]) > 0
    server.request("/free", {"unload_models": True})
    server.run(prompt)
    assert all_equal(server.records("loaded"), 3)[-1] == "0"
    assert all_equal(server.records("freed"), 3) == ["run"], "results should have stayed"
    server.request("/free", {"free_memory": True})
    server.run(prompt)
    assert all_equal(server.records("freed"), 3) == ["run", "run"], "results should be gone"
    assert furthest(server.pictures(flux(seed=532)), serve(1).pictures(flux(seed=532))) <= 1


def test_hazard_6_a_result_that_one_rank_lacks_is_nobodys(serve, base):
    """A node fails on rank 1 only, so the others keep its result; next time all must run it again."""
    prompt = {
        "count": node("TestChanged", label="lost", ranks=""),
        "trip": node("TestFail", latent_image=["count", 0], rank=1, kind="once"),
        "out": node("TestRecord", label="lost-out", text="value", value=["trip", 0]),
    }
    with Server(base, 2) as server:  # its own, because the node remembers that it failed
        assert server.run(prompt).error is not None
        assert server.run(prompt).error is None
        assert all_equal(server.records("trip-once"), 2) == ["run", "run"]


# --- 7: side effects -----------------------------------------------------------------------------------------------


def test_hazard_7_files_are_written_once(serve):
    """Numbers without gaps, one file a picture, nothing left over; also for previews, whose prefix is random."""
    server = serve(3)
    output, temp = (os.path.join(server.record_folder, name) for name in ("output", "temp/temp"))
    before = set(os.listdir(temp)) if os.path.isdir(temp) else set()
    names = []
    for seed in (540, 541):
        prompt = flux(seed=seed, batch=2)
        prompt["save"]["inputs"]["filename_prefix"] = "numbers"
        prompt["preview"] = node("PreviewImage", images=["decode", 0])
        outputs = server.run(prompt).outputs
        names += [image["filename"] for image in outputs["save"]["images"]]
        assert len(outputs["preview"]["images"]) == 2
    assert names == [f"numbers_{number:05}_.png" for number in range(1, 5)]
    assert sorted(n for n in os.listdir(output) if n.startswith("numbers")) == names
    assert len(set(os.listdir(temp)) - before) == 4


def test_hazard_7_a_paid_service_is_called_once(serve):
    """An API node runs on rank 0 only; the number it returns is drawn anew each time, yet all ranks use the same."""
    server = serve(3)
    prompt = flux(seed=542, cfg=4.5)
    prompt["paid"] = node("TestApi", label="paid")
    prompt["sample"]["inputs"]["seed"] = ["paid", 0]
    prompt["note"] = node("TestRecord", label="paid-value", text="value", value=["paid", 0])
    picture = server.pictures(prompt)
    assert server.records("paid") == {0: ["called"]}
    (seed,) = all_equal(server.records("paid-value"), 3)
    assert furthest(picture, serve(1).pictures(flux(seed=int(seed), cfg=4.5))) <= 1


# --- 8: progress ---------------------------------------------------------------------------------------------------


def test_hazard_8_progress_is_told_once(serve):
    server = serve(4)
    steps = 7
    before = len(server.log)
    outcome = server.run(flux(seed=550, steps=steps))
    assert [m["value"] for m in outcome.of("progress")] == list(range(1, steps + 1))
    assert all(m["max"] == steps and m["prompt_id"] == outcome.prompt_id for m in outcome.of("progress"))
    assert [m["event"] for m in outcome.messages if m["type"] == "binary"] == [1] * steps
    console = "\n".join(server.log[before:])
    assert console.count(f"| 0/{steps} [") == 1, "one bar on the console"


# --- 9: leaving ----------------------------------------------------------------------------------------------------


def test_hazard_9_interrupt_stops_all_ranks_at_one_step(serve):
    """Rank 1 is late in every step, so that the flag is set while ranks are in different steps' parts."""
    server = serve(3)
    pids = server.pids()
    for turn in range(3):
        label = f"left{turn}-"
        prompt = insert(flux(seed=560 + turn, steps=300), "watch", "TestModel", label=label, slow_ms=5 * turn,
                        fail="never", fail_rank=0, fail_step=1)  # fmt: skip
        with server.page() as page:
            page.post(prompt)
            page.wait("progress", lambda m: m["data"]["value"] == 3)
            server.request("/interrupt", {})
            page.wait("execution_interrupted", timeout=10)
            page.finish()
        assert 3 <= len(all_equal(server.records(label), 3)) < 300
    assert server.pids() == pids


# --- 10: random numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "ddpm", "lcm"])
def test_hazard_10_step_noise_is_that_of_one_rank(serve, sampler):
    """Also with ranks whose own random generators stand elsewhere before sampling."""
    prompt = flux(seed=570, steps=4, sampler=sampler, cfg=3.0)
    expected = serve(1).pictures(prompt)
    drained = insert(changed(prompt, "save"), "drain", "TestDrainRandom", slot="latent_image", label=f"drain-{sampler}")
    for ranks in (2, 3):
        server = serve(ranks)
        assert furthest(server.pictures(drained), expected) <= 1
        states = server.records(f"drain-{sampler}")
        assert len({tuple(lines) for lines in states.values()}) == ranks, "generators were meant to differ"


def test_hazard_10_a_node_that_draws_unseeded_numbers(serve):
    """Rank 0's tensors hold for all, and one warning says so."""
    server = serve(3)
    before = len(server.log)
    start = flux(seed=571)
    start["latent"] = node("EmptySD3LatentImage", width=80, height=112, batch_size=1)
    prompt = insert(changed(start, "save"), "noise", "TestUnseeded", slot="latent_image", label="unseeded")
    picture = server.pictures(prompt)
    sums = server.records("unseeded")
    assert len({lines[0] for lines in sums.values()}) == 3, "ranks were meant to draw different numbers"
    path = os.path.join(server.record_folder, "unseeded.noise0.pt")
    expected = serve(1).pictures(insert(start, "noise", "TestKnownNoise", slot="latent_image", path=path))
    assert furthest(picture, expected) <= 1
    warnings = [line for line in server.log[before:] if "ranks disagreed about" in line]
    assert len(warnings) == 1 and "latent" in warnings[0], warnings


def test_hazard_10_the_posterior_of_an_encoder(serve):
    server = serve(3)
    prompt = picture_to_picture("start.png", seed=572, denoise=0.2)
    before = len(server.log)
    assert furthest(server.pictures(prompt), serve(1).pictures(prompt)) <= 1
    assert not [line for line in server.log[before:] if "disagreed" in line]


# --- 11: host memory -----------------------------------------------------------------------------------------------


def test_hazard_11_ranks_share_the_weights_of_a_file(serve):
    """The weights are the file's own pages, mapped; a rank's private memory does not grow by the file's size.

    The whole of it, with a file of 1.7 GB, is in test_memory.py.
    """
    server = serve(4)
    server.pictures(parts("tiny_flux_dev_bfl.safetensors", seed=580))
    for pid in server.pids():
        with open(f"/proc/{pid}/maps", encoding="utf-8") as file:
            mapped = [line.split() for line in file if "tiny_flux_dev_bfl.safetensors" in line]
        assert mapped, f"process {pid} does not map the file"


# --- 12: threads ---------------------------------------------------------------------------------------------------


def test_hazard_12_inference_mode_holds_on_every_rank(serve):
    server = serve(3)
    server.run({"note": node("TestRecord", label="inference", text="inference mode")})
    assert all_equal(server.records("inference"), 3) == ["True"]


def test_hazard_12_the_server_answers_while_rank_0_waits_for_a_peer(serve):
    """Rank 1 comes 2 s late to the first exchange; pages are served meanwhile, and an interrupt is not lost."""
    server = serve(3)
    prompt = insert(flux(seed=590, steps=50), "late", "TestSlow", slot="latent_image", rank=1, seconds=2.0)
    with server.page() as page:
        page.post(prompt)
        page.wait("executing", lambda m: m["data"]["node"] == "sample")
        asked = time.monotonic()
        assert server.json("/prompt")["exec_info"]["queue_remaining"] == 1
        assert server.json("/object_info/KSampler")
        server.request("/interrupt", {})
        assert time.monotonic() - asked < 1.0
        page.wait("execution_interrupted", timeout=10)
        page.finish()
    prompt = flux(seed=591)
    assert furthest(server.pictures(prompt), serve(1).pictures(prompt)) <= 1


def test_hazard_12_asynchronous_nodes_go_on_while_ranks_wait(serve):
    """An asynchronous node of 1 s on each rank, begun before sampling, is done about when sampling is."""
    server = serve(2)
    prompt = flux(seed=592, steps=2)
    for i, name in enumerate(["one", "two", "three"]):
        prompt[name] = node("TestAsync", label="overlap", delays="0.8,0.8", value=i)
        prompt[f"note {name}"] = node("TestOutput", label="overlap-out", text=name, value=[name, 0])
    begun = time.monotonic()
    server.pictures(prompt)
    assert time.monotonic() - begun < 2.3, "three nodes of 0.8 s should wait together"
    assert len(all_equal(server.records("overlap-out"), 2)) == 3
