"""`client.py`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.empty_pb2 import Empty

import client
import client_connections
import machine
from gen import ml_service_pb2 as pb
from tests.hub import FakeHub, folder_content
from tests.kit import KEPT, LIMIT_S, ROOT, Node, run_client, wait_until, write_labels


def test_the_command_line_serves_people_and_programs(onnx_node: Node, album: Path) -> None:
    """Lost otherwise: the way in for everybody without a photo app."""
    address, photo = onnx_node.address, str(album / "0" / "0.jpg")
    assert Path(photo).stat().st_size > 1 << 20  # it is sent in chunks
    run = run_client(
        "clip_classify",
        photo,
        "--topk",
        "3",
        "--labels",
        "an animal, a bird,a landscape",
        "--prompt-template",
        "a photo of {}",
        address=address,
    )
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"\s*[\d.]+%  an animal\n(\s+[\d.]+%  .+\n){2}", run.stdout)
    run = run_client("smart_classify", photo, "--json", address=address)
    assert json.loads(run.stdout)["labels"][0]["label"].count("/") == 7
    run = run_client("--json", "clip_embed", "a red bicycle", address=address)
    assert json.loads(run.stdout)["dim"] == 64
    assert run_client("clip_image_embed", "-", address=address, stdin=Path(photo).read_bytes()).returncode == 0
    assert "clip: tiny on onnxrt (fp32)" in run_client("capabilities", address=address).stdout
    assert run_client("health", address=address).stdout == "SERVING\n"


def test_a_folder_goes_into_one_file_and_a_bad_photograph_is_named(
    onnx_node: Node, album: Path, tmp_path: Path
) -> None:
    """Lost otherwise: an import that stops at the first broken file, or half an index."""
    (album / "broken.jpg").write_bytes(b"not a picture")
    run = run_client("clip_image_embed", str(album), "--out", str(tmp_path / "v.npz"), address=onnx_node.address)
    assert run.returncode == 1 and "broken.jpg: payload: not an image" in run.stderr and "photo" in run.stderr
    with np.load(tmp_path / "v.npz", allow_pickle=False) as file:
        assert file["vectors"].shape == (6, 64) and file["vectors"].dtype == np.float32
        assert [Path(p).name for p in file["paths"]] == ["0.jpg", "2.jpg", "4.jpg", "1.jpg", "3.jpg", "5.jpg"]
        assert file["model_id"] == "tiny"
        expected = onnx_node.result("clip_image_embed", Path(file["paths"][3]).read_bytes())["vector"]
        assert file["vectors"][3] == pytest.approx(expected, abs=1e-5)
    run = run_client("bioclip_classify", str(album), "--out", str(tmp_path / "v.jsonl"), address=onnx_node.address)
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert len(rows) == 7 and sum("error" in row for row in rows) == 1
    assert not list(tmp_path.glob(".*tmp"))


ODD = b"caf\xe9 \xff.jpg"  # as an old camera or a Latin-1 disk names it
ODD_SHOWN = "caf\\xe9 \\xff.jpg"


@pytest.mark.parametrize("out", ["v.jsonl", "v.npz", "", "--json"])
def test_a_file_name_that_is_not_utf8_costs_no_row(onnx_node: Node, album: Path, tmp_path: Path, out: str) -> None:
    """Lost otherwise: a night's work on a whole library, because of one file that an old camera has named."""
    odd = os.fsencode(album / "0" / "x")[:-1] + ODD
    Path(os.fsdecode(odd)).write_bytes((album / "0" / "0.jpg").read_bytes())
    Path(os.fsdecode(odd.replace(b"caf", b"bad"))).write_bytes(b"not a picture")
    arguments = ["--out", str(tmp_path / out)] if out.startswith("v") else [out] if out else []
    run = run_client("clip_image_embed", str(album), *arguments, address=onnx_node.address)
    assert run.returncode == 1 and run.stderr.count("payload: not an image") == 1, run.stderr
    assert f"0/{ODD_SHOWN.replace('caf', 'bad')}: payload: not an image" in run.stderr
    if out == "v.jsonl":
        rows = [json.loads(line) for line in (tmp_path / out).read_text("utf-8").splitlines()]
        paths = [row["input"] for row in rows if "error" not in row]
    elif out == "v.npz":
        with np.load(tmp_path / out, allow_pickle=False) as file:
            paths = file["paths"].tolist()
            assert file["vectors"].shape == (7, 64)
    elif out == "--json":
        paths = [row["input"] for row in map(json.loads, run.stdout.splitlines()) if "error" not in row]
    else:
        paths = run.stdout.splitlines()[::2]
    # docs/client.md says how a name is found again.
    names = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in album.rglob("*.jpg")]
    assert len(paths) == 7 and sum(ODD_SHOWN in path for path in paths) == 1 and set(paths) < set(names)


