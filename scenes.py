"""Scenes: what `smart_classify` tells apart, and which of it goes to BioCLIP.

TABLE is the whole of it, and a file in its place (LUMEN_SCENES) is read in the same form.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labels import LabelError
from labelsets import FILE_BYTES_MAX, LIST_MAX, Choices, ChoiceSet, parse_json, texts_in

SCENES_MAX = 256

# The first six names are upstream's own, which old clients compare by string. Prompts are worded as captions of CLIP's
# training are; README says how these were found and what they bring.
TABLE: dict[str, Any] = {
    "a photo of an animal": {"prompts": ["a photo of an animal", "a photo of a wild animal"], "species": True},
    "a photo of a bird": {"species": True},
    "a photo of an insect": {"prompts": ["a photo of an insect", "a photo of a bug"], "species": True},
    "a photo of a human-made object": {
        "prompts": ["a photo of a human-made object", "a close-up photo of a human-made object", "a photo of a tool"]
    },
    "a photo of a landscape": {},
    "an abstract painting": {},
    "a photo of a plant": {
        "prompts": ["a photo of a plant", "a photo of a flower", "a photo of a tree"],
        "species": True,
    },
    "a photo of a mushroom": {"species": True},
    "a photo of a person": {},
    "a photo of food": {},
    "a photo of a document": {"prompts": ["a photo of a page of text"]},
    "a photo of a room": {"prompts": ["a photo of the interior of a room"]},
}


@dataclass(frozen=True)
class Scenes:
    """A table that has been read."""

    choices: Choices
    species: frozenset[str]  # the names that go to BioCLIP


class SceneSet(ChoiceSet):
    """Scenes with their vectors."""

    def __init__(self, scenes: Scenes, vectors: Any, logit_scale: float) -> None:
        super().__init__(scenes.choices, vectors, logit_scale)
        self._species = scenes.species

    def settle(self, ranked: list[tuple[str, float]]) -> tuple[str, float] | None:
        """All scenes of a picture with their scores, best first -> its scene, or None if it goes to BioCLIP.

        It does if the scenes that go there are together likelier than the rest, even if one of the rest is likeliest.
        """
        rest = [(name, score) for name, score in ranked if name not in self._species]
        if sum(score for _, score in rest) < 0.5 or not rest:
            return None
        return rest[0]


def read_scenes(own: str) -> Scenes:
    """The table in the file `own`, or TABLE. Raises LabelError."""
    if not own:
        return parse(TABLE)
    try:
        with Path(own).open("rb") as file:
            return parse(parse_json(file.read(FILE_BYTES_MAX).decode("utf-8-sig")))
    except UnicodeDecodeError:
        raise LabelError(f"LUMEN_SCENES={own}: it is not UTF-8") from None
    except OSError as error:
        raise LabelError(f"LUMEN_SCENES={own}: {error.strerror or error}") from None
    except LabelError as error:
        raise LabelError(f"LUMEN_SCENES={own}: {error}") from None


def parse(content: Any) -> Scenes:
    """Raises LabelError."""
    if not isinstance(content, dict) or not 2 <= len(content) <= SCENES_MAX:
        raise LabelError(f"allowed: an object with 2 to {SCENES_MAX} scenes")
    rows, species = [], set()
    for name, scene in content.items():
        texts_in([name], "a scene's name", 1)
        if not isinstance(scene, dict) or not scene.keys() <= {"prompts", "species"}:
            raise LabelError(f"{name[:80]!r}: allowed: an object with prompts and species, if wanted")
        goes = scene.get("species", False)
        if not isinstance(goes, bool):
            raise LabelError(f"{name[:80]!r}: species: {str(goes)[:80]}; allowed: true, false")
        if goes:
            species.add(name)
        prompts = texts_in(scene.get("prompts", [name]), f"{name[:80]!r}: prompts", LIST_MAX)
        rows.append(tuple((prompt,) for prompt in prompts))
    return Scenes(Choices(tuple(content), tuple(rows)), frozenset(species))
