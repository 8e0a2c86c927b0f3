"""The task table, the options of a request, and how each task is done.

A task is a generator: it yields the steps that it needs and returns its answer; see `engine`. TASKS is the only table
that routing, validation and capabilities read, so they always agree.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

import preprocess
from engine import TENSOR_MIME, Answer, Engine, Stage, Steps
from errors import BadInput, LabelError, NotReady
from label_files import OperatorSet, OperatorSets, SceneSet
from labels import LabelSet
from model import Model
from preprocess import BIOCLIP_TENSOR, SIGLIP_TENSOR, Preprocess
from settings import Settings
from species import LABEL_FORMATS, RANKS, Species, SpeciesOptions
from tree_of_life import Progress

TOPK_MAX = 1000  # labels of a classification; larger numbers are reduced to this
CALLER_LABELS_MAX = 256  # labels in the meta `labels` of a request
MIN_SCORE = 0.35  # the default `min_score` of `rank=auto`; the Lightroom plug-in LrGeniusAI uses the same
TAXA_MAX = 10_000  # names in `within`
LABEL_COST = 4096  # bytes of a caller's label, in addition to its text: token ids and a vector
TEXT_BYTES_MAX = 65_536  # bytes of a text. A tower reads at most 77 tokens; this limits the time for cleaning.

Answers = Callable[[Any, list[Any]], Sequence[Any]]  # vectors, float32 [b, dim], and options for each -> results


class Models:
    """The models and label sets that the tasks use. `clip` or `bioclip` is None if its backend is "none"."""

    def __init__(
        self,
        engine: Engine,
        clip: Model | None,
        bioclip: Model | None,
        sets: Mapping[str, LabelSet | Species],  # "classes", "scenes", "species"
        batch_size: int,
        operator_sets: OperatorSets | None = None,
        semantic: str = "",
    ) -> None:
        """`semantic`: the model of the `semantic_` tasks, "clip" or "bioclip", or "" for none."""
        self.clip, self.operator_sets, self.semantic = clip, operator_sets, semantic
        # The loaded models by their names in the task table. Those of the tasks in `offered()` are among them.
        self.loaded = {name: model for name, model in (("clip", clip), ("bioclip", bioclip)) if model}
        if semantic in self.loaded:
            self.loaded["semantic"] = self.loaded[semantic]
        species = sets.get("species")
        self.species = species if isinstance(species, Species) else None
        self.scenes = sets.get("scenes")
        self.progress: Progress | None = None  # of species that are not available yet
        self._engine, self._batch_size = engine, batch_size
        # By the name of a set; "own sets" are the operator's. An item is a vector with its options, as in
        # `LabelSet.answers`, `Species.answers` and `_operator_answers`.
        self.scoring = {name: self._stage(name, labelset.answers) for name, labelset in sets.items()}
        self.scoring["own sets"] = self._stage("own sets", _operator_answers)

    def replace_classes(self, classes: LabelSet) -> None:
        """Replaces the labels of `clip_classify` while the daemon serves."""
        self.scoring["classes"].run = _running(classes.answers)

    def add_species(self, species: Species) -> None:
        """Adds species while the daemon serves."""
        self.scoring["species"] = self._stage("species", species.answers)
        self.species, self.progress = species, None

    def available_species(self) -> Species:
        """Raises NotReady."""
        if self.species is None:
            raise NotReady(f"species are not available yet: {self.progress or 'loading'}")
        return self.species

    def _stage(self, name: str, answers: Answers) -> Stage:
        return self._engine.add(Stage(f"{name} scoring", _running(answers), self._batch_size, Stage.SCORING))

    def images_at_once(self) -> int:
        """The number of images in all batches that run at the same time, for the model with more of them."""
        return max([model.image.batch_size * model.backend.workers for model in self.loaded.values()], default=1)

    def offered(self) -> list[Task]:
        """The tasks that are available now."""
        return [task for task in TASKS.values() if self.offers(task)]

    def offers(self, task: Task) -> bool:
        return set(task.models) <= self.loaded.keys() and not (task.only_species and self.species is None)


def _running(answers: Answers) -> Callable[[list[Any]], Sequence[Any]]:
    """What a stage runs: each item is a vector with its options."""
    return lambda items: answers(np.stack([vector for vector, _ in items]), [options for _, options in items])


def _operator_answers(queries: Any, options: list[Any]) -> list[Any]:
    """Unit rows, and an operator's set with (k, min_score, bias) for each -> what `OperatorSet.answer` returns."""
    return [chosen.answer(query, *others) for query, (chosen, *others) in zip(queries, options, strict=True)]