def test_an_input_that_cannot_be_read_fails_alone(onnx_node: Node, album: Path, tmp_path: Path) -> None:
    """Lost otherwise: all other pictures of the run, or their order."""
    first, last = str(album / "0" / "0.jpg"), str(album / "1" / "1.jpg")
    (album / "empty").mkdir()
    (album / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(album / "pipe.jpg")
    (album / "loop").symlink_to("loop")
    inputs = [first, *(str(album / name) for name in ("absent.jpg", "gone.jpg", "pipe.jpg", "loop", "empty")), last]
    out = tmp_path / "v.jsonl"
    run = run_client("clip_image_embed", *inputs, "--out", str(out), address=onnx_node.address)
    assert run.returncode == 1, run.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["input"] for row in rows] == inputs
    said = [row.get("error") for row in rows]
    assert said[0] is None is said[-1] and said[1:3] == ["No such file or directory"] * 2
    assert said[3] == "not a regular file" and "symbolic links" in said[4] and said[5].startswith("no pictures (.jpg")
    assert [row["vector"] for row in (rows[0], rows[-1])] == [
        pytest.approx(onnx_node.result("clip_image_embed", Path(name).read_bytes())["vector"], abs=1e-5)
        for name in (first, last)
    ]
    run = run_client("clip_image_embed", str(album), "--out", str(tmp_path / "v.npz"), address=onnx_node.address)
    assert run.returncode == 1 and run.stderr.count("client.py: ") == 2, run.stderr  # the pipe and the dangling link
    with np.load(tmp_path / "v.npz", allow_pickle=False) as file:
        assert len(file["paths"]) == 6


