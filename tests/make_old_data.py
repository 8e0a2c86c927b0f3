"""Makes the archive that tests/test_upgrade.py starts the daemon with: files that commit 9ec4853 wrote.

    git worktree add /tmp/old 9ec4853 && python -m tests.make_old_data /tmp/old

The code of that commit writes everything in the archive, except for the files in data/labels, which are the operator's.
The model is the demo on ONNX Runtime.

    data/           the data folder of a daemon with `--demo`, which had crashed while processing a picture
    fp32/, fp16/    made by `labels.py build`; the second with float16 rows, as in large label sets
    interrupted/    the same build, killed after two parts of the label set were kept
    answers.json    the daemon's answers to QUESTIONS
"""

from __future__ import annotations

import hashlib
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from tests.kit import DEMO, ROOT, Node

COMMIT = "9ec4853"
ARCHIVE = ROOT / "tests" / "data" / f"{COMMIT}.tar.xz"

SUSPECT = (DEMO / "pictures" / "koala.png").read_bytes()
SHARD_LABELS = 64  # in each part of an interrupted build
# The daemon makes its uuid when it is first advertised. No other machine sees it here.
ON_LOOPBACK = {"CLIP_MDNS_TYPE": "_lumen._tcp.local.", "ADVERTISE_IP": "127.0.0.1"}
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 2}]  # for numbers of four bytes

LABEL_SETS = {
    "garden.json": json.dumps(
        {
            "labels": {"small animal": ["a photo of a lady beetle", "a photo of a snail"], "flower": [], "fox": []},
            "none": ["a photo of a person", "a photo of food"],
            "templates": ["a photo of a {}.", "a drawing of a {}."],
            "threshold": 0.1,
        },
        indent=2,
    ),
    "vehicles.txt": "# what stands in front of the house\nbicycle\nbus\nrace car\n",
}
QUESTIONS: list[tuple[str, dict[str, str]]] = [
    ("clip_classify", {}),
    ("clip_classify", {"label_set": "garden"}),
    ("clip_classify", {"label_set": "vehicles"}),
    ("bioclip_classify", {}),
    ("bioclip_classify", {"rank": "family"}),
    ("smart_classify", {}),
]

CRASH = """
import os, sys
from pathlib import Path
import watch

journal = watch.Journal()
journal.open(Path(sys.argv[1]))
with journal.holding([sys.argv[2]]):
    os.abort()
"""

BUILD_FP16 = """
import sys
import treeoflife, vectorfile

vectorfile.HALF_PRECISION_BYTES = 0
sys.exit(treeoflife.main(sys.argv[1:]))
"""

BUILD_INTERRUPTED = f"""
import os, signal, sys
import treeoflife, vectorfile

vectorfile.SHARD_LABELS, save = {SHARD_LABELS}, vectorfile._Shards.save

def save_and_die(shards, start, rows):
    save(shards, start, rows)
    if start == {SHARD_LABELS}:
        os.kill(os.getpid(), signal.SIGKILL)

vectorfile._Shards.save = save_and_die
treeoflife.main(sys.argv[1:])
"""


def answers(node: Node) -> dict[str, Any]:
    """A daemon's answers to QUESTIONS, for two pictures of the demo."""
    found = {}
    for name in ("fox", "bicycle"):
        picture = (DEMO / "pictures" / f"{name}.png").read_bytes()
        for task, meta in QUESTIONS:
            found[" ".join([name, task, *meta.values()])] = node.result(task, picture, **meta)["labels"]
    return found


def run_old(checkout: Path, *arguments: object) -> int:
    """Runs Python with the modules of the checkout; -> its exit status."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=checkout, check=False).returncode


def make_data(checkout: Path, data: Path) -> dict[str, Any]:
    """Starts the daemon of the checkout with a new data folder; -> its answers."""
    (data / "labels").mkdir(parents=True)
    for name, content in LABEL_SETS.items():
        (data / "labels" / name).write_text(content)
    assert run_old(checkout, "-c", CRASH, data, hashlib.sha256(SUSPECT).hexdigest()) < 0
    program = (sys.executable, str(checkout / "lumen_clip.py"))
    node = Node(data, ("--demo",), program, LUMEN_TUNE=1, **ON_LOOPBACK).ready()
    for name in LABEL_SETS:
        node.wait_for(f"label set {Path(name).stem}: ")
    found = answers(node)
    assert "crashed over these bytes" in node.ask("clip_image_embed", SUSPECT).error.message
    node.wait_for(r"mDNS: .* at 127\.0\.0\.1:")
    assert node.stop() == 0, node.log
    return found


def make_label_folders(checkout: Path, folder: Path) -> None:
    arguments = ("build", "--labels", DEMO / "species.json", "--model", DEMO, "--backend", "onnxrt", "--to")
    assert run_old(checkout, "labels.py", *arguments, folder / "fp32") == 0
    assert run_old(checkout, "-c", BUILD_FP16, *arguments, folder / "fp16") == 0
    assert run_old(checkout, "-c", BUILD_INTERRUPTED, *arguments, folder / "interrupted") < 0
    # Holds an absolute path. It is not used after the folder was copied.
    (folder / "fp16" / "text_vectors.checked.json").unlink()


def pack(folder: Path, private: list[str]) -> None:
    """Makes ARCHIVE from the folder, without times and owners. No file may contain one of the texts in `private`."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
        return info

    for path in sorted(folder.rglob("*")):
        if path.is_file():
            assert not [text for text in private if text.encode() in path.read_bytes()], path
    ARCHIVE.parent.mkdir(exist_ok=True)
    with lzma.open(ARCHIVE, "wb", filters=XZ) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name, filter=anonymous)


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    assert head.stdout.startswith(COMMIT), f"{checkout} is of another commit"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "answers.json").write_text(json.dumps(make_data(checkout, folder / "data"), indent=1))
        make_label_folders(checkout, folder)
        pack(folder, [str(checkout), str(ROOT), temporary, str(Path.home())])
    print(f"{ARCHIVE.relative_to(ROOT)}: {ARCHIVE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
