"""`search.py`: a folder of photographs, the index, and the daemon."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import client
import client_files
import photo_index
import search
from tests.kit import COLOURS, DEMO, LIMIT_S, ROOT, Drawing, Node, encoded, picture, run_client, wait_until

PICTURES = DEMO / "pictures"
ODD = os.fsdecode(b"caf\xe9 \xff.png")  # as an old camera or a Latin-1 disk names it


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("demo"), ("--demo",)).ready()
    yield node
    assert node.stop() == 0, node.log


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, which every test has to itself."""
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("LUMEN_ADDRESS", raising=False)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with the seven pictures of the demo, one of them in a subfolder."""
    shutil.copytree(PICTURES, tmp_path / "photos")
    (tmp_path / "photos" / "2026").mkdir()
    (tmp_path / "photos" / "fox.png").rename(tmp_path / "photos" / "2026" / "fox.png")
    return tmp_path / "photos"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all photographs that searches in this process have sent for the index."""
    sent: list[int] = []
    infer_many = client.infer_many

    def noted(clients: Sequence[client.LumenClient], requests: Iterable[client.Request]) -> Any:
        def each() -> Iterator[client.Request]:
            for request in requests:
                sent.append(len(request.payload))
                yield request

        return infer_many(clients, each())

    monkeypatch.setattr(client, "infer_many", noted)
    return sent


def find(node: Node, *arguments: str, status: int = 0) -> None:
    assert search.main([*arguments, "--address", node.address]) == status


def rows(path: Path, query: str, *values: Any) -> list[Any]:
    db = sqlite3.connect(path / "lumen-clip" / "search.sqlite")
    try:
        return db.execute(query, values).fetchall()
    finally:
        db.close()


# --- what is found ------------------------------------------------------------------------------------------------


def test_a_text_finds_the_photographs_that_match_it(demo: Node, photos: Path) -> None:
    """Lost otherwise: the search."""
    for text, expected in (("a bird", "penguin.png"), ("a building", "house.png"), ("an insect", "lady-beetle.png")):
        run = run_client(str(photos), text, address=demo.address, program="search.py")
        assert run.returncode == 0, run.stderr
        lines = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
        assert len(lines) == 7 and lines[0][1] == str(photos / expected)
        assert ("7/7 [" in run.stderr and "photo/s]" in run.stderr) == (text == "a bird")  # the bar, with the time left
        scores = [float(score) for score, _ in lines]
        assert scores == sorted(scores, reverse=True)
    vector = demo.result("clip_image_embed", (photos / "lady-beetle.png").read_bytes())["vector"]
    assert scores[0] == pytest.approx(np.dot(vector, demo.result("clip_embed", b"an insect")["vector"]), abs=6e-4)


def test_most_drawings_are_found_by_their_names(demo: Node, drawings: list[Drawing], tmp_path: Path) -> None:
    """Lost otherwise: a search that finds the penguin of the documents alone."""
    shown = drawings[::12]
    for number, drawing in enumerate(shown):
        (tmp_path / f"{number}.png").write_bytes(drawing.file())
    hits = 0
    for number, drawing in list(enumerate(shown))[::4]:
        run = run_client(
            str(tmp_path), f"a {drawing.name}", "--top", "5", "--json", address=demo.address, program="search.py"
        )
        assert run.returncode == 0, run.stderr
        hits += str(tmp_path / f"{number}.png") in [json.loads(line)["path"] for line in run.stdout.splitlines()]
    assert hits / len(shown[::4]) >= 0.75


def test_the_options_change_what_is_found(demo: Node, photos: Path, capsys: Any) -> None:
    """Lost otherwise: the search by a photograph, and the ways to narrow a search down."""

    def found(*arguments: str) -> list[tuple[str, float]]:
        find(demo, str(photos), "--json", *arguments)
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return [(Path(line["path"]).stem, line["score"]) for line in lines]

    assert found("--like", str(photos / "2026" / "fox.png"))[0] == ("fox", 1.0)
    assert [name for name, _ in found("an animal", "--top", "3")] == ["fox", "koala", "penguin"]
    assert [name for name, _ in found("an animal", "--not", "a bird", "--top", "3")] == ["fox", "koala", "lady-beetle"]
    both = dict(found("a bird", "--like", str(photos / "house.png")))
    bird, house = dict(found("a bird")), dict(found("--like", str(photos / "house.png")))
    assert both == {name: pytest.approx((bird[name] + house[name]) / 2, abs=2e-4) for name in both}
    above = found("a bird", "--min-score", "0.36")
    assert [name for name, _ in above] == ["penguin", "sunflower", "fox"] and above[-1][1] >= 0.36
    assert found("a bird", "--min-score", "0.9") == []


