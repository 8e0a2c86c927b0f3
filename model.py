"""A model that serves: its backend, its stages in the engine, its cache of texts, and its adaptation to the machine."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

import backends
import machine
from engine import Engine, Stage
from errors import BackendError
from model_files import Backend, Encode, Vectors
from tokenizer import true_length

log = logging.getLogger("lumen.model")

TEXTS_KEPT = 4096  # text vectors that are cached for each model, 2 to 3 KB each: clients repeat searches and labels
# Tokens. Batches of shorter texts are larger, up to four times: small matrices are less efficient (ViT-B-32 with ONNX
# Runtime, 7 tokens: 280 texts a second in batches of 8, 325 in batches of 32), and such a batch takes no longer than
# one of texts with 28 tokens.
SHORT_TEXT = 28
# Images in a batch on a GPU, unless the operator sets a limit. Raw ViT-B-32 was fastest with it on an NVIDIA H200. The
# tuning takes less where less is as fast, or where the memory does not suffice.
GPU_BATCH = 256
PAUSE_S = 10.0  # after the load, the session for single pictures is opened even if requests are in progress
FIRST_BATCH = 4  # images in a batch until the tuning has found a better size
BACKGROUND_BATCH = 4  # prompts; a search that arrives meanwhile waits for them


class Model:
    """A backend with its queues.

    Prompts are texts that are less urgent than a search. Prompts of a request wait among the images. Prompts of a label
    set that is built in the background run while no request is in progress, and otherwise for a twentieth of the time.
    """

    def __init__(self, backend: Backend, name: str, engine: Engine, batch_size: int) -> None:
        self.backend = backend
        self.tuning: backends.Tuning | None = None  # see `adapt`

        def rows_of(vectors: Vectors, items: list[Any]) -> list[Any]:
            expected = len(items), backend.dim
            if vectors.shape != expected:  # a fault of the runtime, which would mix up the answers
                raise RuntimeError(f"vectors of shape {vectors.shape}; expected {expected}")
            return list(vectors)

        def texts(items: list[Any]) -> list[Any]:
            return rows_of(backend.encode_text(np.array(items)), items)

        def share(tokens: Any) -> float:
            least = 0.25 if backend.open_length else 1.0
            return min(max(true_length(tokens[None]) / SHORT_TEXT, least), 1.0)

        self.image = engine.add(
            Stage(
                f"{name} image",
                lambda items: rows_of(backend.encode_images(backend.stack(items)), items),
                batch_size,
                Stage.BULK,
                spread=backend.workers > 1 and not backend.on_gpu,
                threads=backend.workers if backend.workers > 1 and backend.on_gpu else 0,
                tower=f"{name} image",
                journaled=True,
                run_single=lambda items: rows_of(backend.encode_single(np.array(items)), items),
            )
        )
        tower = f"{name} text"
        self.text = engine.add(Stage(tower, texts, batch_size, Stage.TEXT, share=share, tower=tower))
        self.prompts = engine.add(Stage(f"{name} prompts", texts, batch_size, Stage.BULK, share=share, tower=tower))
        self.background = engine.add(
            Stage(f"{name} background prompts", texts, BACKGROUND_BATCH, Stage.BACKGROUND, tower=tower)
        )
        self._known: OrderedDict[bytes, Any] = OrderedDict()  # tokens -> vector; only the engine's own thread uses it

    def adapt(self, folder: Path | None, engine: Engine, limit: int) -> None:
        """Adapts the model to this machine in the background, in moments without requests if there are any.

        `folder` keeps the tuning; without one, the batch size stays. `limit`: the most images in a batch that the
        operator allows; 0: GPU_BATCH on a GPU, elsewhere the batch size that the model has.
        """
        most = limit or (GPU_BATCH if self.backend.on_gpu else self.image.batch_size)

        def use(tuning: backends.Tuning) -> None:
            size, rate = tuning.batch_size, tuning.images_per_s
            log.info("%s: batches of up to %d images, %.1f images a second", self.backend.model_id, size, rate)
            self.tuning, self.image.batch_size = tuning, size
            for stage in (self.text, self.prompts):  # a text takes about as long as an image
                stage.batch_size = max(stage.batch_size, size)

        def measure() -> None:
            machine.lower_thread_priority(machine.WORKER_NICE)  # the threads of a session inherit it
            engine.wait_for_a_pause(PAUSE_S)
            try:
                self.backend.prepare_single()
            except BackendError as error:  # such as too little memory
                log.warning("a single picture runs on one core: %s", error)
            if folder and not self.tuning:
                use(backends.tune(self.backend, most, folder, engine.wait_for_a_pause))

        if folder and (kept := backends.kept_tuning(self.backend, most, folder)):
            use(kept)
        elif folder:
            self.image.batch_size = min(most, FIRST_BATCH)
        threading.Thread(target=measure, name="adapt", daemon=True).start()

    def facts(self) -> dict[str, str]:
        """The meta that every answer has."""
        return {"model_id": self.backend.model_id, "space": self.backend.space}

    def embed(self, tokens: Any, stage: Stage) -> Generator[Any, Any, list[Any]]:
        """Step: the vectors of token rows, int64 `[n, context_length]`. Cached ones are not computed again."""
        keys = [np.trim_zeros(row, "b").tobytes() for row in tokens]
        found = {key: self._known[key] for key in keys if key in self._known}
        missing = {key: row for key, row in zip(keys, tokens, strict=True) if key not in found}
        if missing:
            rows = yield stage, list(missing.values())
            # Copies: a row of a batch would keep the whole batch in memory.
            found.update((key, np.array(row)) for key, row in zip(missing, rows, strict=True))
        for key in keys:
            self._known[key] = found[key]
            self._known.move_to_end(key)
        while len(self._known) > TEXTS_KEPT:
            self._known.popitem(last=False)
        return [found[key] for key in keys]

    def encoder(self, engine: Engine) -> Encode:
        """Returns a function that encodes prompts in the background while the daemon serves. It blocks its thread."""

        def encode(texts: list[str]) -> Vectors:  # not cached: they are needed once
            return np.stack(engine.results_of(self.background, list(self.backend.tokenize(texts))))

        return encode
