"""Several daemons: on one machine, and sharing the work."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import client
import client_connections
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc
from tests.kit import DEMO, LIMIT_S, RED, ROOT, Node, encoded, picture, pictures, run_client, vectors
from tests.lan import ON_LAN, Lan, Machine, until
from tests.npu_double import golden_of, with_program


def npu_demo(folder: Path) -> Path:
    """The demo model with a "program" in it: on the NPU's double a picture takes FAKE_SECONDS, and no core."""
    return with_program(DEMO, folder, golden=golden_of(DEMO))


@pytest.fixture
def demo_daemon(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts a daemon with the demo's images and texts, by the name of its data folder."""
    nodes = []

    def start(name: str, port: int = 0) -> Node:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "names.json").write_text('["a fox"]')
        settings = {**ON_LAN, "CLIP_MDNS_TYPE": "off", "CLIP_LABELS": tmp_path / name / "names.json"}
        nodes.append(Node(tmp_path / name, ("--port", str(port)), **settings))
        return nodes[-1].ready()

    yield start
    for node in nodes:
        node.process.kill()
        node.process.wait()


def test_a_daemon_that_dies_in_the_middle_loses_nothing(
    demo_daemon: Callable[..., Node], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: an import of a night, or some of its pictures, or whose vector is whose."""
    monkeypatch.setattr(client_connections, "AHEAD", 32)  # they wait for us
    monkeypatch.setattr(client_connections, "RETURN_SECONDS", 0.3)
    nodes = [demo_daemon(name) for name in "ab"]
    clients = [client.LumenClient(node.address) for node in nodes]
    requests = pictures(300)
    expected = vectors(clients[0].infer_many(requests))
    killed, answers = 0, client.infer_many(clients, requests)
    found = []
    for answer in answers:
        found.append(answer)
        if len(found) in (50, 150):  # the second time the other one, when the first is back
            nodes[killed].process.kill()
            nodes[killed].stop()
            port = int(nodes[killed].address.rpartition(":")[2])
            nodes[killed] = demo_daemon("ab"[killed], port)

            def back(one: client.LumenClient = clients[killed]) -> bool:
                with contextlib.suppress(client.LumenError):
                    return one.health() == "SERVING"
                return False

            until(back)
            killed += 1
            time.sleep(1)
    assert vectors(found) == expected
    lost = [record.getMessage() for record in caplog.records if record.name == "lumen.client"]
    assert len(lost) == 2 and all(re.search(r"\d+ unanswered requests go to the others$", line) for line in lost), lost
    for node in nodes:
        assert node.stop() == 0
    with pytest.raises(client.LumenError, match=r"nothing answers at 127\.0\.0\.1:"):
        list(client.infer_many(clients, requests))


def test_a_daemon_with_another_model_is_left_out_of_an_index(
    onnx_node: Node, demo_daemon: Callable[..., Node], tmp_path: Path, album: Path
) -> None:
    """Lost otherwise: an index whose vectors cannot be compared, and nobody who knows."""
    other = demo_daemon("data")
    several = f"{onnx_node.address},{other.address}"
    for addresses in (("--address", several), ("--address", onnx_node.address, "--address", other.address)):
        run = run_client("clip_image_embed", str(album), *addresses, "--out", str(tmp_path / "v.npz"))
        assert run.returncode == 0, run.stderr
        assert re.search(
            rf"client.py: {other.address}: left out: its model for clip_image_embed is \w+, the first daemon's \w+",
            run.stderr,
        )
        with np.load(tmp_path / "v.npz", allow_pickle=False) as file:
            assert file["vectors"].shape == (6, 64) and file["model_id"] == "tiny"
    run = run_client("bioclip_embed", "a fox", "--address", f"{other.address},{onnx_node.address}", "--json")
    assert run.returncode == 0 and json.loads(run.stdout)["dim"] == 64  # whether the other was asked yet or not
    run = run_client("health", address=several)
    assert run.stdout == f"{onnx_node.address}:\nSERVING\n{other.address}:\nSERVING\n"
    assert other.stop() == 0
    run = run_client("clip_image_embed", str(album), "--json", address=several)  # one that is not there
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 6 and f"{other.address}: " in run.stderr
    assert run_client("health", address=several).returncode == 1
    for nonsense in (",", f"{several},"):
        run = run_client("health", address=nonsense)
        assert run.returncode == 2 and "--address" in run.stderr and run.stderr.count("\n") == 1


def test_streams_are_an_option_of_the_command_line(onnx_node: Node, album: Path) -> None:
    """Lost otherwise: the command that a household with a balancer needs, or the reason why it is refused."""
    run = run_client("clip_image_embed", str(album), "--streams", "3", "--json", address=onnx_node.address)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line)["input"] for line in run.stdout.splitlines()]
    assert found == sorted(map(str, album.rglob("*.jpg"))) and len(found) == 6
    assert run_client("health", "--streams", "3", address=onnx_node.address).stdout == "SERVING\n"  # asked once
    for wrong in ("0", "65"):
        run = run_client("health", "--streams", wrong, address=onnx_node.address)
        assert (run.returncode, run.stderr) == (2, f"client.py: --streams {wrong}: allowed: 1 to 64\n")


class Timed(pb_grpc.InferenceServicer):
    """A daemon that takes `seconds` for each answer, and counts the requests that it has and has had."""

    def __init__(self, seconds: float, space: str = "a") -> None:
        self.seconds, self.space = seconds, space
        self.held = self.most = self.answered = self.streams = 0
        self.peers: set[str] = set()

    def StreamCapabilities(self, _: Any, context: Any) -> Iterator[pb.Capability]:
        yield pb.Capability(tasks=[pb.IOTask(name="clip_embed")], extra={"clip_space": self.space})

    def Infer(self, requests: Iterator[pb.InferRequest], context: Any) -> Iterator[pb.InferResponse]:
        received: queue.Queue[pb.InferRequest | None] = queue.Queue()
        self.streams += 1
        self.peers.add(context.peer())

        def read() -> None:
            with contextlib.suppress(grpc.RpcError):
                for request in requests:
                    self.held += 1
                    self.most = max(self.most, self.held)
                    received.put(request)
            received.put(None)

        threading.Thread(target=read, daemon=True).start()
        while request := received.get():
            time.sleep(self.seconds)
            self.held -= 1
            self.answered += 1
            yield pb.InferResponse(correlation_id=request.correlation_id, result=request.payload)


class Restartable:
    """The server of a daemon, always on the same port."""

    def __init__(self, daemon: Timed) -> None:
        self._daemon, self.address = daemon, "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_InferenceServicer_to_server(self._daemon, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(self.address)}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    close = stop


@contextlib.contextmanager
def serving(*daemons: Timed) -> Iterator[list[client.LumenClient]]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(contextlib.closing(Restartable(daemon))) for daemon in daemons]
        yield [stack.enter_context(client.LumenClient(server.address)) for server in servers]


def test_each_daemon_takes_a_request_when_it_has_answered_one(caplog: pytest.LogCaptureFixture) -> None:
    """Lost otherwise: the speed of the faster daemon, or an index that mixes two spaces."""
    fast, slow, other = Timed(0.01), Timed(0.1), Timed(0, "b")
    requests = [client.Request("clip_embed", str(number).encode()) for number in range(150)]
    with serving(fast, slow, other) as clients:
        answers = list(client.infer_many(clients, iter(requests)))
    assert [isinstance(answer, client.Result) and answer.data for answer in answers] == list(range(150))
    assert fast.most == slow.most == 8 and fast.answered > 3 * slow.answered > 0
    assert other.answered == 0 and "left out: its model for clip_embed is b, the first daemon's a" in caplog.text
    alone = Timed(0.005)
    with serving(alone) as clients:
        assert len(list(client.infer_many(clients, iter(requests)))) == 150 and alone.most > 32


def numbered(count: int) -> list[client.Request]:
    return [client.Request("clip_embed", str(number).encode()) for number in range(count)]


def numbers(answers: Iterator[client.Result | client.LumenError]) -> list[Any]:
    return [answer.data for answer in answers if isinstance(answer, client.Result)]


def test_the_streams_of_one_address_move_to_a_daemon_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: the speed of a daemon that is restarted or added while an import runs behind a balancer."""
    monkeypatch.setattr(client_connections, "STREAM_SECONDS", 0.3)
    first, second = Timed(0.001), Timed(0.001)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(contextlib.closing(Restartable(daemon))) for daemon in (first, second)]
        address = "ipv4:" + ",".join(server.address for server in servers)  # as a name with two addresses
        clients = [stack.enter_context(client.LumenClient(address, spread=True)) for _ in range(4)]
        servers[1].stop()

        def requests() -> Iterator[client.Request]:
            deadline = time.monotonic() + LIMIT_S
            for number in itertools.count():
                yield client.Request("clip_embed", str(number).encode())
                if number == 100:
                    servers[1].start()
                if (number > 500 and second.streams > 2) or time.monotonic() > deadline:
                    return

        answers = numbers(client.infer_many(clients, requests()))
    assert answers == list(range(len(answers))) and len(answers) > 500 and second.answered > 0
    assert first.streams > 4 and len(first.peers) == 4  # each client has a connection of its own
    assert max(first.most, second.most) <= 4 * 8