def test_paths_are_printed_as_the_folder_was_given(demo: Node, photos: Path, monkeypatch: Any, capsys: Any) -> None:
    """Lost otherwise: paths that somebody cannot use as they are; and one index for all ways to name a folder."""
    monkeypatch.chdir(photos.parent)
    (photos.parent / "link").symlink_to(photos)
    for folder in ("photos", "./photos/", "link", str(photos)):
        find(demo, folder, "a bird", "--top", "1")
        assert capsys.readouterr().out.split()[1] == str(Path(folder) / "penguin.png")
    monkeypatch.chdir(photos)
    find(demo, ".", "a fox", "--top", "1")
    assert capsys.readouterr().out.split()[1] == "2026/fox.png"
    find(demo, "2026", "a fox")
    assert len(capsys.readouterr().out.splitlines()) == 1


# --- the index ----------------------------------------------------------------------------------------------------


def test_each_photograph_is_asked_for_once(demo: Node, photos: Path, asked: list[int], capsys: Any) -> None:
    """Lost otherwise: hours, whenever somebody tidies up a library or searches it again."""
    find(demo, str(photos), "a bird")
    assert len(asked) == 7
    (photos / "birds").mkdir()
    (photos / "penguin.png").rename(photos / "birds" / "emperor.png")
    shutil.copytree(photos / "2026", photos / "copy of 2026")
    os.utime(photos / "house.png", (1, 1))
    find(demo, str(photos), "a bird", "--top", "1")
    assert len(asked) == 7 and capsys.readouterr().out.splitlines()[-1].endswith("/birds/emperor.png")
    (photos / "sunflower.png").unlink()
    shutil.copy(PICTURES / "sunflower.png", photos / "house.png")  # another content under an old name
    find(demo, str(photos), "a building")
    assert len(asked) == 7
    names = [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()]
    assert sorted(names) == sorted(
        ["bicycle.png", "koala.png", "lady-beetle.png", "emperor.png", *["fox.png"] * 2, "house.png"]
    )
    Image.new("RGB", (64, 64), "green").save(photos / "house.png")
    find(demo, str(photos), "a building")
    assert len(asked) == 8


def test_copies_among_new_photographs_are_asked_for_once(demo: Node, photos: Path, asked: list[int]) -> None:
    """Lost otherwise: the time for a backup of a library that stands beside it."""
    shutil.copytree(photos, photos / "backup")
    find(demo, str(photos), "a bird")
    assert len(asked) == 7


