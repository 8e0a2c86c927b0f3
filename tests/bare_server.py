"""A server with nothing but gRPC, protobuf, Pillow and orjson: what these alone cost for a picture.

It decodes each picture as the daemon does, sleeps in place of the model, and answers with a vector. See
`test_global_lock`.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import orjson
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gen import ml_service_pb2 as pb
from gen import ml_service_pb2_grpc as pb_grpc

SIDE = 224
VECTOR = np.full(512, 512**-0.5, np.float32)
META = {"model_id": "none", "space": "0" * 12, "dim": "512", "lat_ms": "1"}


def pixels(file: bytes) -> Any:
    image: Image.Image = Image.open(io.BytesIO(file), formats=("JPEG", "PNG", "WEBP"))
    image.draft(None, (2 * SIDE, 2 * SIDE))
    image.load()
    image.getexif().get(0x0112, 1)
    scale = SIDE / min(image.size)
    image = image.resize((int(scale * image.width), int(scale * image.height)), Image.Resampling.BICUBIC)
    left, top = (round((length - SIDE) / 2) for length in image.size)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


class Bare(pb_grpc.InferenceServicer):
    def __init__(self, decode_s: float, model_s: float) -> None:
        self._decode_s, self._model_s = decode_s, model_s

    def Infer(self, requests: Iterator[pb.InferRequest], _: Any) -> Iterator[pb.InferResponse]:
        for request in requests:
            time.sleep(self._decode_s)
            np.stack([pixels(request.payload)])
            time.sleep(self._model_s)
            content = {"vector": VECTOR, "dim": len(VECTOR), "model_id": "none"}
            result = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
            mime, schema = "application/json;schema=embedding_v1", "embedding_v1"
            yield pb.InferResponse(
                correlation_id=request.correlation_id,
                is_final=True,
                result=result,
                meta=META,
                total=1,
                result_mime=mime,
                result_schema=schema,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("decode_s", type=float)
    parser.add_argument("model_s", type=float)
    parser.add_argument("--host")
    parser.add_argument("--port")
    options = parser.parse_args()
    server = grpc.server(futures.ThreadPoolExecutor(32))
    pb_grpc.add_InferenceServicer_to_server(Bare(options.decode_s, options.model_s), server)
    port = server.add_insecure_port(f"{options.host}:{options.port}")
    server.start()
    print(f"listening on {options.host} port {port}", "ready: ", sep="\n", file=sys.stderr, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