@dataclass
class Request:
    """A complete request. `chunks` fills the first part, `read_meta` the second, `prepare` the third."""

    correlation_id: str
    task: str
    mime: str
    meta: Mapping[str, str]
    payload: bytes
    held: int = 0  # bytes that are reserved for the request until it is prepared

    topk: int = 0
    labels: tuple[str, ...] = ()
    label_set: str = ""
    score: str = "softmax"
    template: str = ""
    label_format: str = "lineage"
    rank: str = "species"
    min_score: float = 0.0
    within: tuple[str, ...] = ()  # taxa
    as_tensor: bool = False  # whether the answer is raw float32 instead of JSON

    rows: Any = None  # row numbers of the species in `within`, int64, ascending; None: all
    unknown_taxa: int = 0
    chosen_set: OperatorSet | None = None  # the set that `label_set` names
    image_size: tuple[int, int] = (0, 0)  # width and height as stored, in pixels; (0, 0) for a tensor or a text
    bias: float | None = None  # the model's, if `score` is "sigmoid"
    pixels: dict[str, Any] = field(default_factory=dict)  # model name -> uint8 [size, size, 3]
    tokens: Any = None  # int64 [n, context_length]: the text, or the labels of the request


def clip_classify(models: Models, request: Request) -> Steps:
    clip = models.loaded["clip"]
    [vector] = yield clip.image, [request.pixels["clip"]]
    meta = {"score": request.score}
    if chosen := request.chosen_set:
        options = (chosen, request.topk, request.min_score, request.bias)
        [(best, none)] = yield models.scoring["own sets"], [(vector, options)]
        meta |= {"label_set": chosen.name, "none_score": f"{none:.6f}"}
    elif request.labels:
        vectors = yield from clip.embed(request.tokens, clip.prompts)
        labelset = LabelSet(request.labels, np.stack(vectors), clip.backend.logit_scale)
        [best] = labelset.answers(vector[None], [(request.topk, request.bias)])
    else:
        [best] = yield models.scoring["classes"], [(vector, (request.topk, request.bias))]
    answer = _labels_answer([pair for pair in best if pair[1] >= request.min_score], clip, "clip_classification")
    answer.meta.update(meta)
    return answer


def bioclip_classify(models: Models, request: Request) -> Steps:
    bioclip = models.loaded["bioclip"]
    models.available_species()
    [vector] = yield bioclip.image, [request.pixels["bioclip"]]
    options = SpeciesOptions(request.topk, request.label_format, request.rank, request.min_score, request.rows)
    [found] = yield models.scoring["species"], [(vector, options)]
    answer = _labels_answer(found.labels, bioclip, "bioclip_classification")
    answer.meta["rank"] = found.rank
    if request.unknown_taxa:
        answer.meta["within_unknown"] = str(request.unknown_taxa)
    return answer


def smart_classify(models: Models, request: Request) -> Steps:
    clip = models.loaded["clip"]
    [vector] = yield clip.image, [request.pixels["clip"]]
    scenes = models.scenes
    assert isinstance(scenes, SceneSet)
    [best] = yield models.scoring["scenes"], [(vector, (len(scenes), None))]
    scene = scenes.resolve(best)
    if scene is None:
        return (yield from bioclip_classify(models, request))
    return _labels_answer([scene], clip, "scene_classification")


def embed_image(name: str, models: Models, request: Request) -> Steps:
    model = models.loaded[name]
    [vector] = yield model.image, [request.pixels[name]]
    return _embedding_answer(vector, model, request)


def embed_text(name: str, models: Models, request: Request) -> Steps:
    model = models.loaded[name]
    [vector] = yield from model.embed(request.tokens, model.text)
    return _embedding_answer(vector, model, request)


def _labels_answer(best: list[tuple[str, float]], model: Model, source: str) -> Answer:
    rows = [{"label": label, "score": score} for label, score in best]
    content = {"labels": rows, "model_id": model.backend.model_id}
    return Answer("labels_v1", content, {**model.facts(), "labels_count": str(len(rows)), "source": source})