def test_a_disk_that_is_not_there_for_a_while_costs_nothing(
    demo: Node, photos: Path, asked: list[int], caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Lost otherwise: the vectors of a disk that was not mounted once; or room, for those of deleted photographs."""
    find(demo, str(photos), "a fox")
    (photos / "2026").rename(photos.parent / "elsewhere")
    find(demo, str(photos), "a fox")
    assert "fox" not in capsys.readouterr().out.split("\n", 7)[-1]
    (photos.parent / "elsewhere").rename(photos / "2026")
    find(demo, str(photos), "a fox", "--top", "1")
    assert len(asked) == 7 and capsys.readouterr().out.endswith("2026/fox.png\n")
    shutil.rmtree(photos / "2026")
    find(demo, str(photos), "a fox")
    assert len(rows(caches, "SELECT * FROM vectors")) == 7
    monkeypatch.setattr(photo_index, "KEEP_SECONDS", -1)
    find(demo, str(photos), "a fox")
    assert len(rows(caches, "SELECT * FROM vectors")) == len(rows(caches, "SELECT * FROM files")) == 6


def test_the_index_is_one_private_file(demo: Node, photos: Path, caches: Path) -> None:
    """Lost otherwise: the secret of what somebody photographs; or a file that nobody else can read."""
    find(demo, str(photos), "a bird")
    [path] = (caches / "lumen-clip").iterdir()
    assert path.name == "search.sqlite" and stat.S_IMODE(path.stat().st_mode) == 0o600
    fox = photos / "2026" / "fox.png"
    query = """SELECT size, mtime, hex(sha256), space, vector FROM files JOIN vectors USING (sha256) WHERE path = ?"""
    [(size, mtime, _, space, vector)] = rows(caches, query, os.fsencode(fox))
    assert (size, mtime) == (fox.stat().st_size, fox.stat().st_mtime_ns)
    response = demo.ask("clip_image_embed", fox.read_bytes())
    assert space == response.meta["space"]
    assert np.frombuffer(vector, "<f4") == pytest.approx(json.loads(response.result)["vector"], abs=1e-5)


def test_a_search_that_is_killed_loses_a_batch_at_most(
    demo: Node, tmp_path: Path, caches: Path, asked: list[int], capsys: Any
) -> None:
    """Lost otherwise: a night's work, to a power cut."""
    count = 400
    for number in range(count):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(picture((number % 250, 90, 90), (64, 64), number)))
    program = (
        "import sys, time; sys.path.insert(0, sys.argv.pop(1)); import client, search\n"
        "search.BATCH_SECONDS, infer_many = 0.1, client.infer_many\n"
        "def slowly(*given):\n"
        "    for answer in infer_many(*given):\n"
        "        time.sleep(0.01); yield answer\n"
        "client.infer_many = slowly; sys.exit(search.main())"
    )
    command = [sys.executable, "-c", program, str(ROOT), str(tmp_path), "a bird", "--address", demo.address]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)

    def stored() -> int:
        try:
            return len(rows(caches, "SELECT sha256 FROM files JOIN vectors USING (sha256)"))
        except sqlite3.OperationalError:  # not there yet, or being written
            return 0

    wait_until(lambda: stored() >= 40)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=LIMIT_S)
    wait_until(lambda: stored() > 0)
    kept = stored()
    assert 40 <= kept < count
    find(demo, str(tmp_path), "a bird", "--top", "1000")
    assert len(asked) == count - kept and len(capsys.readouterr().out.splitlines()) == count


