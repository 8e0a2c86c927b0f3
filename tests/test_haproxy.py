"""deploy/haproxy.cfg with the real HAProxy before real daemons."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client
from tests.kit import DEMO, LIMIT_S, ROOT, Node, pictures, run_client, vectors, wait_until
from tests.lan import Lan
from tests.npu_double import golden_of, with_program

pytestmark = [
    pytest.mark.haproxy,
    pytest.mark.skipif(not shutil.which("haproxy"), reason="needs HAProxy: apt install haproxy"),
]
CONFIG = ROOT / "deploy" / "haproxy.cfg"
SERVERS = re.compile(r"^(    server \w+) 192\.168\.1\.\d+:50051(.*)\n", re.MULTILINE)
PACES = 0.04, 0.08, 0.16  # seconds of a picture; the doubles of NPUs use no core meanwhile


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def instead(text: str, marked: str, by: str) -> str:
    """The configuration with the line that begins like `marked` replaced by the comment that begins like `by`."""
    [comment] = re.findall(rf"^    # ({re.escape(by)}.*)$", text, re.MULTILINE)
    changed, count = re.subn(rf"^    {re.escape(marked)}.*$", lambda _: f"    {comment}", text, flags=re.MULTILINE)
    assert count == 1
    return changed


def configure(folder: Path, *daemons: str, change: Callable[[str], str] = str) -> int:
    """Writes haproxy.cfg with these daemons and a free port; -> the port."""
    text = change(CONFIG.read_text())
    servers = SERVERS.findall(text)
    assert len(servers) == 3
    lines = [f"{name} {daemon}{more}\n" for (name, more), daemon in zip(servers, daemons, strict=False)]
    [port] = free_ports(1)
    text, count = re.subn(r"^    bind :50050 ", f"    bind :{port} ", text, flags=re.MULTILINE)
    assert count == 1
    (folder / "haproxy.cfg").write_text(SERVERS.sub("", text) + "".join(lines))
    return port


@pytest.fixture
def haproxy(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts HAProxy with deploy/haproxy.cfg before the daemons on these ports; -> its address."""
    started = []

    def start(*ports: int, change: Callable[[str], str] = str) -> str:
        port = configure(tmp_path, *(f"127.0.0.1:{port}" for port in ports), change=change)
        with (tmp_path / "haproxy.log").open("wb") as log:
            command = ["haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")]
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        return f"127.0.0.1:{port}"

    yield start
    for process in started:
        process.kill()
        process.wait()


def said(tmp_path: Path) -> str:
    return (tmp_path / "haproxy.log").read_text()


def npu_settings(folder: Path, library: Path) -> dict[str, Any]:
    """Of a daemon whose pictures take FAKE_SECONDS and no core."""
    (folder / "names.json").write_text('["a fox"]')
    return {
        **{"CLIP_BACKEND": "rknn", "CLIP_RKNN_TARGET": "rk3588", "CLIP_RKNN_CORES": 1, "BATCH_SIZE": 2},
        **{"CLIP_MODEL": with_program(DEMO, folder / "model", golden=golden_of(DEMO)), "BIOCLIP_BACKEND": "none"},
        **{"CLIP_LABELS": folder / "names.json", "PYTHONPATH": library, "CLIP_MDNS_TYPE": "off"},
    }


@pytest.fixture
def daemon(tmp_path: Path, npu_library: Path) -> Iterator[Callable[..., Node]]:
    """Starts a daemon that takes so many seconds for a picture."""
    shared = npu_settings(tmp_path, npu_library)
    nodes = []

    def start(port: int, seconds: float, program: tuple[str, ...] = Node.PROGRAM, **settings: Any) -> Node:
        data = tmp_path / str(port)
        data.mkdir(exist_ok=True)
        settings = {**shared, "FAKE_SECONDS": seconds, **settings}
        nodes.append(Node(data, ("--port", str(port)), program, **settings))
        return nodes[-1]

    yield start
    for node in nodes:
        node.process.kill()
        node.process.wait()


# A daemon that loads until a file appears.
LATE = """
import sys, time
from pathlib import Path
sys.path.insert(0, "@ROOT@")
import lumen_clip

load = lumen_clip.load_models

def load_later(*arguments):
    while not Path("@FILE@").exists():
        time.sleep(0.1)
    return load(*arguments)

lumen_clip.load_models = load_later
sys.exit(lumen_clip.main())
"""


def answered(node: Node) -> int:
    """How many requests the daemon has answered, without an error; for when it has stopped."""
    lines = re.findall(r": (\d+) requests, (\d+) errors", node.log)
    assert all(errors == "0" for _, errors in lines)
    return sum(int(requests) for requests, _ in lines)