def _embedding_answer(vector: Any, model: Model, request: Request) -> Answer:
    meta = {**model.facts(), "dim": str(len(vector))}
    if request.as_tensor:
        # The Lumen SDK has no name for the layout of a vector. Its own tests describe a vector as NCHW [1, dim].
        form = {"dtype": "fp32", "shape": f"[1,{len(vector)}]", "layout": "NCHW", "format": "contiguous"}
        form |= {"byte_order": "little"}
        meta |= {"lumen.output.kind": "tensor"} | {f"lumen.output.tensor.{key}": value for key, value in form.items()}
        return Answer("", vector.astype("<f4").tobytes(), meta)
    # A copy: a row would keep its whole batch in memory until the client reads the response.
    content = {"vector": vector.copy(), "dim": len(vector), "model_id": model.backend.model_id}
    return Answer("embedding_v1", content, meta)


IMAGE_MIMES: tuple[str, ...] = ("image/jpeg", "image/png", "image/webp")
if "AVIF" in preprocess.IMAGE_FORMATS:
    IMAGE_MIMES += ("image/avif",)
if "HEIF" in preprocess.IMAGE_FORMATS:
    IMAGE_MIMES += ("image/heic", "image/heif")
TEXT_MIMES = ("text/plain", "text/markdown", "text/html")


@dataclass(frozen=True)
class Task:
    """A row of the task table: input, output, defaults and limits."""

    name: str
    run: Callable[[Models, Request], Steps]
    models: tuple[str, ...]  # that must be loaded; the capability of the first one lists the task
    takes: str  # "image" or "text"
    topk: int = 0  # the default; 0: not a classification
    caller_labels: bool = False
    species: bool = False  # takes `label_format`, `rank`, `min_score` and `within`
    only_species: bool = False  # the task is offered only when the species are available
    tensor: str = ""  # takes ready-made tensors of this preprocessing, if it is the model's; see `tensor_id`

    def tensor_id(self, recipe: Preprocess) -> str:
        """The id of the tensors that it takes with a model's preprocessing, or "" for none."""
        return self.tensor if self.tensor == recipe.tensor_id else ""

    @property
    def schema(self) -> str:
        return "labels_v1" if self.topk else "embedding_v1"


TASKS = {
    task.name: task
    for task in (
        Task("clip_classify", clip_classify, ("clip",), "image", topk=5, caller_labels=True),
        Task("clip_embed", partial(embed_text, "clip"), ("clip",), "text"),
        Task("clip_image_embed", partial(embed_image, "clip"), ("clip",), "image"),
        Task("smart_classify", smart_classify, ("clip", "bioclip"), "image", topk=3, species=True),
        Task(
            "bioclip_classify",
            bioclip_classify,
            ("bioclip",),
            "image",
            topk=3,
            species=True,
            only_species=True,
            tensor=BIOCLIP_TENSOR,
        ),
        Task("bioclip_embed", partial(embed_text, "bioclip"), ("bioclip",), "text"),
        Task("bioclip_image_embed", partial(embed_image, "bioclip"), ("bioclip",), "image", tensor=BIOCLIP_TENSOR),
        # Newer photo apps search with these tasks; see LUMEN_SEMANTIC.
        Task("semantic_image_embed", partial(embed_image, "semantic"), ("semantic",), "image", tensor=SIGLIP_TENSOR),
        Task("semantic_text_embed", partial(embed_text, "semantic"), ("semantic",), "text"),
    )
}
TOPK_KEYS = ("TopK", "topK", "top_k", "top-k", "lumen.top_k", "topk")


def find_task(models: Models, name: str) -> Task:
    """The task that a request names. Raises BadInput, or NotReady if the task will be available later."""
    task = TASKS.get(name)
    if task and models.offers(task):
        return task
    if task and task.only_species and models.progress:
        models.available_species()
    reason = "switched off by the daemon's settings" if task else "unknown"
    available = ", ".join(task.name for task in models.offered())
    raise BadInput(f"task: {name[:80]!r} is {reason}; allowed: {available}")


