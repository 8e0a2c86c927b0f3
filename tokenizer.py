"""Texts to token ids, equal to those of OpenCLIP. Thread-safe."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from errors import BackendError

Tokens = NDArray[np.int64]  # [n, context_length], padded with 0


class ClipTokenizer:
    """CLIP's byte-pair tokenizer. It gives the same ids as OpenCLIP's SimpleTokenizer, at the speed of `tokenizers`.

    The normalizer of a CLIP `tokenizer.json` lacks ftfy, so it differs from OpenCLIP for curly quotes, HTML entities,
    ligatures, control characters and more. Therefore only the vocabulary and the merges are read from it. Cleaning and
    splitting are done here, as in OpenCLIP.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], context_length: int = 77) -> None:
        import regex
        from tokenizers import Tokenizer, models, pre_tokenizers

        self.context_length = context_length
        self._split = regex.compile(
            r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )
        self.start, self.end = _special_ids(vocab)
        self._specials = {"<start_of_text>": self.start, "<end_of_text>": self.end}
        bpe = models.BPE(vocab=dict(vocab), merges=list(merges), end_of_word_suffix="</w>")
        self._bpe = Tokenizer(bpe)
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    @classmethod
    def from_file(cls, path: Path, context_length: int) -> ClipTokenizer:
        """Reads a CLIP `tokenizer.json`. Raises BackendError if it is missing or of another kind."""
        try:
            model = json.loads(path.read_text("utf-8"))["model"]
            vocab, merges = model["vocab"], [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
            if model.get("end_of_word_suffix") != "</w>":
                raise BackendError(f"{path}: not a CLIP byte-pair tokenizer, which alone is supported")
            return cls(vocab, merges, context_length)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(f"{path}: no CLIP tokenizer.json ({error})") from error

    def to_json(self) -> str:
        """The content of a `tokenizer.json` for `from_file`."""
        return str(self._bpe.to_str())

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """int64 `[n, context_length]`: start, tokens, end, then zeros. Long texts are cut before the end token."""
        tokens = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self.start, *self._encode(clean_text(text)), self.end][: self.context_length]
            ids[-1] = self.end
            row[: len(ids)] = ids
        return tokens

    def _encode(self, text: str) -> list[int]:
        # Each word has at least one token, so more words than the context length are not needed.
        words = (match.group() for match in islice(self._split.finditer(text), self.context_length))
        ids: list[int] = []
        for word in words:
            if word in self._specials:
                ids.append(self._specials[word])
            else:
                ids.extend(self._bpe.encode([word], is_pretokenized=True, add_special_tokens=False).ids)
        return ids


def _special_ids(vocab: Mapping[str, int]) -> tuple[int, int]:
    for start, end in (("<start_of_text>", "<end_of_text>"), ("<|startoftext|>", "<|endoftext|>")):
        if start in vocab and end in vocab:
            return vocab[start], vocab[end]
    raise ValueError("the vocabulary lacks the start and end tokens of CLIP")


def clean_text(text: str) -> str:
    """OpenCLIP's `clean="lower"`: ftfy, HTML entities twice, single spaces, lower case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def true_length(tokens: Tokens) -> int:
    """The length of the longest text, end token included. The end token has the highest id.

    In a causal tower, tokens after the end token have no influence, so cutting them off is exact.
    """
    return int(tokens.argmax(axis=1).max()) + 1