def test_three_daemons_share_an_import_while_one_dies_and_one_restarts(
    haproxy: Callable[..., str], daemon: Callable[..., Node], tmp_path: Path
) -> None:
    """Lost otherwise: a photograph of an import, or the daemon that has come back and gets no work."""
    ports = free_ports(3)
    fast, middle, slow = (daemon(port, pace) for port, pace in zip(ports, PACES, strict=True))
    for node in (fast, middle, slow):
        node.ready()
    address = haproxy(*ports)
    drawn = sorted((DEMO / "pictures").glob("*.png"))
    (tmp_path / "album").mkdir()
    for i in range(1500):
        (tmp_path / "album" / f"{i:04}.png").symlink_to(drawn[i % len(drawn)])
    command = [sys.executable, str(ROOT / "client.py"), "clip_image_embed", str(tmp_path / "album")]
    command += ["--address", address, "--streams", "6", "--out", str(tmp_path / "rows.jsonl")]
    importing = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def rows() -> list[Any]:
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in (tmp_path / "rows.partial.jsonl").read_text().splitlines()]
        return []

    def until(count: int) -> None:
        wait_until(lambda: len(rows()) >= count or importing.poll() is not None)
        assert importing.poll() is None, importing.communicate()[1]

    until(200)
    slow.process.kill()
    until(400)
    assert middle.stop() == 0
    again = daemon(ports[1], PACES[1]).ready()
    _, complaint = importing.communicate(timeout=2 * LIMIT_S)
    assert importing.returncode == 0, complaint
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["input"] for row in found] == sorted(str(path) for path in (tmp_path / "album").iterdir())
    with client.LumenClient(fast.address) as alone:
        expected = np.array(vectors(alone.infer_many(pictures(len(drawn)))))
    assert all(np.allclose(row["vector"], expected[i % len(drawn)], atol=1e-6) for i, row in enumerate(found))
    lost = re.findall(rf"client\.py: {address}: [^\r\n]*; \d+ unanswered requests go to the others", complaint)
    assert lost, complaint
    for node in (fast, again):
        assert node.stop() == 0
    counts = [answered(node) for node in (fast, middle, again)]
    print("\nanswered by the fast daemon, by the middle one before and after its restart:", counts, *lost, sep="\n")
    assert min(counts) > 0
    assert re.search(r"Server daemons/c is DOWN", said(tmp_path)) and re.search(
        r"Server daemons/b is UP", said(tmp_path)
    )


def test_a_daemon_that_loads_or_stops_gets_no_new_streams(
    haproxy: Callable[..., str], daemon: Callable[..., Node], tmp_path: Path
) -> None:
    """Lost otherwise: calls that are refused while another daemon could answer them, or what a stopping daemon has in
    work."""
    ports = free_ports(2)
    old = daemon(ports[0], 1.5).ready()
    program = LATE.replace("@ROOT@", str(ROOT)).replace("@FILE@", str(tmp_path / "go"))
    (tmp_path / "late.py").write_text(program)
    new = daemon(ports[1], 0.02, (sys.executable, str(tmp_path / "late.py"))).bound()
    address = haproxy(*ports)
    wait_until(lambda: "Server daemons/b is DOWN, reason: Layer7 timeout" in said(tmp_path))
    with client.LumenClient(address) as lumen:
        for _ in range(4):
            assert lumen.health() == "SERVING" and len(lumen.capabilities()) == 1  # `new` would say UNAVAILABLE
        assert "ready: " not in new.log and new.process.poll() is None
        answers = lumen.infer_many(pictures(10))
        found = [next(answers)]  # the others are in progress for 13 seconds
        (tmp_path / "go").touch()
        wait_until(lambda: "Server daemons/b is UP" in said(tmp_path))
        old.process.terminate()
        wait_until(lambda: "Server daemons/a is DOWN, reason: Layer7 timeout" in said(tmp_path))
        assert old.process.poll() is None
        for _ in range(4):
            assert lumen.health() == "SERVING" and len(vectors(lumen.infer_many(pictures(1)))) == 1
        assert len(vectors([*found, *answers])) == 10
    assert old.ended() == 0 and new.stop() == 0
    assert (answered(old), answered(new)) == (10, 4)