def read_meta(task: Task, request: Request) -> None:
    """Checks a request against the row of its task and fills in its options. Raises BadInput, which names the field."""
    base = request.mime.partition(";")[0].strip().lower()
    fits = base.startswith("text/") if task.takes == "text" else base.startswith("image/") or base == TENSOR_MIME
    if base and not fits:
        allowed = TEXT_MIMES if task.takes == "text" else (*IMAGE_MIMES, TENSOR_MIME)
        raise BadInput(f"payload_mime: {request.mime[:80]!r}; {task.name} takes {', '.join(allowed)}")
    if not request.payload:
        raise BadInput("payload: it is empty")
    meta = request.meta
    if task.topk:
        request.topk = next((_topk(key, meta[key]) for key in TOPK_KEYS if key in meta), task.topk)
    if task.caller_labels:
        request.label_set = meta.get("label_set", "")
        request.score = _one_of("score", meta.get("score", request.score), ("softmax", "sigmoid"))
        request.min_score = _min_score(meta, 0.0)
        if "labels" in meta:
            if request.label_set:
                raise BadInput("meta label_set: it is given with labels; allowed: one of the two")
            request.labels = _caller_labels(meta["labels"])
    if task.takes == "text" or request.labels:
        request.template = meta.get("prompt_template", "a photo of a {}." if request.labels else "{}")
        if request.template.count("{}") != 1 or len(request.template) > 1000:
            raise BadInput("meta prompt_template: allowed: a text with one {} in it, of at most 1000 characters")
    if not task.topk:
        kind = meta.get("lumen.output.kind", "") or "json"
        request.as_tensor = _one_of("lumen.output.kind", kind, ("json", "tensor")) == "tensor"
    if task.species:
        request.label_format = _one_of("label_format", meta.get("label_format", request.label_format), LABEL_FORMATS)
        request.rank = _one_of("rank", meta.get("rank", request.rank), (*RANKS, "auto"))
        request.min_score = _min_score(meta, MIN_SCORE if request.rank == "auto" else 0.0)
        if "within" in meta:
            request.within = _taxa(meta["within"])


