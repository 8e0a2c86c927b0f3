"""What immich's server sends, and the recipe by which immich's own service makes vectors."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import preprocess
from tests.kit import LIMIT_S, TINY, export_immich_from, pixels_of

MODEL = "ViT-B-32__openai"  # immich's default
BOUNDARY = "----formdata-undici-012345678901"
VISUAL = {"clip": {"visual": {"modelName": MODEL}}}
FACES = {
    "facial-recognition": {
        "detection": {"modelName": "buffalo_l", "options": {"minScore": 0.7}},
        "recognition": {"modelName": "buffalo_l"},
    }
}


def textual(language: str = "en", model: str = MODEL) -> dict[str, Any]:
    return {"clip": {"textual": {"modelName": model, "options": {"language": language}}}}


def form(*fields: tuple[str, str | bytes]) -> bytes:
    """A multipart form as Node's `fetch` sends it. Bytes are a Blob without a type."""
    body = b""
    for name, value in fields:
        content = value.encode() if isinstance(value, str) else value
        more = "" if isinstance(value, str) else '; filename="blob"\r\nContent-Type: application/octet-stream'
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def image_form(image: bytes, entries: Any = VISUAL) -> bytes:
    return form(("entries", json.dumps(entries)), ("image", image))


def text_form(text: str, entries: Any = None) -> bytes:
    return form(("entries", json.dumps(entries or textual())), ("text", text))


def send(port: int, body: bytes, path: str = "/predict", **headers: str) -> tuple[int, str, dict[str, str], bytes]:
    """(status, reason, headers in lower case, body) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        sent = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST" if body else "GET", path, body or None, sent if body else {})
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, answer.reason, found, answer.read()
    finally:
        connection.close()


def predict(port: int, body: bytes) -> dict[str, Any]:
    status, reason, _, answer = send(port, body)
    assert status == 200, (status, reason, answer)
    content: dict[str, Any] = json.loads(answer)
    return content


def vector(port: int, body: bytes) -> Any:
    return np.array(json.loads(predict(port, body)["clip"]), np.float32)


# --- immich's model folder, and its recipe ------------------------------------------------------------------------


def make_folder(tiny: Path, folder: Path) -> None:
    """The small trained model with OpenAI's activation (QuickGELU), in the form of immich's repositories on the hub."""
    import torch

    source = folder.parent / f"{MODEL}-source"
    shutil.copytree(tiny, source)
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (source / "open_clip_config.json").write_text(json.dumps(config))
    weights = torch.load(source / "open_clip_pytorch_model.bin")
    for name in weights:
        if ".mlp." in name:
            weights[name] *= 30 if "c_proj" in name else 3  # the small model hardly uses its activation
    torch.save(weights, source / "open_clip_pytorch_model.bin")
    export_immich_from(source, folder)
    path = folder / "textual" / "tokenizer.json"
    bpe = json.loads(path.read_text())["model"]
    split = {"type": "Split", "behavior": "Removed", "invert": True}
    split |= {"pattern": {"Regex": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"}}
    spaces = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    whole = {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, spaces, {"type": "Lowercase"}]},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": ["<|endoftext|>", bpe["vocab"]["<|endoftext|>"]],
            "cls": ["<|startoftext|>", bpe["vocab"]["<|startoftext|>"]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "model": {**bpe, "unk_token": "<|endoftext|>", "continuing_subword_prefix": ""},
    }
    path.write_text(json.dumps(whole))


def recipe_image(folder: Path, image: bytes) -> Any:
    """The vector of a picture by ONNX Runtime, as immich's service prepares it (read in its source)."""
    import onnxruntime

    recipe = json.loads((folder / "visual" / "preprocess_cfg.json").read_text())
    side, picture = recipe["size"], Image.open(io.BytesIO(image)).convert("RGB")
    longer = int(max(picture.size) / min(picture.size) * side)
    size = (side, longer) if picture.width < picture.height else (longer, side)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (int(length / 2 - side / 2) for length in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + side, top + side)), np.float32) / 255
    pixels = (pixels - np.array(recipe["mean"], np.float32)) / np.array(recipe["std"], np.float32)
    session = onnxruntime.InferenceSession(folder / "visual" / "model.onnx")
    return session.run(None, {"image": pixels.transpose(2, 0, 1)[None]})[0][0]


def other_activation(folder: Path, image: bytes) -> Any:
    """The vector of a picture by the same weights, with the activation that OpenAI's models do not have."""
    import open_clip
    import torch

    model = open_clip.CLIP(**TINY).eval()
    model.load_state_dict(torch.load(folder.parent / f"{MODEL}-source" / "open_clip_pytorch_model.bin"))
    pixels = preprocess.normalize(pixels_of(image)[None], preprocess.Preprocess())
    with torch.no_grad():
        return model.encode_image(torch.from_numpy(pixels), normalize=True).numpy()[0]


def recipe_text(folder: Path, text: str) -> Any:
    """The vector of a text: the folder's own tokenizer, 77 places, the rest filled up with the end token."""
    import onnxruntime
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    tokenizer.enable_padding(length=77, pad_token="<|endoftext|>", pad_id=tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.enable_truncation(max_length=77)
    ids = np.array([tokenizer.encode(" ".join(text.split())).ids], np.int32)
    session = onnxruntime.InferenceSession(folder / "textual" / "model.onnx")
    return session.run(None, {"text": ids})[0][0]


# --- immich's own service -----------------------------------------------------------------------------------------


class FakeImmich(ThreadingHTTPServer):
    """In the place of immich's own service: keeps what it is sent, and answers in two parts."""

    def __init__(self, status: int = 200, first: bytes = b'{"facial-', rest: bytes = b'recognition":[]}') -> None:
        self.status, self.first, self.rest = status, first, rest
        self.may_end = threading.Event()  # the second part is sent
        self.may_end.set()
        self.cut = False  # the connection is closed after the first part
        self.heads: list[list[tuple[str, str]]] = []
        self.body = bytearray()  # of the last request, as it arrives
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                fake.heads.append(list(self.headers.items()))
                del fake.body[:]
                left = int(self.headers.get("Content-Length", 1 << 60))  # in chunks: until it ends
                while left and (piece := self.rfile.read1(min(left, 65536))):
                    fake.body += piece
                    left -= len(piece)
                if left:
                    self.close_connection = True
                    return
                self.send_response(fake.status, "as it likes")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Encoding", "deflate")
                self.send_header("Content-Length", str(len(fake.first + fake.rest)))
                self.end_headers()
                self.wfile.write(fake.first)
                self.wfile.flush()
                if fake.may_end.wait(LIMIT_S) and not fake.cut:
                    self.wfile.write(fake.rest)
                else:
                    self.close_connection = True

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", "4")
                self.end_headers()
                self.wfile.write(b"pong")

            def log_message(self, *arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Peer:
    """A connection to the port for immich, on which one can stop in the middle."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S)

    def begin(self, size: int, first: bytes = b"", **headers: str) -> Peer:
        """Sends the head of a request with a body of `size` bytes, and the first of them."""
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        head += "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.socket.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode() + first)
        return self

    def answer(self) -> tuple[int, bytes]:
        response = http.client.HTTPResponse(self.socket)
        response.begin()
        return response.status, response.read()

    def is_closed(self, seconds: float) -> bool:
        """Whether the daemon ends the connection within so many seconds. What it sends before is ignored."""
        self.socket.settimeout(seconds)
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass  # a reset: the daemon has ended the connection while bytes were on their way to it
        return True

    def close(self) -> None:
        self.socket.close()