def test_a_balancer_without_daemons_is_waited_for_and_not_forever(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: an import that ends when all streams fail at once, as when the balancer is restarted; or one that
    never ends."""
    for name, value in (("RETURN_SECONDS", 0.2), ("PATIENCE_SECONDS", 3), ("AHEAD", 64)):
        monkeypatch.setattr(client_connections, name, value)
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(contextlib.closing(Restartable(Timed(0.005))))
        clients = [stack.enter_context(client.LumenClient(before.address)) for _ in range(3)]
        answers = client.infer_many(clients, numbered(300))
        found = [next(answers) for _ in range(100)]
        before.stop()
        time.sleep(1)
        before.start()
        assert numbers(iter(found)) + numbers(answers) == list(range(300))
        lost = [line for line in caplog.messages if "unanswered requests go to the others" in line]
        assert 1 <= len(lost) <= 3, caplog.messages  # once for each stream that had some
        answers = client.infer_many(clients, numbered(300))
        assert isinstance(next(answers), client.Result)
        before.stop()
        with pytest.raises(client.LumenError) as error:
            list(answers)
        assert error.value.code == "unavailable"
        began = time.monotonic()
        with pytest.raises(client.LumenError, match="nothing answers at"):  # it has never answered
            list(client.infer_many(clients, numbered(3)))
        assert time.monotonic() - began < 60


SPREAD = """
import json, sys, time
import client
import client_connections
client.KEEPALIVE_MS = 1000, 1000

def ask(addresses, photo, count):
    clients = [client.LumenClient(address) for address in addresses]
    requests = [client.Request("clip_image_embed", photo, "", client.AS_TENSOR)] * count
    list(client.infer_many(clients, requests[:4]))
    started, busy, answers = time.monotonic(), time.process_time(), []
    for answer in client.infer_many(clients, requests):
        answers.append(answer.data["vector"][:3])
        if len(answers) == count // 4:
            print("a quarter", flush=True)
    times = {"seconds": time.monotonic() - started, "cpu": time.process_time() - busy}
    print(json.dumps({"addresses": addresses, "answers": answers, **times}), flush=True)

addresses = [] if sys.argv[2] == "discover" else sys.argv[2].split(",")
while len(addresses) < max(map(int, sys.argv[4:])):  # a busy daemon may answer too late for one search
    addresses = client.discover()
for share in sys.argv[4:]:
    ask(addresses[:int(share)], open(sys.argv[1], "rb").read(), int(sys.argv[3]))
"""


def npu_daemon(machine: Machine, data: Path, model: Path, library: Path, seconds: float = 0.08) -> Node:
    """One whose pictures take so long and use no core, so that what is measured is not this computer."""
    settings = {"CLIP_BACKEND": "rknn", "CLIP_RKNN_TARGET": "rk3588", "CLIP_RKNN_CORES": 1, "CLIP_MODEL": model}
    settings["CLIP_MDNS_NAME"] = machine.name  # on a busy computer two that start together may take the same name
    return machine.daemon(data, PYTHONPATH=library, FAKE_SECONDS=seconds, BATCH_SIZE=2, **settings)


@pytest.mark.lan
@pytest.mark.measure
def test_two_daemons_that_are_found_share_the_work(
    lan: Lan, tmp_path: Path, npu_library: Path, measuring: bool
) -> None:
    """Lost otherwise: the second board's money, and with a pulled cable the import."""
    model = npu_demo(tmp_path / "model")
    boards = [lan.machine(f"10.77.0.{i}") for i in (1, 2)]
    nodes = [npu_daemon(board, tmp_path / board.name, model, npu_library) for board in boards]
    for node in nodes:
        node.wait_for(r"mDNS: .*_lumen")
    assert "the NPU is not used" not in nodes[0].log
    desk = lan.machine("10.77.0.3")
    command = sys.executable, "-c", SPREAD, str(DEMO / "pictures" / "fox.png")
    where = "discover"
    reports: list[Any] = []
    for _ in range(3):  # a busy computer spoils times
        run = [*desk.inside, *command, where, "40", "1", "2"]
        said = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_S, check=True).stdout
        reports += [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        one, two = (min(report["seconds"] for report in reports[i::2]) for i in (0, 1))
        where = ",".join(reports[1]["addresses"])
        if not measuring or one / two >= 1.8:
            break
    print(f"\none daemon {one:.2f} s, two {two:.2f} s; the client {reports[1]['cpu'] / 40 * 1e3:.1f} core ms each")
    found = [f"10.77.0.{i}:{node.wait_for('port ([0-9]+);')[1]}" for i, node in enumerate(nodes, 1)]
    assert sorted(reports[1]["addresses"]) == found
    assert all(report["answers"] == reports[0]["answers"] for report in reports)
    assert one > 40 * 0.08 and (one / two >= 1.8 or not measuring)

    importing = desk.start(
        *command, ",".join(found), "40", "2", stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert importing.stdout and importing.stdout.readline() == "a quarter\n"
    lan.ip("-n", lan.switch, "link", "set", boards[1].port, "down")
    said, complaint = importing.communicate(timeout=LIMIT_S)
    assert json.loads(said)["answers"] == reports[0]["answers"], complaint
    assert re.search(rf"^{found[1]}: .*unanswered requests go to the others$", complaint, re.MULTILINE), complaint


@pytest.mark.lan
@pytest.mark.measure
def test_eight_daemons_on_one_machine_are_eight(lan: Lan, tmp_path: Path, measuring: bool) -> None:
    """Lost otherwise: a machine with many models or NPUs, and a household after a power cut."""
    if not measuring:
        pytest.skip("daemons must answer mDNS probes within 750 ms; on a quiet machine: python -m pytest -m measure")
    host, desk = lan.machine("10.77.0.1"), lan.machine("10.77.0.2")
    nodes = {}
    count = 8
    for i in range(count):
        nodes[50051 + i] = host.daemon(tmp_path / f"data{i}", "--port", str(50051 + i))
        if i % 4 == 3:  # four start at once
            for node in list(nodes.values())[-4:]:
                node.wait_for("ready: ")
    uuids = {(tmp_path / f"data{i}" / "uuid").read_text()[:8] for i in range(count)}

    def names() -> set[str]:
        said = [re.findall(r"mDNS: (.*)\._lumen\._tcp\.local\. at 10\.77\.0\.1:(\d+)\n", n.log) for n in nodes.values()]
        assert all(int(port) == own for own, lines in zip(nodes, said, strict=True) for _, port in lines)
        return {lines[-1][0] for lines in said if lines}

    until(lambda: len(names()) == count)
    assert names() < {"CLIP-Image-Processor", *(f"CLIP-Image-Processor-{uuid}" for uuid in uuids)}
    run = desk.client("capabilities", "--discover")
    assert run.returncode == 0, run.stderr
    addresses = re.findall(r"^10\.77\.0\.1:(\d+):$", run.stdout, re.MULTILINE)
    assert sorted(map(int, addresses)) == list(nodes) and run.stdout.count("clip: lumen-demo-emoji") == count
    folder = tmp_path / "album"
    folder.mkdir()
    for i, drawn in enumerate(sorted((DEMO / "pictures").glob("*.png")) * 4):
        shutil.copy(drawn, folder / f"{i:04}.png")
    run = desk.client("clip_image_embed", str(folder), "--discover", "--out", str(tmp_path / "v.npz"))
    assert run.returncode == 0 and len(np.load(tmp_path / "v.npz")["paths"]) == len(list(folder.iterdir()))
    for node in nodes.values():
        node.process.terminate()
    assert [node.ended() for node in nodes.values()] == [0] * count
    assert all(node.stop() == 0 for node in nodes.values())
    served = [re.findall(r": (\d+) requests, (\d+) errors", node.log) for node in nodes.values()]
    assert sum(int(requests) for lines in served for requests, _ in lines) >= len(list(folder.iterdir()))
    assert {errors for lines in served for _, errors in lines} == {"0"}


def core_seconds(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.spread
@pytest.mark.timeout(900)
def test_two_daemons_with_a_core_each_against_one(request: pytest.FixtureRequest, lan: Lan, tmp_path: Path) -> None:
    """Lost otherwise: the figure in docs/performance.md. Prints it: pytest -s -m spread"""
    cores = sorted(os.sched_getaffinity(0))
    if "spread" not in request.config.option.markexpr:
        pytest.skip("wants two quiet cores for three minutes; run it with: python -m pytest -s -m spread")
    if len(cores) < 2:
        pytest.skip("needs two cores")
    big: Path = request.getfixturevalue("big")
    (tmp_path / "photo.jpg").write_bytes(encoded(picture(RED, (640, 480)), quality=90))
    nodes = []
    for i in (0, 1):
        board = lan.machine(f"10.77.0.{i + 1}")
        board.inside += ("taskset", "-c", str(cores[i]))
        nodes.append(board.daemon(tmp_path / board.name, CLIP_MODEL=big / "onnx"))
    for node in nodes:
        node.wait_for(r"mDNS: .*_lumen")
    desk, count, rounds = lan.machine("10.77.0.3"), 160, 3
    before = sum(core_seconds(node.process) for node in nodes)
    command = [*desk.inside, sys.executable, "-c", SPREAD, str(tmp_path / "photo.jpg"), "discover", str(count)]
    run = subprocess.run([*command, *["1", "2"] * rounds], capture_output=True, text=True, cwd=ROOT, check=True)
    used = sum(core_seconds(node.process) for node in nodes) - before
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(reports[1]["addresses"]) == 2
    one, two = (count / min(report["seconds"] for report in reports[i::2]) for i in (0, 1))
    client_ms = max(report["cpu"] for report in reports) / count * 1e3
    print(
        f"\none daemon {one:.1f} pictures a second, two {two:.1f}: {two / one:.2f} times; core ms of a picture: ",
        end="",
    )
    print(f"daemon {used / (count + 4) / 2 / rounds * 1e3:.0f}, client {client_ms:.1f}; {len(cores)} cores")
    assert two / one >= 1.8
