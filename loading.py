"""Species for a daemon that serves already: what is not there yet is fetched or computed in the background.

The vectors of a tree of life take a board days. They are computed by the engine in small batches that come after all
requests; `Models` has them from the moment they are whole.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import treeoflife
import vectorfile
import watch
from engine import Answer, Engine, Job, Line, Steps
from labels import LabelError, Vectors
from tasks import Model, Models
from taxa import RECIPE, Species
from vectorfile import TextVectors

log = logging.getLogger("lumen.loading")

RETRY_S = 600  # after a download that failed
STATUS_S = 10  # between two words on how far it is


class SpeciesLoader:
    """Finds, fetches or computes the label set of `BIOCLIP_LABELS` for a model."""

    def __init__(self, source: str, model: Model, folder: Path, data_dir: Path, engine: Engine) -> None:
        """`folder` keeps the vectors of this model."""
        self.name = source or treeoflife.SOURCES[0]
        self._source, self._model, self._folder, self._data_dir, self._engine = source, model, folder, data_dir, engine
        self._through_engine = model.encoder(engine)
        self._rest = engine.add(Line("bioclip rest", self._let_go, 1, Line.BACKGROUND))

    def at_once(self, say: Callable[[str], None]) -> Species | None:
        """The species, if they are there or few; before the inference thread runs. Raises LabelError."""
        backend = self._model.backend
        if treeoflife.is_folder(self._source):
            note = self._folder / vectorfile.NOTE
            return self._species(treeoflife.ready_made(Path(self._source), backend.dim, self._encode, note))
        if self._source == treeoflife.SOURCES[1]:
            recipe, digest = treeoflife.PUBLISHED, treeoflife.REVISION_200M
        else:
            path = treeoflife.names_file(self._source, self._data_dir, partial(watch.download, say))
            recipe, digest = RECIPE.name, treeoflife.sha256_of(path)
        wanted = treeoflife.wanted_of(backend.model_id, recipe, digest, backend.dim)
        if found := treeoflife.kept(self._folder, wanted, self._encode):
            return self._species(found)
        if recipe == treeoflife.PUBLISHED or treeoflife.count_of(path) > vectorfile.SHARD_LABELS:
            return None
        doing = f"computing text vectors for {backend.model_id}"
        return self._computed(self._encode, lambda done, total: say(f"{doing}: {done} of {total} labels"))

    def in_background(self, models: Models, say: Callable[[str], None]) -> None:
        """Gives `models` its species when they are there; `say` is told how far that is."""
        published = self._source == treeoflife.SOURCES[1]
        progress = models.progress = treeoflife.Progress(self.name, "MB" if published else "labels")
        said = [0.0]

        def tell(done: int, total: int) -> None:
            progress(done, total)
            if time.monotonic() - said[0] > STATUS_S:
                said[0] = time.monotonic()
                say(f"serving; {progress}")

        def load() -> None:
            while True:
                try:
                    models.add_species(
                        self._published(tell) if published else self._computed(self._through_engine, tell)
                    )
                except Exception as error:
                    progress.failure = "could not be had; the daemon's log says why"
                    known = isinstance(error, LabelError)
                    log.warning("%s: %s", self.name, error, exc_info=None if known else error)
                    time.sleep(RETRY_S)
                    progress.failure = ""
                else:
                    break
            self._rest_text()
            say("serving")
            log.info("%s: ready", self.name)

        log.info("%s is not here yet; the rest is served meanwhile", self.name)
        threading.Thread(target=load, name="species", daemon=True).start()

    def _computed(self, encode: Callable[[list[str]], Vectors], tell: vectorfile.Progress) -> Species:
        path, backend = treeoflife.names_file(self._source, self._data_dir), self._model.backend
        names, found = treeoflife.computed(self._folder, path, backend.model_id, backend.dim, encode, tell)
        return Species(names, found, backend.logit_scale)

    def _published(self, tell: vectorfile.Progress) -> Species:
        backend = self._model.backend
        found = treeoflife.published(self._folder, backend.model_id, tell)
        if found.vecs.shape[1] != backend.dim or not treeoflife.belongs(found, self._through_engine):
            raise LabelError(f"its vectors are BioCLIP-2's, and not those of {backend.model_id}")
        return self._species(found)

    def _species(self, found: TextVectors) -> Species:
        assert found.names is not None
        return Species(found.names, found, self._model.backend.logit_scale)

    def _encode(self, texts: list[str]) -> Vectors:
        return self._model.backend.encode_text(self._model.backend.tokenize(texts))

    def _rest_text(self) -> None:
        """In the engine's order, for the text tower is the inference thread's."""

        def steps() -> Steps:
            yield self._rest, [None]
            return Answer("", b"", {})

        job = Job("", "", 0)
        job.steps = steps()
        self._engine.submit(job)
        job.answer.result()

    def _let_go(self, items: list[Any]) -> list[None]:
        self._model.backend.rest_text()
        return [None for _ in items]