def test_an_interrupted_search_keeps_what_it_has(
    demo: Node, photos: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost otherwise: the last batch, to a Ctrl-C or to a daemon that goes away."""
    infer_many = client.infer_many
    for raised, status in ((KeyboardInterrupt(), 130), (client.LumenError("unavailable", "gone"), 1)):

        def three(clients: Any, requests: Any, raised: BaseException = raised) -> Iterator[Any]:
            for number, answer in enumerate(infer_many(clients, requests)):
                if number == 3:
                    raise raised
                yield answer

        monkeypatch.setattr(client, "infer_many", three)
        find(demo, str(photos), "a bird", status=status)
    assert len(rows(caches, "SELECT * FROM vectors")) == 6


def test_vectors_of_two_models_are_kept_apart(
    demo: Node, onnx_node: Node, photos: Path, asked: list[int], caches: Path, capsys: Any
) -> None:
    """Lost otherwise: results without meaning after a change of the model, and nobody who says so."""
    find(demo, str(photos), "a bird")
    assert "space" not in capsys.readouterr().err
    find(onnx_node, str(photos), "a bird")
    spaces = {space for (space,) in rows(caches, "SELECT DISTINCT space FROM vectors")}
    shown = capsys.readouterr()
    assert len(spaces) == 2 and all(space in shown.err for space in spaces), shown.err
    assert shown.err.count("the daemon has another model") == 1 and len(shown.out.splitlines()) == 7
    assert len(asked) == 14
    find(demo, str(photos), "a bird", "--top", "1")
    shown = capsys.readouterr()
    assert shown.out.endswith("penguin.png\n") and "another model" in shown.err and len(asked) == 14
    find(demo, str(photos), "a bird")
    assert capsys.readouterr().err == ""


# --- what libraries are really like -------------------------------------------------------------------------------


def test_a_damaged_photograph_is_listed_once(demo: Node, photos: Path, asked: list[int], capsys: Any) -> None:
    """Lost otherwise: the same errors with each search, or the other photographs."""
    damaged = photos / "damaged.jpg"
    damaged.write_bytes(b"not a picture")
    find(demo, str(photos), "a bird")
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 7 and f"search.py: {damaged}: payload: not an image" in shown.err
    find(demo, str(photos), "a bird")
    assert capsys.readouterr().err == "" and len(asked) == 8
    damaged.rename(photos / "moved.jpg")
    find(demo, str(photos), "a bird")
    assert capsys.readouterr().err == "" and len(asked) == 8
    (photos / "moved.jpg").write_bytes(b"still no picture")
    find(demo, str(photos), "a bird")
    assert "moved.jpg: payload: not an image" in capsys.readouterr().err and len(asked) == 9
    (photos / "moved.jpg").write_bytes(encoded(picture(COLOURS["a photo of a bird"])))
    find(demo, str(photos), "a bird")
    shown = capsys.readouterr()
    assert shown.out.count("moved.jpg") == 1 and "payload" not in shown.err and len(asked) == 10


def test_a_failure_that_is_not_the_photographs_is_tried_again(
    demo: Node, photos: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Lost otherwise: photographs that are never found, because the daemon or the disk was in trouble once."""
    infer_many, read_bytes = client.infer_many, Path.read_bytes

    def in_trouble(clients: Any, requests: Any) -> Iterator[Any]:
        for number, answer in enumerate(infer_many(clients, requests)):
            yield client.LumenError("internal", "out of memory") if number == 1 else answer

    def read_or_fail(path: Path) -> bytes:
        if path.name == "koala.png":
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    with monkeypatch.context() as trouble:
        trouble.setattr(client, "infer_many", in_trouble)
        trouble.setattr(Path, "read_bytes", read_or_fail)
        find(demo, str(photos), "a bird")
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 5 and "koala.png: Input/output error" in shown.err
    assert shown.err.count(": out of memory") == 1 and len(asked) == 6
    find(demo, str(photos), "a bird")
    assert len(capsys.readouterr().out.splitlines()) == 7 and len(asked) == 8


def test_odd_names_and_links_in_circles_cost_nothing(demo: Node, photos: Path, asked: list[int], capsys: Any) -> None:
    """Lost otherwise: a search that ends in a traceback or never, or a photograph that it leaves out."""
    shutil.copy(photos / "penguin.png", photos / ODD)
    os.utime(photos / ODD, (1, 1))
    shutil.copy(photos / "house.png", photos / "a\n\x1b[31mred\u202e.png")
    (photos / "circle").symlink_to(photos)
    (photos / "2026" / "up").symlink_to("..")
    (photos / "nothing.png").symlink_to("nowhere")
    (photos / "itself.png").symlink_to("itself.png")
    (photos / "folder.png").mkdir()
    os.mkfifo(photos / "pipe.png")
    outside = photos.parent / "outside"
    outside.mkdir()
    shutil.copy(photos / "koala.png", outside / "found by a link.png")
    (photos / "linked").symlink_to(outside)
    for _ in range(2):
        find(demo, str(photos), "a bird", "--top", "100")
        shown = capsys.readouterr()
        lines = shown.out.splitlines()
        assert len(lines) == 10 and sum("caf\\xe9 \\xff.png" in line for line in lines) == 1
        assert "/a\\n\\x1b[31mred" in shown.out and "\x1b" not in shown.out
        assert f"{photos}/linked/found by a link.png" in shown.out
        assert "search.py: " not in shown.err
    assert len(asked) == 7
    run = run_client(str(photos), "a bird", address=demo.address, program="search.py", PYTHONIOENCODING="ascii")
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 10, run.stderr


def test_an_unreadable_folder_loses_nothing(
    demo: Node, photos: Path, asked: list[int], caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Lost otherwise: the other photographs, or the vectors of those that cannot be read for a while."""
    find(demo, str(photos), "a fox")
    scandir = os.scandir

    (photos / "lady-beetle.png").unlink()  # beside the folder; this is noticed

    def denied(path: Any) -> Any:
        if str(path).endswith("2026"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as closed:
        closed.setattr(os, "scandir", denied)
        find(demo, str(photos), "a fox")
    shown = capsys.readouterr()
    assert f"search.py: {photos}/2026: Permission denied\n" in shown.err
    gone = [(os.fsencode(photos / "lady-beetle.png"),)]
    assert rows(caches, "SELECT path FROM files WHERE gone IS NOT NULL") == gone
    assert len(shown.out.splitlines()) == 7 + 6
    find(demo, str(photos), "a fox")
    assert len(asked) == 7


def test_files_that_vanish_meanwhile_fail_alone(
    demo: Node, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Lost otherwise: the search, to somebody who tidies up at the same time."""
    scanned, read_bytes = photo_index.scan, Path.read_bytes

    def scan_and_delete(folder: str) -> Any:
        found = scanned(folder)
        (photos / "koala.png").unlink()
        return found

    def read_and_delete(path: Path) -> bytes:
        content = read_bytes(path)
        if path.name == "house.png":
            path.unlink()
        return content

    monkeypatch.setattr(search, "scan", scan_and_delete)
    monkeypatch.setattr(Path, "read_bytes", read_and_delete)
    page = photos.parent / "page.html"
    find(demo, str(photos), "a bird", "--html", str(page))
    shown = capsys.readouterr()
    assert "koala.png: No such file or directory" in shown.err and len(shown.out.splitlines()) == 6
    assert page.read_text().count("<figure>") == 6 and page.read_text().count("no thumbnail: No such file") == 1


def test_heic_files_wait_for_a_daemon_that_reads_them(
    demo: Node, photos: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Lost otherwise: pictures of an iPhone, for good after one search without pillow-heif; or their thumbnails."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(picture(COLOURS["a photo of a bird"])).save(photos / "iphone.heic")
    with monkeypatch.context() as old:
        old.setattr(client_files, "reads_heic", lambda *_: False)
        find(demo, str(photos), "a bird")
    shown = capsys.readouterr()
    assert "search.py: 1 HEIC file was skipped" in shown.err and len(asked) == 7
    page = photos.parent / "page.html"
    find(demo, str(photos), "a bird", "--html", str(page))
    assert "iphone.heic" in capsys.readouterr().out and len(asked) == 8
    assert page.read_text().count("<img ") == 8


# --- the daemon ---------------------------------------------------------------------------------------------------


def test_the_daemon_is_found_by_mdns_and_remembered(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Lost otherwise: an address to be typed; and three seconds with each search."""
    monkeypatch.setenv("LUMEN_MDNS_INTERFACE", "127.0.0.1")
    settings = {"CLIP_MDNS_TYPE": "_lumen._tcp.local.", "CLIP_MDNS_NAME": f"search-{os.getpid()}"}
    node = Node(tmp_path, ("--demo",), ADVERTISE_IP="127.0.0.1", **settings).ready()
    discover = search.discover  # finds daemons of other tests on this machine as well
    monkeypatch.setattr(search, "discover", lambda **given: [a for a in discover(**given) if a == node.address])
    try:
        assert search.main([str(photos), "a bird"]) == 0
        assert f"search.py: found {node.address}" in capsys.readouterr().err
        monkeypatch.setattr(search, "discover", None)  # is not needed again
        assert search.main([str(photos), "a bird"]) == 0
        assert capsys.readouterr().err == ""
    finally:
        assert node.stop() == 0, node.log


def test_without_mdns_the_daemon_of_this_computer_is_asked(
    demo: Node, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Lost otherwise: the first minute, in which the demo answers on this computer alone."""

    def nobody(**_: Any) -> list[str]:
        raise client.LumenError("unavailable", "no daemon answered on mDNS")

    monkeypatch.setattr(search, "discover", nobody)
    monkeypatch.setattr(search, "DEFAULT_ADDRESS", demo.address)
    for message in (f"search.py: no daemon was found by mDNS; trying {demo.address}\n", ""):
        assert search.main([str(photos), "a bird"]) == 0
        assert [line for line in capsys.readouterr().err.splitlines(True) if "search.py" in line] == [message][
            : len(message)
        ]
    monkeypatch.setenv("LUMEN_ADDRESS", "127.0.0.1:9")
    assert search.main([str(photos), "a bird"]) == 1
    assert "nothing answers at 127.0.0.1:9" in capsys.readouterr().err


def test_tls_and_token_are_those_of_the_client(photos: Path, tmp_path: Path, certificates: Path) -> None:
    """Lost otherwise: the search in the library of somebody careful."""
    tls = {"LUMEN_TLS_CERT": certificates / "server.pem", "LUMEN_TLS_KEY": certificates / "server.key"}
    node = Node(tmp_path / "data", ("--demo",), LUMEN_TOKEN_FILE=certificates / "token", **tls).ready()
    try:
        for options, said in (
            (["--ca", str(certificates / "ca.pem"), "--token-file", str(certificates / "token")], ""),
            (["--ca", str(certificates / "ca.pem")], "give --token-file FILE"),
            (["--token-file", str(certificates / "token"), "--tls"], "give --ca FILE"),
            ([], "if it uses TLS, give --ca FILE"),
        ):
            run = run_client(str(photos), "a bird", *options, address=node.address, program="search.py")
            assert run.returncode == bool(said) and said in run.stderr and "Traceback" not in run.stderr, run.stderr
            assert run.stdout.count(".png") == (0 if said else 7)
    finally:
        assert node.stop() == 0, node.log


def test_a_mistake_is_one_line(demo: Node, onnx_node: Node, photos: Path, caches: Path, tmp_path: Path) -> None:
    """Lost otherwise: a traceback for a typing error."""
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    for arguments, status, said in (
        ((str(photos),), 2, "name a text to search for, or a photograph with --like"),
        ((str(photos / "absent"), "a bird"), 2, "absent: not a folder"),
        ((str(photos / "house.png"), "a bird"), 2, "house.png: not a folder"),
        ((odd, "a bird"), 2, "caf\\xe9: not a folder"),
        ((str(photos), odd), 2, "caf\\xe9: the text is not UTF-8"),
        ((str(photos), "a bird", "--not", odd), 2, "caf\\xe9: the text is not UTF-8"),
        ((str(photos), "a bird", "--top", "0"), 2, "--top 0: allowed: 1 or more"),
        ((str(photos), "--like", "absent.jpg"), 2, "--like absent.jpg: not a file"),
        ((str(photos), "--like", str(tmp_path / "broken.jpg")), 1, "broken.jpg: payload: not an image"),
        (
            (str(photos), "a bird", "--html", "absent/page.html"),
            2,
            "--html absent/page.html: the folder does not exist",
        ),
        ((str(photos), "a bird", "--address", "a b"), 2, "--address a b: allowed: HOST"),
        ((str(photos), "a bird", "--address", "127.0.0.1:9"), 1, "nothing answers at 127.0.0.1:9"),
        ((str(photos), "a bird", "--ca", "absent.pem"), 2, "--ca absent.pem: No such file"),
    ):
        address = "" if "--address" in arguments else demo.address
        run = run_client(*arguments, address=address, program="search.py")
        assert run.returncode == status and said in run.stderr and run.stderr.count("\n") == 1, run.stderr
    (caches / "lumen-clip" / "search.sqlite").write_bytes(b"not a database" * 100)
    run = run_client(str(photos), "a bird", address=demo.address, program="search.py")
    assert run.returncode == 1 and "search.sqlite: file is not a database; if it is damaged, delete it" in run.stderr
    (caches / "lumen-clip" / "search.sqlite").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    run = run_client(str(empty), "a bird", address=demo.address, program="search.py")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "search.py: no photograph was found\n")


def test_two_searches_at_the_same_time_share_the_index(demo: Node, tmp_path: Path, caches: Path) -> None:
    """Lost otherwise: a search while the first import of a library runs in another window."""
    for number in range(200):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(picture((number, 90, 90), (64, 64), number)))
    command = [sys.executable, str(ROOT / "search.py"), str(tmp_path), "a bird", "--top", "1000"]
    started = time.monotonic()
    processes = [
        subprocess.Popen([*command, "--address", demo.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in processes:
        out, error = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0 and out.count(b"\n") == 200, error
    print(f"\n{time.monotonic() - started:.1f} s")
    assert len(rows(caches, "SELECT * FROM vectors")) == 200