def test_tls_in_front_and_behind(
    haproxy: Callable[..., str], daemon: Callable[..., Node], certificates: Path, tmp_path: Path
) -> None:
    """Lost otherwise: photographs that anybody on the network can read, or the token of the daemons."""
    (tmp_path / "both.pem").write_bytes(
        (certificates / "server.pem").read_bytes() + (certificates / "server.key").read_bytes()
    )

    def with_tls(text: str) -> str:
        text = instead(text, "bind :50050 proto h2", "bind :50050 ssl")
        text = instead(text, "default-server proto h2", "default-server ssl").replace("lumen.local", "localhost")
        text = text.replace("/etc/haproxy/lumen.pem", str(tmp_path / "both.pem"))
        return text.replace("/etc/haproxy/ca.pem", str(certificates / "ca.pem"))

    [port] = free_ports(1)
    settings = {"LUMEN_TLS_CERT": certificates / "server.pem", "LUMEN_TLS_KEY": certificates / "server.key"}
    node = daemon(port, 0.02, LUMEN_TOKEN_FILE=certificates / "token", **settings).ready()
    address = haproxy(port, change=with_tls)
    trust = "--ca", str(certificates / "ca.pem")
    run = run_client("health", *trust, address=address)
    assert (run.returncode, run.stdout) == (0, "SERVING\n"), run.stderr
    ask = "clip_image_embed", str(DEMO / "pictures"), "--streams", "2", "--json", *trust
    run = run_client(*ask, address=address)
    assert run.returncode == 1 and "the daemon asks for a token; give --token-file FILE" in run.stderr
    run = run_client(*ask, "--token-file", str(certificates / "token"), address=address)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == len(list((DEMO / "pictures").iterdir())), run.stderr
    assert run_client("health", address=address).returncode == 1
    assert node.stop() == 0


@pytest.mark.measure
def test_three_daemons_of_different_pace_are_used_in_full(
    haproxy: Callable[..., str], daemon: Callable[..., Node], measuring: bool
) -> None:
    """Lost otherwise: the figure in docs/deployment.md. Prints it: pytest -s -m measure -k of_different_pace"""
    if not measuring:
        pytest.skip("takes four minutes, for a figure: python -m pytest -s -m measure -k of_different_pace")
    ports = free_ports(3)
    nodes = [daemon(port, pace).ready() for port, pace in zip(ports, PACES, strict=True)]
    address = haproxy(*ports)

    def rate(clients: list[client.LumenClient], count: int) -> float:
        requests = pictures(count)
        vectors(client.infer_many(clients, requests[:6]))
        began = time.monotonic()
        assert len(vectors(client.infer_many(clients, requests))) == count
        return count / (time.monotonic() - began)

    alone, together = [0.0] * len(nodes), 0.0
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client.LumenClient(address)) for _ in range(6)]
        for _ in range(2):  # a busy computer spoils times, so the better of two counts
            for i, node in enumerate(nodes):
                with client.LumenClient(node.address) as lumen:
                    alone[i] = max(alone[i], rate([lumen], int(10 / PACES[i])))
            together = max(together, rate(clients, int(60 * sum(1 / pace for pace in PACES))))
    print(
        f"\nalone {', '.join(f'{each:.1f}' for each in alone)}, in sum {sum(alone):.1f} photographs a second; "
        f"behind HAProxy with 6 streams {together:.1f}, or {together / sum(alone):.2f} of the sum"
    )


IMPORT = """
import json, sys
import client
clients = [client.LumenClient(sys.argv[1]) for _ in range(4)]
requests = [client.Request("clip_image_embed", open(sys.argv[2], "rb").read(), "", client.AS_TENSOR)] * 400
answers = []
for answer in client.infer_many(clients, requests):
    answers.append(answer.data["vector"])
    if len(answers) == 40:
        print("40", flush=True)
print(json.dumps(answers))
"""


@pytest.mark.lan
def test_a_daemon_that_loses_its_network_is_given_up(lan: Lan, tmp_path: Path, npu_library: Path) -> None:
    """Lost otherwise: an import that waits for a quarter of an hour, because somebody has pulled a cable."""
    settings = npu_settings(tmp_path, npu_library) | {"FAKE_SECONDS": 0.05}
    boards = [lan.machine(f"10.77.0.{i}") for i in (1, 2)]
    for board in boards:
        board.daemon(tmp_path / board.name, "--port", "50051", **settings).ready()
    desk = lan.machine("10.77.0.3")
    port = configure(tmp_path, *(f"{board.address}:50051" for board in boards))
    with (tmp_path / "haproxy.log").open("wb") as log:
        desk.start("haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg"), stdout=log, stderr=log)
    command = sys.executable, "-c", IMPORT, f"127.0.0.1:{port}", str(DEMO / "pictures" / "fox.png")
    importing = desk.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert importing.stdout and importing.stdout.readline() == "40\n"
    lan.ip("-n", lan.switch, "link", "set", boards[1].port, "down")
    began = time.monotonic()
    said, complaint = importing.communicate(timeout=LIMIT_S)
    print(f"\nthe rest took {time.monotonic() - began:.0f} s", complaint)
    answers = json.loads(said)
    assert len(answers) == 400 and all(answer == answers[0] for answer in answers)
    assert "unanswered requests go to the others" in complaint