def _one_of(key: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise BadInput(f"meta {key}: {value[:80]!r}; allowed: {', '.join(allowed)}")
    return value


def _min_score(meta: Mapping[str, str], default: float) -> float:
    text = meta.get("min_score", str(default))
    try:
        value = float(text) if len(text) < 40 else math.nan
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise BadInput(f"meta min_score: {text[:80]!r}; allowed: a number from 0 to 1")
    return value


_SPACE = r"[ \t\r\n]*+"
_FIRST = re.compile(rf'{_SPACE}\[{_SPACE}(?=")')
_NEXT = re.compile(rf'{_SPACE},{_SPACE}(?=")')
_END = re.compile(rf"{_SPACE}\]{_SPACE}")


def _json_strings(text: str, limit: int) -> list[str] | None:
    """Parses a JSON list of 1 to `limit` strings. Returns None for anything else, also for lone surrogates.

    It parses one string at a time, because parsing a megabyte of other JSON would block all other threads.
    """
    found: list[str] = []
    decode = json.JSONDecoder().raw_decode
    before, at = _FIRST.match(text), 0
    while before and len(found) < limit:
        try:
            string, at = decode(text, before.end())
            string.encode()
        except ValueError:
            return None
        found.append(string)
        before = _NEXT.match(text, at)
    return found if found and _END.fullmatch(text, at) else None


def _taxa(text: str) -> tuple[str, ...]:
    """Parses a JSON list of names, or names separated by commas. Raises BadInput."""
    names = _json_strings(text, TAXA_MAX) if text.lstrip().startswith("[") else text.split(",", TAXA_MAX)
    if names is None or not 1 <= len(names) <= TAXA_MAX or not all(0 < len(name.strip()) <= 500 for name in names):
        raise BadInput(
            f"meta within: allowed: 1 to {TAXA_MAX} taxa, as a JSON list or with commas between them, each a lineage "
            'such as "Animalia/Chordata/Aves", a name such as "Aves", or a binomial'
        )
    return tuple(dict.fromkeys(name.strip() for name in names))


def _topk(key: str, text: str) -> int:
    number = text.strip()
    digits = number.lstrip("0") if number.isascii() and number.isdigit() else ""
    if not digits:
        raise BadInput(f"meta {key}: {text[:80]!r}; allowed: a whole number from 1 (at most {TOPK_MAX} are returned)")
    # int() raises for texts of more than 4,300 digits, leading zeros included.
    return TOPK_MAX if len(digits) > len(str(TOPK_MAX)) else min(int(digits), TOPK_MAX)


def _caller_labels(text: str) -> tuple[str, ...]:
    found = _json_strings(text, CALLER_LABELS_MAX)
    if not found or not all(label.strip() and len(label) <= 1000 for label in found):
        raise BadInput(
            f"meta labels: allowed: a JSON list of 1 to {CALLER_LABELS_MAX} texts, none blank or over 1000 characters"
        )
    return tuple(dict.fromkeys(found))


def prepared_bytes(task: Task, request: Request, models: Models) -> int:
    """Bytes of the prepared input, which stay in memory until the response; before `prepare` has run, the most.

    0 for a text, because its token ids are small.
    """
    if task.takes == "text":
        return 0
    pixels = sum([3 * models.loaded[name].backend.preprocess.size ** 2 for name in task.models])
    everything = len(models.species or ()) if request.within else 0
    rows = everything if request.rows is None else len(request.rows)
    return pixels + 8 * rows + 4 * sum(map(len, request.labels)) + LABEL_COST * len(request.labels)


def prepare(task: Task, request: Request, models: Models, settings: Settings, room: preprocess.Room) -> None:
    """Turns the payload into the input of the models: pixels for each, or token ids. Raises BadInput or NotReady.

    `room(pixels)`: a context that reserves memory while an image with so many pixels is decoded.
    """
    if task.takes == "text":
        if len(request.payload) > TEXT_BYTES_MAX:
            raise BadInput(f"payload: a text of {len(request.payload)} bytes; allowed: {TEXT_BYTES_MAX}")
        try:
            text = request.payload.decode("utf-8")
        except UnicodeDecodeError:
            raise BadInput("payload: the text is not UTF-8") from None
        if not text.strip():
            raise BadInput("payload: the text is blank")
        prompt = request.template.replace("{}", text)
        request.tokens = models.loaded[task.models[0]].backend.tokenize([prompt])
        return
    if request.within:
        request.rows, unknown = models.available_species().tree.within(request.within)
        request.unknown_taxa = len(unknown)
        if not len(request.rows):
            raise BadInput(f"meta within: none of these names is in the species list: {', '.join(unknown)[:200]}")
    if request.score == "sigmoid":
        backend = models.loaded["clip"].backend
        request.bias = backend.logit_bias
        if request.bias is None:
            raise BadInput(f"meta score: 'sigmoid'; {backend.model_id} has no bias; allowed: softmax")
    if request.label_set:
        request.chosen_set = _operator_set(request, models)
    recipes = {name: models.loaded[name].backend.preprocess for name in task.models}
    request.pixels = _pixels(task, request, recipes, settings, room)
    if request.labels:
        prompts = [request.template.replace("{}", label) for label in request.labels]
        request.tokens = models.loaded["clip"].backend.tokenize(prompts)


def _operator_set(request: Request, models: Models) -> OperatorSet:
    """The set that the request names, as it is now; a later reload does not affect this request. Raises BadInput."""
    try:
        if models.operator_sets is None:
            raise LabelError("there are no label sets here")
        chosen = models.operator_sets.get(request.label_set)
    except LabelError as error:
        raise BadInput(f"meta label_set: {error}") from None
    if "min_score" not in request.meta and request.score == "softmax":  # the file's threshold is one for a softmax
        request.min_score = chosen.threshold
    return chosen


def _pixels(
    task: Task, request: Request, recipes: Mapping[str, Preprocess], settings: Settings, room: preprocess.Room
) -> dict[str, Any]:
    kind = request.meta.get("lumen.input.kind", "") or "raw"
    if kind == "raw":
        limit, draft = settings.lumen_max_megapixels * 1_000_000, settings.lumen_jpeg_draft
        sized = partial(setattr, request, "image_size")
        pictures = preprocess.decode_image(request.payload, set(recipes.values()), limit, draft, room, sized)
        return {name: pictures[recipe] for name, recipe in recipes.items()}
    recipe = recipes[task.models[0]]
    takes_tensors = task.tensor_id(recipe)
    if kind != "tensor" or not takes_tensors:
        allowed = "raw, tensor" if takes_tensors else "raw"
        raise BadInput(f"meta lumen.input.kind: {kind[:80]!r}; {task.name} takes {allowed}")
    return {task.models[0]: preprocess.pixels_from_tensor(request.payload, request.meta, recipe)}