def test_a_file_that_vanishes_during_the_run_fails_alone(
    onnx_node: Node, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the run, to somebody who tidies up meanwhile, or to a bad sector."""
    read, out = Path.read_bytes, tmp_path / "v.jsonl"

    def read_or_fail(path: Path) -> bytes:
        if path.name == "0.jpg":
            path.unlink()
        if path.name == "1.jpg":
            raise OSError(errno.EIO, "Input/output error")
        if path.name == "2.jpg":
            raise MemoryError
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_or_fail)
    arguments = ["clip_image_embed", str(album), "--out", str(out), "--address", onnx_node.address]
    assert client.main(arguments) == 1
    errors = {Path(row["input"]).name: row.get("error") for row in map(json.loads, out.read_text().splitlines())}
    assert errors.pop("0.jpg") == "No such file or directory" and errors.pop("1.jpg") == "Input/output error"
    assert errors.pop("2.jpg") == "MemoryError" and errors == dict.fromkeys(("3.jpg", "4.jpg", "5.jpg"))


def test_a_text_that_is_not_utf8_fails_alone(onnx_node: Node, tmp_path: Path) -> None:
    """Lost otherwise: the vectors of all other texts."""
    out, bad = tmp_path / "v.jsonl", os.fsdecode(b"a caf\xe9")
    run = run_client("clip_embed", "a dog", bad, "a cat", "--out", str(out), address=onnx_node.address)
    assert run.returncode == 1 and run.stderr.count("client.py: a caf\\xe9: the text is not UTF-8") == 1, run.stderr
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["input"] for row in rows] == ["a dog", "a caf\\xe9", "a cat"]
    assert [row.get("error") for row in rows] == [None, "the text is not UTF-8", None]
    assert rows[2]["vector"] == pytest.approx(onnx_node.result("clip_embed", b"a cat")["vector"], abs=1e-5)
    (tmp_path / "labels").write_bytes(b"a dog\na caf\xe9\n")
    for options, said in (
        (("--labels", bad), "--labels: "),
        (("--labels", f"@{tmp_path / 'labels'}"), f"--labels: {tmp_path / 'labels'} is not UTF-8"),
        (("--labels", "a", "--prompt-template", f"{bad} {{}}"), "--prompt-template: a caf\\xe9 {} is not UTF-8"),
    ):
        run = run_client("clip_classify", __file__, *options, address=onnx_node.address)
        assert run.returncode == 2 and said in run.stderr and run.stderr.count("\n") == 1, run.stderr


def test_an_answer_that_cannot_be_read_fails_alone() -> None:
    """Lost otherwise: the answers before and after it, to one fault of another server."""
    garbled = pb.InferResponse(result=b"{", result_mime="application/json")
    short = pb.InferResponse(result=b"abc", meta={"lumen.output.kind": "tensor"})
    for response in (garbled, short):
        found = client_connections._answer("clip_image_embed", response)
        assert isinstance(found, client.LumenError) and "the answer cannot be read" in found.message
    newer = pb.InferResponse(error=pb.Error(code=77, message="no"))
    found = client_connections._answer("clip_image_embed", newer)
    assert isinstance(found, client.LumenError) and found.code == "code_77"


@pytest.fixture
def slow_answers(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Three rows come at once, and the others when the event is set."""
    release = threading.Event()

    def answers(_: Any, requests: Any) -> Any:
        for number, _request in enumerate(requests):
            assert number < 3 or release.wait(LIMIT_S)
            yield client.Result("clip_image_embed", "", {"vector": [0.6, 0.8], "dim": 2, "model_id": "m"}, {})

    monkeypatch.setattr(client, "infer_many", answers)
    return release


@pytest.mark.parametrize("suffix", [".jsonl", ".npz"])
def test_an_interrupted_run_keeps_the_rows_so_far(album: Path, tmp_path: Path, suffix: str) -> None:
    """Lost otherwise: hours of work, to a Ctrl-C or to a daemon that goes away; or the result of an earlier run."""
    program = (
        "import signal, sys, time; sys.path.insert(0, sys.argv.pop(1)); import client\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell ignores for what runs beside it
        "def answers(clients, requests):\n"
        "    for number, _ in enumerate(requests):\n"
        "        if number == 3:\n"
        "            print('waiting', flush=True); time.sleep(600)\n"
        "        yield client.Result('', '', {'vector': [0.6, 0.8], 'dim': 2, 'model_id': 'm'}, {})\n"
        "client.infer_many = answers; sys.exit(client.main())"
    )
    out, partial = tmp_path / f"v{suffix}", tmp_path / f"v.partial{suffix}"
    out.write_bytes(b"an earlier run's")
    command = [sys.executable, "-c", program, str(ROOT), "clip_image_embed", str(album), "--out", str(out)]
    for number in ("", "-2"):  # the second one spares what the first one has left
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout and process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=LIMIT_S)
        kept = partial.with_name(f"v.partial{number}{suffix}")
        assert process.returncode == 130 and f"client.py: 3 rows are in {kept}" in said, said
        assert out.read_bytes() == b"an earlier run's"
        names = ["0.jpg", "2.jpg", "4.jpg"]
        if suffix == ".npz":
            with np.load(kept, allow_pickle=False) as file:
                assert [Path(path).name for path in file["paths"]] == names and file["vectors"].shape == (3, 2)
        else:
            rows = [json.loads(line) for line in kept.read_text().splitlines()]
            assert [Path(row["input"]).name for row in rows] == names
    assert len(list(tmp_path.glob("*"))) == 4  # the album as well


def test_rows_are_on_the_disk_before_the_run_ends(album: Path, tmp_path: Path, slow_answers: threading.Event) -> None:
    """Lost otherwise: all rows of a run that is killed."""
    out, partial = tmp_path / "v.jsonl", tmp_path / "v.partial.jsonl"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        run = pool.submit(client.main, ["clip_image_embed", str(album), "--out", str(out)])
        wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") == 3)
        assert not out.exists()
        slow_answers.set()
        assert run.result(LIMIT_S) == 0
    assert out.read_bytes().count(b"\n") == 6 and not partial.exists()


