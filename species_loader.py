"""Loads species in the background, while the daemon already serves everything else.

Computing the vectors of a tree of life can take days on a board.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import label_cache
import machine
import tree_of_life
from engine import Engine, Stage
from errors import LabelError, SettingError
from label_cache import CacheKey, TextVectors
from labels import ENCODE_BATCH
from model import Model
from model_files import Encode, Say, encoder_of
from species import RECIPE, Species
from tasks import Models
from tree_of_life import Progress

log = logging.getLogger("lumen.species_loader")

RETRY_S = 600  # seconds after a failed download
MEASURE_S = 60  # seconds of computing before the decision
QUICK_S = 3600  # if computing takes less than so many seconds, nothing is downloaded
DOWNLOAD = "a download of 2.66 GB (about 4 min at 100 Mbit/s, 36 min at 10 Mbit/s)"
TEN_M, TWO_HUNDRED_M = tree_of_life.SOURCES


class SpeciesLoader:
    """Finds, fetches or computes the label set of `BIOCLIP_LABELS` for a model.

    docs/species-and-labels.md, "Where the species come from", says how it chooses if that is empty.
    """

    def __init__(self, source: str, model: Model, folder: Path, data_dir: Path, engine: Engine) -> None:
        """`folder` is for the vectors of this model. Published ones have a subfolder, so that both can be kept."""
        self._published_folder = folder / tree_of_life.PUBLISHED
        self._source, self._model, self._folder, self._data_dir, self._engine = source, model, folder, data_dir, engine
        self._through_engine = model.encoder(engine)

    def at_once(self, say: Say) -> Species | None:
        """The species, if they are kept or few; before the inference thread runs.

        Raises SettingError if the operator's file or folder cannot be used, otherwise LabelError.
        """
        backend, encode = self._model.backend, encoder_of(self._model.backend)
        if tree_of_life.is_folder(self._source):
            note = self._folder / label_cache.NOTE
            return self._species(tree_of_life.ready_made(Path(self._source), backend.dim, encode, note))
        if self._source in ("", TWO_HUNDRED_M):
            for folder in (self._published_folder, self._folder):  # an earlier version kept them in the latter
                if found := tree_of_life.kept(folder, self._wanted_200m(), encode):
                    return self._species(found)
            if self._source:
                return None
        path = tree_of_life.names_file(self._source, self._data_dir, say)
        wanted = self._wanted(RECIPE.name, machine.sha256_of(path))
        if found := tree_of_life.kept(self._folder, wanted, encode):
            return self._species(found)
        if len(tree_of_life.lineages_of(path, own=self._source not in ("", TEN_M))) > label_cache.SHARD_LABELS:
            return None
        doing = f"computing text vectors for {backend.model_id}"
        return self._computed(encode, lambda done, total: say(f"{doing}: {done} of {total} labels"))

    def in_background(self, models: Models, say: Say) -> None:
        """Adds the species to `models` when they are available. Reports the progress to `say`."""
        progress = models.progress = Progress(self._source or TEN_M, say)

        def load() -> None:
            while True:
                try:
                    species = self._load(progress)
                    break
                except Exception as error:
                    progress.failure = "not available; the daemon's log says why"
                    unknown = not isinstance(error, LabelError | SettingError)
                    log.warning("%s: %s", progress.name, error, exc_info=unknown)
                    time.sleep(RETRY_S)
                    progress.failure = ""
            models.add_species(species)
            if models.semantic != "bioclip":
                self._unload_text()
            say("serving")
            log.info("%s: ready", progress.name)

        log.info("%s is not available yet; everything else is served meanwhile", progress.name)
        threading.Thread(target=load, name="species", daemon=True).start()

    def _load(self, progress: Progress) -> Species:
        if self._source == TWO_HUNDRED_M:
            return self._published(progress)
        if self._source:
            return self._computed(self._through_engine, progress)
        patience: float = MEASURE_S
        while True:
            progress.begin(TEN_M)
            try:
                return self._computed(self._through_engine, self._until_slow(progress, patience))
            except _TooSlow:
                progress.begin(TWO_HUNDRED_M)
            try:
                return self._published(progress)
            except Exception as error:
                patience = max(RETRY_S, 2 * patience)
                text = "%s: %s; computing %s goes on, the next attempt is in %s"
                unknown = not isinstance(error, LabelError)
                log.warning(text, TWO_HUNDRED_M, error, TEN_M, tree_of_life.about(patience), exc_info=unknown)

    def _until_slow(self, report: label_cache.Progress, patience: float) -> label_cache.Progress:
        """Progress of computing that raises _TooSlow, once, if the rest takes long and TreeOfLife-200M can be used.

        Decides when labels have been computed for `patience` seconds, and logs what is chosen.
        """
        stage = self._model.background
        before: tuple[float, ...] = ()
        decided = False

        def measured(done: int, total: int) -> None:
            nonlocal before, decided
            report(done, total)
            now = (time.monotonic(), done, stage.ran_items, stage.ran_s, stage.alone_items, stage.alone_s)
            passed, labels, ran, ran_s, alone, alone_s = (a - b for a, b in zip(now, before or now, strict=True))
            if not before or ran < labels:  # some came from a saved shard: measuring begins after it
                before = now
            elif ran and passed >= patience and not decided:
                decided = True
                seconds = passed  # which counts tokenizing as well
                if alone < ran:  # other batches waited for requests, had one prompt, and shared the cores
                    ran, seconds = (alone, alone_s) if alone >= ENCODE_BATCH else (ran, ran_s)
                if self._is_slow((total - done) * seconds / ran):
                    raise _TooSlow

        return measured

    def _is_slow(self, left: float) -> bool:
        """Whether TreeOfLife-200M replaces computing that takes so many seconds; logs the choice in one line."""
        chosen, other = f"{TEN_M}, computed in {tree_of_life.about(left)}", f"{TWO_HUNDRED_M}, a JSON file or a folder"
        obstacle = ""
        if left < QUICK_S:
            reason = f"that is less than {QUICK_S // 60} min"
        elif obstacle := self._obstacle():
            reason = f"{TWO_HUNDRED_M} cannot be used, since {obstacle}"
        else:
            reason = f"computing {TEN_M} would take {tree_of_life.about(left)}"
            chosen, other = f"{TWO_HUNDRED_M}, {DOWNLOAD}", TEN_M
        text = "BIOCLIP_LABELS is not set; chosen: %s; reason: %s. To choose otherwise, set BIOCLIP_LABELS to %s"
        log.info(text, chosen, reason, other)
        return left >= QUICK_S and not obstacle

    def _obstacle(self) -> str:
        """Why TreeOfLife-200M cannot be used, or ""."""
        folder, model_id = self._published_folder, self._model.backend.model_id
        if label_cache.load_or_none(folder / label_cache.FILE, self._wanted_200m()):  # else `at_once` had used it
            return f"its vectors were tried, and are not those of {model_id}"
        return tree_of_life.published_obstacle(folder, model_id)

    def _wanted_200m(self) -> dict[str, Any]:
        return self._wanted(tree_of_life.PUBLISHED, tree_of_life.REVISION_200M)

    def _wanted(self, recipe: str, digest: str) -> dict[str, Any]:
        """What the meta of a fitting file contains, without the number of labels."""
        meta = CacheKey(self._model.backend.model_id, recipe, digest, 0, self._model.backend.dim).meta()
        del meta["count"]
        return meta

    def _computed(self, encode: Encode, tell: label_cache.Progress) -> Species:
        path, backend = tree_of_life.names_file(self._source, self._data_dir), self._model.backend
        return self._species(tree_of_life.computed(self._folder, path, backend.model_id, backend.dim, encode, tell))

    def _published(self, tell: label_cache.Progress) -> Species:
        backend = self._model.backend
        found = tree_of_life.published(self._published_folder, backend.model_id, tell)
        if found.vecs.shape[1] != backend.dim or not tree_of_life.belongs(found, self._through_engine):
            raise LabelError(f"its vectors are BioCLIP-2's, and not those of {backend.model_id}")
        return self._species(found)

    def _species(self, found: TextVectors) -> Species:
        backend = self._model.backend
        return Species(found, backend.logit_scale, backend.hold_rows(found.vecs))

    def _unload_text(self) -> None:
        """Unloads the text tower on the background thread, while the inference thread runs no batch."""

        def unload(items: list[Any]) -> list[Any]:
            self._model.backend.unload_text()
            return items

        self._engine.results_of(self._engine.add(Stage("bioclip unload", unload, 1, Stage.BACKGROUND)), [None])


class _TooSlow(Exception):
    """Raised while labels are computed, to use published vectors instead."""
