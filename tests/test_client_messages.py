"""What `client.py` says to people: what is wrong, and what to do."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from google.protobuf.empty_pb2 import Empty

import client
import client_connections
import client_files
import tasks
from tests.kit import DEMO, ROOT, Node, run_client, wait_until

PICTURES = DEMO / "pictures"
GARDEN = {
    "labels": {"small animal": ["a photo of a lady beetle", "a photo of a snail"], "bicycle": []},
    "none": ["a photo of a person", "a photo of a building", "a photo of food"],
    "threshold": 0.5,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A daemon with the demo model, two label sets that can be used, and one that cannot."""
    data = tmp_path_factory.mktemp("demo")
    (data / "labels").mkdir()
    (data / "labels" / "garden.json").write_text(json.dumps(GARDEN))
    (data / "labels" / "things.txt").write_text("a house\na bicycle\n")
    (data / "labels" / "wrong.json").write_text('{"labels": ["größer"], "größer": 1}', "utf-8")
    node = Node(data, ("--demo",)).ready()
    wait_until(lambda: node.stub.GetCapabilities(Empty()).extra["clip_label_sets"] == "garden,things")
    yield node
    assert node.stop() == 0, node.log


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for lumen.local, two CAs of which the first has signed it, and two tokens."""
    folder = tmp_path_factory.mktemp("certificates")
    authority, stranger = trustme.CA(), trustme.CA()
    made = authority.issue_cert("lumen.local")
    made.cert_chain_pems[0].write_to_path(str(folder / "server.pem"))
    made.private_key_pem.write_to_path(str(folder / "server.key"))
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    stranger.cert_pem.write_to_path(str(folder / "stranger.pem"))
    for name in ("token", "wrong"):
        (folder / name).write_text(f"a-{name}-that-nobody-guesses\n")
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def secured(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    tls = {"LUMEN_TLS_CERT": certificates / "server.pem", "LUMEN_TLS_KEY": certificates / "server.key"}
    data = tmp_path_factory.mktemp("secured")
    node = Node(data, ("--demo",), LUMEN_TOKEN_FILE=certificates / "token", **tls).ready()
    yield node
    assert node.stop() == 0, node.log


def line_of(run: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The one line that a failed run says."""
    assert run.returncode == status and run.stdout == "", run
    assert run.stderr.startswith("client.py: ") and run.stderr.count("\n") == 1, run.stderr
    return run.stderr


# --- addresses ---------------------------------------------------------------------------------------------------


