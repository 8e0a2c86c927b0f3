"""What the daemon does not do for immich is forwarded to immich's own service, unchanged and streamed."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile import impatient, threads_and_files
from tests.immich import BOUNDARY, FACES, FakeImmich, Peer, form, image_form, send, text_form, vector
from tests.kit import LIMIT_S, Node, one_model, wait_until, write_labels
from tests.test_metrics import free_port

OCR = {"ocr": {"detection": {"modelName": "PP-OCRv5_mobile"}, "recognition": {"modelName": "PP-OCRv5_mobile"}}}


@pytest.fixture(scope="module")
def fallback() -> Iterator[FakeImmich]:
    made = FakeImmich()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, openai: Path, fallback: FakeImmich) -> Iterator[Node]:
    """A daemon with a fallback, and little patience with it; `node.port` is its port for immich."""
    folder = tmp_path_factory.mktemp("fallback")
    settings = one_model(openai, LUMEN_IMMICH_PORT=free_port(), LUMEN_IMMICH_FALLBACK=f"{fallback.url}/")
    settings |= {"LUMEN_MAX_REQUEST_MB": 4}
    settings |= impatient(folder, {"immich.FORWARD_S": 2, "immich.UPLOAD_S": 2, "immich.FORWARDED_MAX": 4})
    node = Node(write_labels(folder / "data", openai), **settings).ready()
    node.port = settings["LUMEN_IMMICH_PORT"]
    yield node
    assert node.stop() == 0 and "Traceback" not in node.log, node.log


@pytest.fixture(autouse=True)
def reset(fallback: FakeImmich) -> Iterator[None]:
    yield
    fallback.status, fallback.cut = 200, False
    fallback.may_end.set()


def test_faces_and_texts_in_pictures_are_forwarded_unchanged(node: Node, fallback: FakeImmich) -> None:
    """Lost otherwise: immich marks a server that fails one request as unhealthy for all of them."""
    for entries in (FACES, OCR):
        body = image_form(bytes(range(256)) * 2000, entries)
        status, reason, headers, answer = send(node.port, body, X_Trace="7", Accept="*/*")
        assert (status, reason, answer) == (200, "as it likes", b'{"facial-recognition":[]}')
        assert (headers["content-encoding"], headers["content-length"]) == ("deflate", "25")
        assert bytes(fallback.body) == body
        sent = dict(fallback.heads[-1])
        assert sent["Content-Type"] == f"multipart/form-data; boundary={BOUNDARY}"
        assert (sent["Content-Length"], sent["X-Trace"], sent["Accept"]) == (str(len(body)), "7", "*/*")
        assert sent["Host"] == fallback.url.removeprefix("http://") and sent["Via"].startswith("1.1 lumen-clip-")
        assert sent.keys() <= {"Host", "Content-Type", "Content-Length", "X-Trace", "Accept", "Via", "Accept-Encoding"}
    count = len(fallback.heads)
    assert vector(node.port, text_form("a dog")).shape == (64,)  # what is done here is not forwarded
    fallback.status = 500
    assert send(node.port, image_form(b"x", FACES))[:2] == (500, "as it likes")
    assert len(fallback.heads) == count + 1


def test_both_directions_are_streamed(node: Node, fallback: FakeImmich) -> None:
    """Lost otherwise: the memory of a board, to photographs that it only passes on."""
    fallback.may_end.clear()
    body = image_form(b"x" * 3_000_000, FACES)
    peer = Peer(node.port).begin(len(body), body[:1_000_000])
    wait_until(lambda: len(fallback.body) > 500_000)
    peer.socket.sendall(body[1_000_000:])
    response = http.client.HTTPResponse(peer.socket)
    response.begin()
    assert response.read1(100) == fallback.first
    fallback.may_end.set()
    assert response.read() == fallback.rest and bytes(fallback.body) == body
    peer.close()


def test_entries_after_the_image_are_found(node: Node, fallback: FakeImmich) -> None:
    """The order of the fields is not fixed by anything."""
    for size in (10, 300_000):
        body = form(("image", b"x" * size), ("entries", json.dumps(FACES)))
        assert send(node.port, body)[0] == 200 and bytes(fallback.body) == body
    assert vector(node.port, form(("text", "a dog"), ("entries", json.dumps(TEXT)))).shape == (64,)


TEXT = {"clip": {"textual": {"modelName": "ViT-B-32__openai"}}}


def test_a_fallback_that_breaks_off_is_not_a_whole_answer(node: Node, fallback: FakeImmich) -> None:
    """Lost otherwise: half a list of faces, or two responses in one."""
    fallback.cut = True
    with pytest.raises(http.client.IncompleteRead) as error:
        send(node.port, image_form(b"x", FACES))
    assert error.value.partial == fallback.first
    node.wait_for("a response of LUMEN_IMMICH_FALLBACK was cut off")
    assert vector(node.port, text_form("a dog")).shape == (64,)


def test_a_fallback_that_hangs_is_given_up_and_holds_up_nobody(node: Node, fallback: FakeImmich) -> None:
    """Lost otherwise: the search, to a service for faces that is stuck."""
    fallback.may_end.clear()
    body = image_form(b"x", FACES)
    peers = [Peer(node.port).begin(len(body), body) for _ in range(4)]
    wait_until(lambda: send(node.port, body)[0] == 503)  # one more than may be forwarded
    assert vector(node.port, text_form("a cat")).shape == (64,)
    for peer in peers:
        assert peer.is_closed(LIMIT_S)
    fallback.may_end.set()
    wait_until(lambda: send(node.port, body)[0] == 200)


def test_a_client_that_stops_or_sends_too_much_is_given_up(node: Node, fallback: FakeImmich) -> None:
    """Lost otherwise: the places of others."""
    assert vector(node.port, text_form("a dog")).shape == (64,)
    before = threads_and_files(node)
    body = image_form(b"x" * 2_000_000, FACES)
    silent = Peer(node.port).begin(len(body), body[:100_000])
    assert silent.is_closed(LIMIT_S)
    assert send(node.port, image_form(b"x" * 5_000_000, FACES))[0] == 413
    chunked = http.client.HTTPConnection("127.0.0.1", node.port, timeout=LIMIT_S)
    large = iter([image_form(b"", FACES)[:-50], *[b"x" * 100_000] * 60])
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    try:
        chunked.request("POST", "/predict", large, headers, encode_chunked=True)
        assert chunked.getresponse().status == 413
    except ConnectionError:
        pass  # the daemon refused the rest of the body and closed, before the client had sent all of it
    chunked.close()
    wait_until(lambda: all(now <= then + 2 for now, then in zip(threads_and_files(node), before, strict=True)))


def test_a_fallback_that_is_not_there_or_leads_back_is_named(tmp_path: Path, openai: Path) -> None:
    """Lost otherwise: an operator who looks for the fault in the wrong program."""
    port = free_port()
    for url, status, said in (
        ("http://127.0.0.1:9", 502, "'facial-recognition' could not be forwarded to LUMEN_IMMICH_FALLBACK"),
        (f"http://127.0.0.1:{port}", 508, "LUMEN_IMMICH_FALLBACK leads back to this daemon"),
    ):
        settings = one_model(openai, LUMEN_IMMICH_PORT=port, LUMEN_IMMICH_FALLBACK=url)
        node = Node(write_labels(tmp_path, openai), **settings).ready()
        try:
            assert send(port, image_form(b"x", FACES))[:2] == (status, said)
            if status == 502:
                node.wait_for(
                    r"LUMEN_IMMICH_FALLBACK=http://127.0.0.1:9: a request for 'facial-recognition' could not "
                )
        finally:
            assert node.stop() == 0
