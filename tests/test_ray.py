"""`ray_embed.py`: an archive on a Ray cluster, with the demo model. Nodes are processes of this machine."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ray_embed
from client_files import NO_PICTURES
from preprocess import Preprocess
from settings import Settings
from tests.kit import DEMO, KEPT, ROOT, Node, encoded, wait_until

DISTINCT, COPIES = 40, 10  # pictures, and names of each
SECONDS = 300  # for a run; no opinion of a machine's speed
ODD = os.fsdecode(b"caf\xe9 \xff.png")  # as an old camera or a Latin-1 disk names it
# A head without cores, and two worker nodes with a core each. A line in the input kills one, its end stops all.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
options = {"object_store_memory": 200 << 20, "include_dashboard": False}  # bytes
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **options})
workers = [cluster.add_node(num_cpus=1, **options) for _ in range(2)]
print("address", cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(workers.pop(), allow_graceful=False)
    print("killed", len(workers), flush=True)
cluster.shutdown()
"""
CRASH = """
import os, pathlib
read = pathlib.Path.read_bytes
pathlib.Path.read_bytes = lambda path: os.kill(os.getpid(), 9) if path.name == "crash.png" else read(path)
"""


def on_ray(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test that needs Ray."""
    reason = "needs requirements-ray.txt; docs/contributing.md has the command"
    return pytest.mark.ray(pytest.mark.skipif(find_spec("ray") is None, reason=reason)(test))


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """That of all processes. The path of Ray's files is short, because that of a socket may have 107 bytes only."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        ray = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        kept = {name: value for name, value in os.environ.items() if name in KEPT}
        # Decoding takes longer without draft, so that a run can be disturbed.
        yield kept | ray | {"RAY_USAGE_STATS_ENABLED": "0", "LUMEN_JPEG_DRAFT": "0"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that take some time to decode, each under several names, and a broken one."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(DISTINCT):
        colours = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
        content = encoded(Image.fromarray(colours).resize((2400, 1800)))
        (folder / f"{number:02d}-0.jpg").write_bytes(content)
        for copy in range(1, COPIES):
            os.link(folder / f"{number:02d}-0.jpg", folder / f"{number:02d}-{copy}.jpg")
    (folder / "broken.jpg").write_bytes(content[: len(content) // 2])
    return folder


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("data"), ("--demo",), LUMEN_JPEG_DRAFT=0).ready()
    yield node
    assert node.stop() == 0, node.log


class RayCluster:
    """A cluster in a process of its own, because gRPC of this one must not be forked. See CLUSTER."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, "-c", CLUSTER]
        self._process = subprocess.Popen(
            command, env=environment, text=True, cwd=DEMO, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.environment = environment | {"RAY_ADDRESS": self._answer("address")}

    def kill_a_node(self) -> None:
        """All processes of a worker node receive SIGKILL."""
        assert self._process.stdin
        print("kill", file=self._process.stdin, flush=True)
        assert self._answer("killed")

    def close(self) -> None:
        self._process.communicate(timeout=SECONDS)

    def _answer(self, word: str) -> str:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(f"{word} "):
                return line.split()[1]
        pytest.fail("the cluster did not start")


@pytest.fixture
def cluster(environment: dict[str, str]) -> Iterator[RayCluster]:
    made = RayCluster(environment)
    yield made
    made.close()


def start(*arguments: Any, **environment: str) -> subprocess.Popen[str]:
    """`ray_embed.py` with the demo model."""
    command = [sys.executable, str(ROOT / "ray_embed.py"), *map(str, arguments), "--demo"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=DEMO
    )


def ended(run: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and what was said."""
    _, said = run.communicate(timeout=SECONDS)
    return run.returncode, said


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of all files by their paths, of which each must be there once."""
    import pyarrow.parquet as pq

    rows = [row for file in out.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


def check(out: Path, archive: Path, node: Node) -> None:
    """Each picture of the archive has one row, with the daemon's vector or an error."""
    rows = rows_of(out)
    assert rows.keys() == {str(path) for path in archive.iterdir()}
    broken = rows.pop(str(archive / "broken.jpg"))
    assert (broken["vector"], broken["error"]) == (None, "the JPEG image is damaged or cut off")
    for number in range(DISTINCT):
        same = [rows[str(archive / f"{number:02d}-{copy}.jpg")] for copy in range(COPIES)]
        check_vectors(node, archive / f"{number:02d}-0.jpg", same)


def check_vectors(node: Node, path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows are what the daemon answers for this picture."""
    answer = node.ask("clip_image_embed", path.read_bytes())
    vector = np.array(json.loads(answer.result)["vector"])
    for row in rows:
        facts = {"space": row["space"], "model_id": row["model_id"]}
        assert (facts.items() <= dict(answer.meta).items(), row["error"]) == (True, None)
        assert len(row["vector"]) == len(vector)
        assert abs(float(vector @ np.array(row["vector"])) - 1) < 1e-6


# --- on a cluster -------------------------------------------------------------------------------------------------


@on_ray
def test_a_node_that_is_killed_costs_no_picture(cluster: RayCluster, archive: Path, node: Node, tmp_path: Path) -> None:
    """Lost otherwise: pictures of an archive of millions that nobody can find, or that are found twice."""
    out, environment = tmp_path / "out", cluster.environment
    run = start(archive, "--out", out, **environment)
    wait_until(lambda: any(out.glob("*.parquet")) or run.poll() is not None, SECONDS)
    cluster.kill_a_node()
    assert len(rows_of(out)) < DISTINCT * COPIES, "the node was killed too late"
    status, said = ended(run)
    assert status == 0, said
    assert f"ray_embed.py: new rows with a vector: {DISTINCT * COPIES}, with an error: 1\n" in said
    check(out, archive, node)

    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    status, said = ended(start(archive, "--out", out, **environment))
    assert status == 0 and "pictures to embed: 0\n" in said, said
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}.items() <= files.items()


@on_ray
def test_a_run_after_one_that_was_killed_does_the_rest(
    cluster: RayCluster, archive: Path, node: Node, tmp_path: Path
) -> None:
    """Lost otherwise: days of work of many machines, when the machine that the command was typed on restarts."""
    out, environment = tmp_path / "out", cluster.environment
    killed = start(archive, "--out", out, **environment)
    wait_until(lambda: any(out.glob("*.parquet")) or killed.poll() is not None, SECONDS)
    killed.kill()
    assert ended(killed)[0] == -signal.SIGKILL
    files = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    done = len(rows_of(out))
    assert 0 < done < DISTINCT * COPIES
    (out / ".x.parquet.1.tmp").touch()  # half a file
    status, said = ended(start(archive, "--out", out, **environment))
    assert status == 0 and f"pictures to embed: {DISTINCT * COPIES + 1 - done}\n" in said, said
    check(out, archive, node)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert not list(out.glob("*.tmp"))


# --- on one machine -----------------------------------------------------------------------------------------------


@on_ray
def test_a_list_and_a_parquet_file_name_the_pictures(environment: dict[str, str], node: Node, tmp_path: Path) -> None:
    """Lost otherwise: an archive whose paths stand in a catalogue, or whose names are older than UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    odd = tmp_path / ODD
    shutil.copy(DEMO / "pictures" / "fox.png", odd)
    out, listed, large = tmp_path / "out", tmp_path / "list.txt", tmp_path / "large.jpg"
    large.touch()
    os.truncate(large, (1 << 20) + 1)
    names = ["pictures/fox.png\r", "", str(odd), "/no such file.jpg", "pictures", str(large), "pictures/fox.png", ""]
    listed.write_bytes(os.fsencode("\n".join(names)))
    status, said = ended(start(listed, "--out", out, **environment, LUMEN_MAX_REQUEST_MB="1"))
    assert status == 0, said
    rows, odd_row = rows_of(out), f"{tmp_path}/caf\\xe9 \\xff.png"
    assert rows.keys() == {"pictures/fox.png", odd_row, "/no such file.jpg", "pictures", str(large)}
    check_vectors(node, odd, [rows["pictures/fox.png"], rows[odd_row]])
    assert rows["/no such file.jpg"]["error"] == "No such file or directory"
    assert rows["pictures"]["vector"] is None and rows["pictures"]["error"]
    assert rows[str(large)]["error"] == "the file has 1048577 bytes; allowed: 1048576"

    catalogue = tmp_path / "catalogue.parquet"
    column = pa.array(["pictures/fox.png", None, "pictures/koala.png", "null\0character.png"], pa.large_string())
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "path": column}), catalogue)
    status, said = ended(start(catalogue, "--out", out, **environment))
    assert status == 0 and "pictures to embed: 2\n" in said, said
    check_vectors(node, DEMO / "pictures" / "koala.png", [rows_of(out)["pictures/koala.png"]])
    assert rows_of(out)["null\0character.png"]["error"] == "embedded null byte"


@on_ray
def test_a_picture_that_crashes_its_process_does_not_end_the_run(environment: dict[str, str], tmp_path: Path) -> None:
    """Lost otherwise: an archive of millions, for one picture that a decoder cannot bear."""
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    for name in ["crash", *(f"{number:02d}" for number in range(10))]:
        shutil.copy(DEMO / "pictures" / "fox.png", tmp_path / f"{name}.png")
    out = tmp_path / "out"
    environment = environment | {"PYTHONPATH": str(tmp_path)}
    for left in (r"\d", "1, such as .*/crash.png"):  # shards are smaller if fewer pictures are left
        status, said = ended(start(tmp_path, "--out", out, **environment))
        assert status == 1 and re.search(f"pictures without a row, because their tasks failed: {left}", said), said
    assert rows_of(out).keys() == {f"{tmp_path}/{number:02d}.png" for number in range(10)}


@on_ray
def test_a_model_that_does_not_open_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    """Lost otherwise: the line that matters, in the traceback of a node."""
    command = [sys.executable, str(ROOT / "ray_embed.py"), str(DEMO / "pictures"), "--out", str(tmp_path)]
    settings = {"CLIP_BACKEND": "onnxrt", "CLIP_MODEL": "/no such folder"}
    run = subprocess.run(command, env=environment | settings, capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == 2
    assert "\nray_embed.py: CLIP_MODEL=/no such folder: " in f"\n{run.stderr}" and "Traceback" not in run.stderr


@on_ray
@pytest.mark.parametrize(("before", "on"), [({}, False), ({"RAY_USAGE_STATS_ENABLED": "1"}, True)])
def test_usage_statistics_are_off(before: dict[str, str], on: bool) -> None:
    """Lost otherwise: facts about the operator's cluster, which Ray sends to its maker by default."""
    script = "import ray_embed; from ray._common.usage import usage_lib; print(usage_lib.usage_stats_enabled())"
    kept = {name: value for name, value in os.environ.items() if name in KEPT}
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=kept | before, capture_output=True, text=True)
    assert run.stdout == f"{on}\n", run.stderr


# --- without Ray --------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What is said, in one line, about a mistake of the operator."""
    assert ray_embed.main(list(map(str, arguments))) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lost otherwise: an evening, for a package that is missing."""
    monkeypatch.setitem(sys.modules, "ray.exceptions", None)
    line = refused(capsys, tmp_path, "--out", tmp_path)
    assert line == f"ray_embed.py: ray is not installed for {sys.executable}; it needs requirements-ray.txt"


@on_ray
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lost otherwise: the reason, in a traceback, or a cluster that starts before it is found."""
    pictures, out = DEMO / "pictures", tmp_path / "out"
    (tmp_path / "a.parquet").write_text("no Parquet")
    line = refused(capsys, tmp_path / "a.parquet", "--out", out, "--demo")
    assert line.startswith(f"ray_embed.py: {tmp_path}/a.parquet: not a Parquet file with texts in a column `path` (")
    line = refused(capsys, tmp_path / "none", "--out", out, "--demo")
    assert line == f"ray_embed.py: {tmp_path}/none: no such file or folder"
    (tmp_path / "empty").mkdir()
    line = refused(capsys, tmp_path / "empty", "--out", out, "--demo")
    assert line == f"ray_embed.py: {tmp_path}/empty: {NO_PICTURES}"
    assert not out.exists()
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refused(capsys, pictures, "--out", out, "--demo")
    assert line == f"ray_embed.py: --out {out}: another run writes to this folder"
    for backend in ("rknn", "none"):
        monkeypatch.setenv("BIOCLIP_BACKEND", backend)
        line = refused(capsys, pictures, "--out", out, "--model", "bioclip")
        assert line == f"ray_embed.py: BIOCLIP_BACKEND={backend}: ray_embed.py does not run it; allowed: torch, onnxrt"


GPU, CORE = {"num_gpus": 1, "num_cpus": 0}, {"num_cpus": ray_embed.ACTOR_CPUS}


@pytest.mark.parametrize(
    ("settings", "found", "expected"),
    [
        ({"CLIP_BACKEND": "torch"}, {"CPU": 32.0, "GPU": 4.0}, (4, GPU)),
        ({"CLIP_BACKEND": "torch", "CLIP_DEVICE": "cpu"}, {"CPU": 32.0, "GPU": 4.0}, (32, CORE)),
        ({"CLIP_BACKEND": "torch"}, {"CPU": 32.0}, (32, CORE)),
        ({"CLIP_BACKEND": "onnxrt"}, {"CPU": 32.0, "GPU": 4.0}, (32, CORE)),
        (
            {"CLIP_BACKEND": "onnxrt", "CLIP_ORT_PROVIDERS": "CUDAExecutionProvider,CPUExecutionProvider"},
            {"CPU": 32.0, "GPU": 4.0},
            (4, GPU),
        ),
    ],
)
def test_there_is_one_actor_for_each_gpu_or_core(
    settings: dict[str, str], found: dict[str, float], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: GPUs that do nothing, or a model on the CPU that waits for them."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(cluster_resources=lambda: found))
    count, actor, task = ray_embed.placement(Settings.from_environment(settings).clip)
    assert (count, actor) == expected
    assert task["num_cpus"] <= 1 - actor["num_cpus"]  # else an actor on each core would leave no place to decode


@on_ray
def test_a_vector_that_is_not_finite_fails_alone() -> None:
    """Lost otherwise: the other pictures of its batch."""
    import pyarrow as pa

    class Fragile:
        preprocess, space, model_id = Preprocess(size=1), "space", "model"

        def encode_images(self, pixels: Any) -> Any:
            if (pixels == 255).any():
                raise ValueError("not finite")
            return pixels[:, 0, 0].astype(np.float32)

    embedder: Any = object.__new__(ray_embed.Embedder)
    embedder.backend = Fragile()
    values, broken = [0, 1, 2, 255, 4], 2
    pixels, errors = [bytes([value] * 3) for value in values], [""] * 5
    pixels[broken], errors[broken] = b"", "damaged"
    batch = pa.table({"path": list("abcde"), "pixels": pixels, "error": errors})
    rows = embedder(batch).to_pylist()
    assert [row["vector"] and row["vector"][0] for row in rows] == [0, 1, None, None, 4]
    assert [row["error"] for row in rows] == [None, None, "damaged", "not finite", None]
    assert [row["path"] for row in rows] == list("abcde")
    assert {(row["space"], row["model_id"]) for row in rows} == {("space", "model")}


def test_it_knows_no_grpc() -> None:
    """Lost otherwise: an archive job that brings a server along."""
    script = (
        "import ray_embed, sys; print(*{name.partition('.')[0] for name in sys.modules} & {'grpc', 'google', 'gen'})"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")