def test_an_address_without_a_port_has_the_daemons_port(capsys: Any) -> None:
    """Lost otherwise: a daemon that is asked for at port 443, where gRPC looks by itself."""
    for given, full in (
        ("nas", "nas:50051"),
        ("192.168.1.20", "192.168.1.20:50051"),
        ("nas.local:50052", "nas.local:50052"),
        ("::1", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
        ("[::1]:50052", "[::1]:50052"),
        ("fe80::1%eth0", "[fe80::1%eth0]:50051"),
        ("[fe80::1%eth0]:5", "[fe80::1%eth0]:5"),
        ("dns:50052", "dns:50052"),
        ("dns:///nas:50052", "dns:///nas:50052"),  # gRPC's own forms
        ("unix:/run/lumen.sock", "unix:/run/lumen.sock"),
    ):
        assert client_connections.full_address(given) == full == client.LumenClient(given).address
    for wrong in (
        "",
        ":",
        "nas:",
        ":50051",
        "nas:x",
        "nas:0",
        "nas:65536",
        "a b",
        "::1:50051",
        "[nas]:1",
        "http://nas",
    ):
        with pytest.raises(client_files.UsageError, match=r"--address .*allowed: HOST, HOST:PORT or \[IPV6\]:PORT"):
            client_connections.full_address(wrong)
        assert client.main(["health", f"--address={wrong},nas"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"client.py: --address {wrong}: allowed: HOST")


def test_a_daemon_is_reached_by_its_bare_address(
    demo: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Lost otherwise: `--address nas`, and every network of IPv6."""
    host, _, port = demo.address.rpartition(":")
    monkeypatch.setattr(client_connections, "DEFAULT_PORT", int(port))
    assert client.main(["health", "--address", host]) == 0 and capsys.readouterr().out == "SERVING\n"
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    node = Node(tmp_path, ("--demo", "--host", "::1"))
    monkeypatch.setattr(client_connections, "DEFAULT_PORT", int(node.wait_for(r"port (\d+); loading")[1]))
    node.wait_for("ready: ")
    try:
        for address in ("::1", "[::1]", f"[::1]:{client_connections.DEFAULT_PORT}"):
            assert client.main(["health", "--address", address]) == 0 and capsys.readouterr().out == "SERVING\n"
    finally:
        assert node.stop() == 0


# --- connections -------------------------------------------------------------------------------------------------


def test_a_connection_that_fails_says_what_to_do(demo: Node, secured: Node, certificates: Path) -> None:
    """Lost otherwise: an evening with OpenSSL's names of errors."""
    ca, stranger, name = (
        ("--ca", str(certificates / "ca.pem")),
        ("--ca", str(certificates / "stranger.pem")),
        ("--server-name", "lumen.local"),
    )
    token, wrong = (("--token-file", str(certificates / name)) for name in ("token", "wrong"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    cases = (
        (secured.address, (), "if it uses TLS, give --ca FILE"),
        (demo.address, (*ca, *name), "the daemon does not use TLS; leave out --tls, --ca, --cert, --key and"),
        (secured.address, (*stranger, *name, *token), "not signed by the CA in --ca FILE; give the CA that"),
        (secured.address, (*name, *token), "not signed by a CA that this computer trusts; give --ca FILE"),
        (secured.address, (*ca, *token), "not for 127.0.0.1; give a name in it: --server-name NAME"),
        (secured.address, (*ca, "--server-name", "a.b", *token), "not for a.b; give a name in it: --server-name"),
        (secured.address, ("--ca", str(certificates / "token"), *name), "--key cannot be used; allowed: PEM"),
        (secured.address, (*ca, *name), "the daemon asks for a token; give --token-file FILE"),
        (secured.address, (*ca, *name, *wrong), "the daemon does not accept the token in --token-file FILE"),
        (nobody, (), f"client.py: nothing answers at {nobody}; is the daemon running?"),
        (nobody, (*ca, *name), f"client.py: nothing answers at {nobody}; is the daemon running?"),
    )
    for number, (address, options, said) in enumerate(cases):
        task = (("clip_embed", "a dog"), ("capabilities",))[number % 2]
        shown = line_of(run_client(*task, *options, address=address))
        assert said in shown and address in shown
    run = run_client("capabilities", *ca, *name, *token, address=secured.address)
    assert run.returncode == 0 and run.stderr == ""
    assert run_client("health", *ca, *name, *token, address=secured.address).stdout == "SERVING\n"


def test_a_daemon_that_wants_a_clients_certificate_says_so(certificates: Path, tmp_path: Path) -> None:
    """Lost otherwise: a client with TLS that is only told that a socket was closed."""
    tls = {"LUMEN_TLS_CERT": certificates / "server.pem", "LUMEN_TLS_KEY": certificates / "server.key"}
    node = Node(tmp_path, ("--demo",), LUMEN_TLS_CLIENT_CA=certificates / "ca.pem", **tls).ready()
    try:
        options = ("--ca", str(certificates / "ca.pem"), "--server-name", "lumen.local")
        said = line_of(run_client("clip_embed", "a dog", *options, address=node.address))
        assert "if it asks for a client certificate, give --cert FILE and --key FILE" in said
        own = ("--cert", str(certificates / "server.pem"), "--key", str(certificates / "server.key"))
        assert run_client("clip_embed", "a dog", *options, *own, address=node.address).returncode == 0
    finally:
        assert node.stop() == 0


def test_a_program_never_sends_its_token_unencrypted_to_another_machine() -> None:
    """Lost otherwise: the token of the library, to anybody on the network."""
    with pytest.raises(client.UsageError, match=r"without --tls the token would be sent unencrypted to 192\.0\.2\.7"):
        client.LumenClient("192.0.2.7", credentials=client.Credentials(token="a-token-that-nobody-guesses"))
    with pytest.raises(client.UsageError, match="printable ASCII"):
        client.LumenClient("localhost", credentials=client.Credentials(token="a token with spaces"))
    client.LumenClient("localhost", credentials=client.Credentials(token="a-token-with-a-newline\n")).close()
    authority = trustme.CA().cert_pem.bytes()
    for given in ({"ca": authority}, {"name": "lumen.local"}):
        assert client.Credentials(token="a-token-that-nobody-guesses", **given).uses_tls
        client.LumenClient("192.0.2.7", credentials=client.Credentials(token="a-token", **given)).close()


def test_a_row_says_which_rank_was_answered_and_how_many_names_are_unknown(demo: Node) -> None:
    """Lost otherwise: a misspelt name in `--within`, which nobody would notice."""
    options = ("--rank", "auto", "--within", "Animalia,Nessie", "--json")
    run = run_client("bioclip_classify", str(PICTURES / "fox.png"), *options, address=demo.address)
    row = json.loads(run.stdout)
    assert row["rank"] in client_files.RANKS and row["within_unknown"] == "1"
    run = run_client("bioclip_classify", str(PICTURES / "fox.png"), "--rank", "famly", address=demo.address)
    assert run.returncode == 2 and "argument --rank: invalid choice: 'famly'" in run.stderr


def test_an_option_that_the_daemon_refuses_is_one_line_for_a_whole_folder(demo: Node) -> None:
    """Lost otherwise: the one line that matters, among a thousand copies of it."""
    for option, said in (("--topk=0", "meta topk: '0'; allowed: "), ("--label-set=nothing", "meta label_set: ")):
        run = run_client("clip_classify", str(PICTURES), option, address=demo.address)
        assert run.returncode == 1 and said in run.stderr and run.stderr.count("client.py: ") == 1, run.stderr


@pytest.mark.parametrize("option", ["--token-file", "--ca"])
def test_a_file_that_is_missing_is_named_with_its_option(option: str, tmp_path: Path) -> None:
    """Lost otherwise: which of four options has the wrong path."""
    run = run_client("clip_embed", "a dog", option, str(tmp_path / "no"), address="127.0.0.1:9")
    said = f"client.py: {option} {tmp_path / 'no'}: No such file or directory\n"
    assert (run.returncode, run.stderr) == (2, said)


def test_a_daemon_that_still_loads_says_so(tmp_path: Path) -> None:
    """Lost otherwise: the patience of somebody whose daemon only needs another minute."""
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        endpoint = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
        options = {"CLIP_BACKEND": "onnxrt", "BIOCLIP_BACKEND": "none", "CLIP_MODEL": "hf-hub:org/model"}
        node = Node(tmp_path, **options, HF_ENDPOINT=endpoint).bound()
        node.wait_for("downloading org/model")
        for task in (("clip_embed", "a dog"), ("clip_classify", str(PICTURES / "fox.png")), ("capabilities",)):
            said = line_of(run_client(*task, address=node.address))
            assert "the daemon is still loading (loading hf-hub:org/model (onnxrt)); try again in a minute" in said
        assert run_client("health", address=node.address).stdout == "NOT_SERVING\n"
        assert node.stop() == 0


def test_programs_get_the_advice_and_what_grpc_said() -> None:
    """Lost otherwise: the one text that helps where the advice does not."""
    prefix = "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:50051: "
    plain, tls = client.Credentials(), client.Credentials(tls=True)
    for code, said, given, advice in (
        ("unavailable", f"{prefix}Failed to connect to remote host: No route to host", plain, "a:1 does not answer"),
        ("unavailable", f"{prefix}Failed to connect to remote host: Timeout occurred: FD Shutdown", plain, "a:1 does"),
        ("unavailable", f"{prefix}SSL: CERTIFICATE_VERIFY_FAILED: certificate has expired: OK", tls, "has expired"),
        (
            "unavailable",
            "errors resolving a:1: [field:hostname lookup error:...]",
            plain,
            "a:1 cannot be resolved; check",
        ),
        (
            "unavailable",
            "DNS resolution failed for a:1: C-ares status",
            plain,
            "a:1 cannot be resolved; check the name",
        ),
        ("unavailable", f"{prefix}something new", tls, f"{prefix}something new"),
        (
            "unavailable",
            "connections to all backends failing; last error: Connection refused",
            plain,
            "nothing answers at",
        ),
        ("unavailable", "Received http2 header with status: 503", plain, "no daemon behind a:1 is ready; try again"),
        ("unavailable", "Socket closed", plain, "closed the connection during the call (Socket closed); try again"),
        ("unknown", "Stream removed (Socket closed)", plain, "the daemon closed the connection during the call"),
        ("resource_exhausted", "64 Infer streams are open already; try later", plain, "64 Infer streams"),
    ):
        assert advice in client_connections.explain(code, said, "a:1", given)
    with client.LumenClient("127.0.0.1:9") as lumen, pytest.raises(client.LumenError) as error:
        lumen.capabilities()
    assert error.value.message == "nothing answers at 127.0.0.1:9; is the daemon running?"
    assert error.value.code == "unavailable" and "Connection refused" in error.value.detail


# --- options and inputs ------------------------------------------------------------------------------------------


def test_an_option_that_the_task_does_not_take_is_refused(capsys: Any) -> None:
    """Lost otherwise: an option that is ignored, and answers that look as if it were not."""
    for option, taking in client_files.OPTION_TASKS.items():
        flag = f"--{option.replace('_', '-')}"
        value = {"label_format": "common", "rank": "genus"}.get(option, "0.jsonl")
        for task in (*client_files.IMAGE_TASKS, *client_files.TEXT_TASKS, "capabilities", "health"):
            status = client.main([task, "x", flag, value, "--address", "127.0.0.1:9"])
            [line] = capsys.readouterr().err.splitlines()
            refused = f"client.py: {flag}: {task} does not take it; allowed: "
            assert (status == 2 and line.startswith(refused)) == (task not in taking), line
            assert task in taking or option == "out" or line.endswith(", ".join(taking))
    for flag, value, said in (
        ("--label-set", "garden", "--labels and --label-set: allowed: one of the two"),
        ("--rank", "genus", "--rank: clip_classify does not take it; allowed: bioclip_classify, smart_classify"),
    ):
        run = run_client("clip_classify", __file__, "--labels", "a,b", flag, value)
        assert line_of(run, 2) == f"client.py: {said}\n"
    assert "with --labels only" in line_of(run_client("clip_classify", __file__, "--prompt-template", "a {}"), 2)


def test_the_options_of_a_task_are_those_of_the_daemon() -> None:
    """Lost otherwise: an option that the client refuses although the daemon takes it."""
    for name, task in tasks.TASKS.items():
        expected = {"out", "topk"} if task.topk else {"out"}
        expected |= {"labels", "label_set", "min_score", "score"} if task.caller_labels else set()
        expected |= {"label_format", "rank", "within", "min_score"} if task.species else set()
        expected |= {"prompt_template"} if task.takes == "text" or task.caller_labels else set()
        assert {option for option, taking in client_files.OPTION_TASKS.items() if name in taking} == expected
        if task.takes == "text":
            assert tasks.TASKS[client_files.PICTURE_TASK_OF[name]].models == task.models


def test_a_picture_that_is_given_as_a_text_is_warned_of(demo: Node, tmp_path: Path) -> None:
    """Lost otherwise: an index of file names."""
    photos = [str(shutil.copy(PICTURES / "fox.png", tmp_path / name)) for name in ("a.jpg", "b.HEIC", "c.txt")]
    run = run_client("clip_embed", "a fox.jpg", "a dog" * 200 + ".jpg", *photos, address=demo.address)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 10
    hint = "the name is embedded as text; clip_image_embed embeds pictures"
    assert run.stderr.splitlines()[0] == f"client.py: {photos[0]} and 1 more: {hint}"
    run = run_client("bioclip_embed", photos[0], address=demo.address)
    hint = hint.replace("clip_", "bioclip_")
    assert run.returncode == 0 and run.stderr == f"client.py: {photos[0]}: {hint}\n"


@pytest.mark.parametrize("reads", [False, True])
def test_heic_files_of_a_folder_are_sent_or_counted(tmp_path: Path, reads: bool) -> None:
    """Lost otherwise: all pictures of a telephone, and nobody who knows."""
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import lumen_clip, tasks\n"
        "tasks.IMAGE_MIMES = tuple(mime for mime in tasks.IMAGE_MIMES if mime[-4:] not in ('heic', 'heif'))\n"
        f"tasks.IMAGE_MIMES += ('image/heic',) * {reads}; sys.exit(lumen_clip.main())"
    )
    album, only = tmp_path / "album", tmp_path / "album" / "only"
    only.mkdir(parents=True)
    names = ["album/a.heic", "album/b.png", "album/only/c.HEIF", "album/only/d.hif"]  # told by their content
    for name in names:
        shutil.copy(PICTURES / "fox.png", tmp_path / name)
    node = Node(tmp_path, ("--demo",), (sys.executable, "-c", program, str(ROOT))).ready()
    try:
        out = tmp_path / "v.jsonl"
        run = run_client("clip_image_embed", str(album), "--out", str(out), address=node.address)
        assert run.returncode == 0, run.stderr
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["input"] for row in rows] == [str(tmp_path / name) for name in (names if reads else names[1:2])]
        note = "client.py: 3 HEIC files were skipped: the daemon cannot read them; install pillow-heif beside it"
        assert [line for line in run.stderr.splitlines() if "HEIC" in line] == [note] * (not reads)
        run = run_client("clip_classify", str(only), address=node.address)
        if reads:
            assert run.returncode == 0 and len(run.stdout.splitlines()) == 12
        else:
            assert "2 HEIC files were skipped: the daemon cannot" in line_of(run, 2)
        # A file that is named by itself is sent in any case.
        assert run_client("clip_image_embed", str(only / "d.hif"), address=node.address).returncode == 0
    finally:
        assert node.stop() == 0
    assert "nothing answers at" in line_of(run_client("clip_classify", str(only), address=node.address))


# --- answers -----------------------------------------------------------------------------------------------------


def test_an_empty_answer_says_why(demo: Node) -> None:
    """Lost otherwise: an empty line, which looks like a fault."""
    house = str(PICTURES / "house.png")

    def ask(*arguments: str) -> str:
        run = run_client("clip_classify", house, *arguments, address=demo.address)
        assert run.returncode == 0 and run.stderr == "", run.stderr
        return run.stdout

    response = demo.ask("clip_classify", Path(house).read_bytes(), label_set="garden")
    none = float(response.meta["none_score"])
    assert ask("--label-set", "garden") == f"none of these ({none:.2f})\n" and none > 0.5
    row = json.loads(ask("--label-set", "garden", "--json"))
    assert row["labels"] == [] and row["none_score"] == none
    assert ask("--min-score", "1") == "no label reaches the minimum score\n"
    assert ask("--label-set", "things", "--min-score", "1") == "no label reaches the minimum score\n"
    assert "none_score" not in json.loads(ask("--json"))


def test_capabilities_list_the_label_sets(demo: Node) -> None:
    """Lost otherwise: the names that --label-set takes, and why a set cannot be used."""
    for encoding in ("utf-8", "ascii"):
        run = run_client("capabilities", address=demo.address, PYTHONIOENCODING=encoding)
        assert run.returncode == 0, run.stderr
        clip, bioclip = run.stdout.split("\nbioclip: ")
        assert clip.splitlines()[2:4] == ["  label set garden: 2 labels", "  label set things: 2 labels"]
        assert re.fullmatch(r"  label set wrong \(not usable\): .*", clip.splitlines()[4])
        assert "label set" not in bioclip


@pytest.mark.parametrize("suffix", [".jsonl", ".npz"])
def test_a_file_of_vectors_has_their_space(demo: Node, tmp_path: Path, suffix: str) -> None:
    """Lost otherwise: the one fact that says which vectors can be compared."""
    out = tmp_path / f"v{suffix}"
    run = run_client("clip_image_embed", str(PICTURES / "fox.png"), "--out", str(out), address=demo.address)
    assert run.returncode == 0, run.stderr
    extra = demo.stub.GetCapabilities(Empty()).extra
    expected = {"model_id": extra["clip_model"], "space": extra["clip_space"]}
    if suffix == ".npz":
        with np.load(out, allow_pickle=False) as file:
            assert {key: str(file[key]) for key in expected} == expected
    else:
        row = json.loads(out.read_text())
        assert {key: row[key] for key in expected} == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".npz"])
@pytest.mark.parametrize("spaces", [("a", "b"), ("", "")])
def test_a_file_never_has_vectors_of_two_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, suffix: str, spaces: tuple[str, str]
) -> None:
    """Lost otherwise: a search that finds nonsense, after a daemon was given another model in the middle of a run."""

    def answers(_: Any, requests: Any) -> Any:
        for number, _request in enumerate(requests):
            model = "mm" if spaces[0] else "mn"  # a space may have several models, and other servers know no space
            data = {"vector": [0.6, 0.8], "dim": 2, "model_id": model[number // 2]}
            yield client.Result("clip_embed", "", data, {"space": spaces[number // 2]})

    monkeypatch.setattr(client, "infer_many", answers)
    out = tmp_path / f"v{suffix}"
    assert client.main(["clip_embed", "one", "two", "three", "--out", str(out)]) == 1
    first, second = spaces if spaces[0] else ("m", "n")
    said = capsys.readouterr().err
    assert f"client.py: three: its vector is of the space {second}; those before it: {first}" in said
    assert not out.exists() and f"2 rows are in {tmp_path / f'v.partial{suffix}'}" in said


def test_a_program_can_use_a_label_set(demo: Node) -> None:
    """Lost otherwise: label sets and minimum scores, to everybody who uses the class."""
    fox, house = ((PICTURES / f"{name}.png").read_bytes() for name in ("fox", "house"))
    with client.LumenClient(demo.address) as lumen:
        [(best, score)] = lumen.classify(house, label_set="things", topk=1)
        assert best == "a house" and lumen.classify(house, label_set="garden") == []
        assert lumen.classify(house, label_set="things", min_score=score / 2)[0] == (best, score)
        assert lumen.classify(fox, "bioclip_classify", min_score=1) == []
        assert len(lumen.classify(fox, labels=["a fox", "a house"])) == 2
        with pytest.raises(client.LumenError, match="meta label_set: 'nowhere' is unknown; allowed: garden, things"):
            lumen.classify(fox, label_set="nowhere")