def test_a_full_disk_leaves_whole_rows(onnx_node: Node, album: Path, tmp_path: Path) -> None:
    """Lost otherwise: what was computed before the disk was full."""
    out = tmp_path / "v.jsonl"
    program = (
        "import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import client\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); sys.exit(client.main())"
    )
    command = [sys.executable, "-c", program, str(ROOT), "clip_image_embed", str(album), "--out", str(out)]
    run = subprocess.run([*command, "--address", onnx_node.address], capture_output=True, text=True, timeout=LIMIT_S)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    text = (tmp_path / "v.partial.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert text.endswith("\n") and 1 <= len(rows) < 6 and not out.exists()
    assert f"client.py: {len(rows)} rows are in {tmp_path / 'v.partial.jsonl'}\nclient.py: " in run.stderr


def test_an_npz_that_does_not_fit_goes_to_the_temporary_files(
    album: Path, tmp_path: Path, slow_answers: threading.Event, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Lost otherwise: a whole run, at its very end."""
    slow_answers.set()
    savez, other = np.savez, tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(other))

    def savez_or_fail(file: Any, **arrays: Any) -> None:
        savez(file, **arrays)
        if Path(file.name).parent == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", savez_or_fail)
    assert client.main(["clip_image_embed", str(album), "--out", str(tmp_path / "v.npz")]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and f"6 rows are in {other / 'v.partial.npz'}" in said
    with np.load(other / "v.partial.npz", allow_pickle=False) as file:
        assert file["vectors"].shape == (6, 2)
    assert not list(tmp_path.glob("v*"))


def test_a_terminal_without_utf8_gets_all_rows(onnx_node: Node) -> None:
    """Lost otherwise: the rows after the first label that an old terminal cannot show."""
    texts = ["a dog", "\u0431\u0443\u0440\u044f", "a cat"]
    for arguments in ((), ("--json",)):
        run = run_client("clip_embed", *texts, *arguments, address=onnx_node.address, PYTHONIOENCODING="ascii")
        assert run.returncode == 0, run.stderr
        if arguments:
            assert [json.loads(line)["input"] for line in run.stdout.splitlines()] == texts
        else:
            assert run.stdout.splitlines()[::2] == ["a dog", "\\u0431\\u0443\\u0440\\u044f", "a cat"]


def test_a_mistake_at_the_command_line_is_one_line(onnx_node: Node, tmp_path: Path) -> None:
    """Lost otherwise: a traceback for a typing error."""
    (tmp_path / "folder.jsonl").mkdir()
    for arguments, status, said in (
        (("clip_classify", "nowhere.jpg"), 2, "nowhere.jpg: no such file or folder"),
        (("clip_classify",), 2, "name at least one file or folder"),
        (("clip_classify", str(tmp_path)), 2, "no pictures"),
        (("clip_embed", "x", "--out", "x.csv"), 2, ".jsonl or .npz"),
        (("clip_embed", "x", "--out", str(tmp_path / "folder.jsonl")), 2, "a folder"),
        (("clip_classify", __file__, "--out", "x.npz"), 2, "only embeddings"),
        (("clip_classify", __file__, "--labels", "@nowhere"), 1, "nowhere"),
        (("clip_classify", __file__, "--topk", "0", "--address", "127.0.0.1:9"), 1, "127.0.0.1:9"),
    ):
        run = run_client(*arguments, address="" if "--address" in arguments else onnx_node.address)
        assert run.returncode == status and said in run.stderr and run.stderr.count("\n") == 1, run.stderr


def test_the_client_runs_without_numpy_tqdm_and_zeroconf(onnx_node: Node, tmp_path: Path, album: Path) -> None:
    """Lost otherwise: copying the files of the client into another project."""
    shutil.copytree(ROOT / "gen", tmp_path / "gen")
    for name in ("client.py", "client_connections.py", "client_files.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("numpy", "tqdm", "zeroconf", "PIL", "grpc_health", "google_crc32c"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')")
    command = [sys.executable, "client.py", "clip_image_embed", str(album), "--json", "--address", onnx_node.address]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 6, run.stderr


def test_systemd_is_told_when_the_models_answer(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: units that start after us find nobody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(60)
        settings = {"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", "CLIP_MODEL": tiny_onnx}
        node = Node(write_labels(tmp_path), NOTIFY_SOCKET=tmp_path / "notify", **settings).bound()
        said: list[str] = []
        while not said or not said[-1].startswith("READY=1"):
            said.append(supervisor.recv(4096).decode())
        # Clients are told so too: no path.
        assert said[0] == f"EXTEND_TIMEOUT_USEC=300000000\nSTATUS=loading {tiny_onnx.name} (onnxrt)"
        assert node.result("clip_embed", b"a dog")
        assert node.stop() == 0
        assert supervisor.recv(4096) == b"STOPPING=1"


def test_a_start_is_given_time_as_long_as_it_makes_progress(tmp_path: Path, hub: FakeHub, tiny_onnx: Path) -> None:
    """Lost otherwise: a first start that systemd ends in the middle of its download, or one that hangs for ever."""
    files = hub.repos["org/model"] = folder_content(tiny_onnx) | {"visual/more.data": bytes(14_000_000)}
    whole = round(sum(map(len, files.values())) / 1e6)
    hub.pace = 4_000_000
    hub.stall_after = {"visual/more.data": 11_000_000}  # the hub's client writes 10 MB at a time
    settings = {"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", "CLIP_MODEL": "hf-hub:org/model"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        node = Node(write_labels(tmp_path), NOTIFY_SOCKET=tmp_path / "notify", HF_ENDPOINT=hub.url, **settings).bound()
        assert hub.stalled.wait(LIMIT_S)
        supervisor.settimeout(3)  # what came last is told within a second, and then nothing is
        said: list[str] = []
        with contextlib.suppress(TimeoutError):
            while True:
                said.append(supervisor.recv(4096).decode())
        assert all(text.startswith("EXTEND_TIMEOUT_USEC=300000000\nSTATUS=") for text in said)
        told = [re.search(r"STATUS=downloading org/model: (\d+) of (\d+) MB$", text) for text in said]
        megabytes = [int(match[1]) for match in told if match]
        assert len(megabytes) >= 2 and megabytes == sorted(megabytes) and megabytes[-1] >= 9
        assert {int(match[2]) for match in told if match} == {whole}
        with pytest.raises(grpc.RpcError) as error:
            node.stub.GetCapabilities(Empty())
        assert error.value.details() == f"not ready: downloading org/model: {megabytes[-1]} of {whole} MB"
        assert node.stop() == 0


def test_a_terminal_has_bars_and_the_journal_has_lines(tmp_path: Path, tiny_onnx: Path) -> None:
    """Lost otherwise: a journal of carriage returns, or hours of a label build in front of a silent screen."""
    terminal, child = os.openpty()
    termios.tcsetwinsize(child, (24, 100))
    settings = {"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", "CLIP_MODEL": str(tiny_onnx)}
    environment = {**{k: v for k, v in os.environ.items() if k in KEPT}, **settings, "CLIP_MDNS_TYPE": "off"}
    environment |= {"LUMEN_DATA_DIR": str(write_labels(tmp_path)), "CLIP_TEMPLATES": "1", "LUMEN_TUNE": "0"}
    process = subprocess.Popen((*Node.PROGRAM, "--port", "0"), env=environment, stderr=child)
    os.close(child)
    shown = b""
    while b"ready: " not in shown and process.poll() is None:
        shown += os.read(terminal, 4096)
    process.terminate()
    assert process.wait(LIMIT_S) == 0 and b"\rtext vectors: 100%" in shown, shown
    os.close(terminal)

    read, write = os.pipe()
    stream = f"{os.fstat(write).st_dev}:{os.fstat(write).st_ino}"
    for value, said in ((stream, "<3>CLIP_BACKEND=x: "), ("1:2", "lumen-clip: CLIP_BACKEND=x: ")):
        environment |= {"JOURNAL_STREAM": value, "CLIP_BACKEND": "x"}
        run = subprocess.run(Node.PROGRAM, env=environment, stderr=write)
        assert run.returncode == 2 and os.read(read, 4096).decode().startswith(said)
    os.close(read)
    os.close(write)


FOREIGN_CLIENT = r"""
const [proto, address, photo] = process.argv.slice(2);
const fs = require("fs"), grpc = require("@grpc/grpc-js"), loader = require("@grpc/proto-loader");
const service = grpc.loadPackageDefinition(loader.loadSync(proto, { keepCase: true, longs: Number })).home_native.v1;
const client = new service.Inference(address, grpc.credentials.createInsecure());
function infer(messages) {
  return new Promise((resolve, reject) => {
    const call = client.Infer();
    call.on("error", reject);
    call.on("data", (answer) => { call.end(); resolve(answer); });  // half-closes only after the answer, as old SDKs do
    messages.forEach((message) => call.write(message));
  });
}
function capabilities() {
  return new Promise((resolve, reject) => {
    const found = [], call = client.StreamCapabilities({});
    call.on("error", reject);
    call.on("data", (c) => found.push([c.service_name, c.protocol_version]));
    call.on("end", () => resolve(found));
  });
}
(async () => {
  const data = fs.readFileSync(photo), size = 65536, total = Math.ceil(data.length / size), messages = [];
  for (let seq = 0; seq < total; seq++)
    messages.push({ task: "clip_image_embed", payload_mime: "image/webp", seq, total, offset: seq * size,
                    payload: data.subarray(seq * size, (seq + 1) * size), meta: { service: "clip" } });
  const image = await infer(messages);
  const query = { task: "clip_embed", payload_mime: "text/plain; charset=utf-8", payload: Buffer.from("a bird") };
  const text = await infer([query]);
  console.log(JSON.stringify({ total, mime: image.result_mime, image: JSON.parse(image.result),
                               text: JSON.parse(text.result), capabilities: await capabilities() }));
  client.close();
})().catch((error) => { console.error(error); process.exit(1); });
"""


@pytest.mark.node
def test_a_foreign_client_gets_the_same_answers(
    onnx_node: Node, tmp_path_factory: pytest.TempPathFactory, album: Path
) -> None:
    """Lost otherwise: every client that is not Python's gRPC."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed, which brings the foreign gRPC client")
    folder = tmp_path_factory.mktemp("node")
    (folder / "foreign.js").write_text(FOREIGN_CLIENT)
    subprocess.run(
        ["npm", "install", "--silent", "@grpc/grpc-js@1", "@grpc/proto-loader@0.8"], cwd=folder, check=True, timeout=120
    )
    photo = album / "1" / "1.jpg"
    command = ["node", "foreign.js", str(ROOT / "ml_service.proto"), onnx_node.address, str(photo)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["total"] > 10 and answer["mime"] == "application/json;schema=embedding_v1"
    assert answer["capabilities"] == [["clip", "1.0"], ["bioclip", "1.0"]]
    assert answer["image"]["vector"] == pytest.approx(
        onnx_node.result("clip_image_embed", photo.read_bytes())["vector"], abs=1e-6
    )
    assert answer["text"]["vector"] == pytest.approx(onnx_node.result("clip_embed", b"a bird")["vector"], abs=1e-6)


def test_a_quota_on_cores_is_respected(tmp_path: Path) -> None:
    """Lost otherwise: a container with half a core, in which eight threads fight for it."""
    have = len(os.sched_getaffinity(0))
    own, groups = tmp_path / "own", tmp_path / "groups"
    inner = groups / "system.slice" / "lumen-clip.service"
    inner.mkdir(parents=True)
    own.write_text("4:memory:/old\n0::/system.slice/lumen-clip.service\n")
    assert machine.usable_cores(groups, own) == have
    for quota, cores in (("max 100000", have), ("100000 100000", 1), ("20000 100000", 1), ("9900000 100000", have)):
        (inner / "cpu.max").write_text(quota)
        assert machine.usable_cores(groups, own) == cores
    (inner / "cpu.max").write_text("max 100000")
    (inner.parent / "cpu.max").write_text("100000 100000")  # a parent's quota holds too
    assert machine.usable_cores(groups, own) == 1
    assert machine.usable_cores(groups, tmp_path / "absent") == have
