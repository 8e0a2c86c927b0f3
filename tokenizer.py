"""Texts to token ids, equal to those of OpenCLIP. Thread-safe."""

from __future__ import annotations

import html
import json
import string
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errors import BackendError, one_line

Tokens = NDArray[np.int64]  # [n, context_length], padded
Clean = Callable[[str], str]


# --- cleaning ---------------------------------------------------------------------------------------------------


def clean_whitespace(text: str) -> str:
    """ftfy, HTML entities twice, single spaces."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def clean_lower(text: str) -> str:
    return clean_whitespace(text).lower()


_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def clean_canonicalize(text: str) -> str:
    """Like `clean_lower`, without ASCII punctuation. An underscore becomes a space."""
    return " ".join(clean_whitespace(text).translate(_NO_PUNCTUATION).lower().split())


# The values of `clean` in OpenCLIP's `tokenizer_kwargs`.
CLEANERS: dict[str, Clean] = {
    "canonicalize": clean_canonicalize,
    "lower": clean_lower,
    "whitespace": clean_whitespace,
}


# --- tokenizers -------------------------------------------------------------------------------------------------


class TextTokenizer:
    """Texts to token ids, for one text tower. A subclass makes the ids of one text."""

    highest_id: int  # of the vocabulary; the tower's embedding table must have a row for it
    _tokenizer: Any  # of the library `tokenizers`

    def __init__(self, context_length: int, clean: Clean) -> None:
        self.context_length, self._clean = context_length, clean

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """int64 `[n, context_length]`. Long texts are cut, and the end token is kept."""
        tokens = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = self._encode(self._clean(text))
            row[: len(ids)] = ids
        return tokens

    def _encode(self, text: str) -> list[int]:
        """The ids of a clean text, at most `context_length`. Zeros follow if there are fewer."""
        raise NotImplementedError

    def to_json(self) -> str:
        """The content of a `tokenizer.json` for `read_tokenizer`. It needs no `tokenizer_config.json`."""
        return str(self._tokenizer.to_str())


class ClipTokenizer(TextTokenizer):
    """CLIP's byte-pair tokenizer. It gives the same ids as OpenCLIP's SimpleTokenizer, at the speed of `tokenizers`.

    The normalizer of a CLIP `tokenizer.json` lacks ftfy, so it differs from OpenCLIP for curly quotes, HTML entities,
    ligatures, control characters and more. Therefore only the vocabulary and the merges are read from it. Cleaning and
    splitting are done here, as in OpenCLIP.
    """

    def __init__(
        self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], context_length: int, clean: Clean
    ) -> None:
        """Raises ValueError if the vocabulary is not CLIP's."""
        import regex
        from tokenizers import Tokenizer, models, pre_tokenizers

        super().__init__(context_length, clean)
        self._split = regex.compile(
            r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )
        self._start, self._end = _special_ids(vocab)
        self._specials = {"<start_of_text>": self._start, "<end_of_text>": self._end}
        self.highest_id = max(vocab.values())
        self._tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), end_of_word_suffix="</w>"))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def _encode(self, text: str) -> list[int]:
        """Start, tokens, end."""
        ids = [self._start]
        # Each word has at least one token, so more words than the context length are not needed.
        for match in islice(self._split.finditer(text), self.context_length):
            word = match.group()
            if word in self._specials:
                ids.append(self._specials[word])
            else:
                ids.extend(self._tokenizer.encode([word], is_pretokenized=True, add_special_tokens=False).ids)
        return [*ids[: self.context_length - 1], self._end]


def _special_ids(vocab: Mapping[str, int]) -> tuple[int, int]:
    for start, end in (("<start_of_text>", "<end_of_text>"), ("<|startoftext|>", "<|endoftext|>")):
        if start in vocab and end in vocab:
            return vocab[start], vocab[end]
    raise ValueError("the vocabulary lacks the start and end tokens of CLIP")


class HubTokenizer(TextTokenizer):
    """A tokenizer of the Hugging Face hub, as OpenCLIP's HFTokenizer uses it: Gemma's, T5's and others.

    Its steps are those of the `tokenizer.json`, the tokens at the start and the end of a text included. The padding
    token is named by the `tokenizer_config.json`.
    """

    def __init__(self, content: str, config: Mapping[str, Any], context_length: int, clean: Clean) -> None:
        """`content`: that of the `tokenizer.json`. Raises ValueError if it is not one, or if a token is missing."""
        from tokenizers import Tokenizer

        super().__init__(context_length, clean)
        try:
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(one_line(error)) from error
        self.highest_id = max(self._tokenizer.get_vocab().values())
        padding, truncation = self._tokenizer.padding or {}, self._tokenizer.truncation or {}
        named = config.get("pad_token") or padding.get("pad_token", "<pad>")
        pad = named["content"] if isinstance(named, dict) else named
        pad_id = self._tokenizer.token_to_id(pad)
        if pad_id is None:
            raise ValueError(f"the vocabulary lacks the padding token {pad!r}")
        side = config.get("padding_side") or padding.get("direction", "right")
        self._tokenizer.enable_padding(direction=side, pad_id=pad_id, pad_token=pad, length=context_length)
        side = config.get("truncation_side") or truncation.get("direction", "right")
        self._tokenizer.enable_truncation(context_length, direction=side)

    def _encode(self, text: str) -> list[int]:
        """Padded to the context length."""
        return list(self._tokenizer.encode(text).ids)  # `encode_batch` would start a thread for each core


# --- files ------------------------------------------------------------------------------------------------------


def read_tokenizer(path: Path, text_config: Mapping[str, Any], context_length: int) -> TextTokenizer:
    """Reads a `tokenizer.json`, and the `tokenizer_config.json` beside it if there is one.

    `text_config`: the `text_cfg` of the model, or {} if it is not known. As in OpenCLIP, `hf_tokenizer_name` says that
    the tokenizer is not CLIP's. Raises BackendError.
    """
    clean = cleaner_of(text_config, path.parent)
    try:
        content = path.read_text("utf-8")
        parsed = json.loads(content)
        model = parsed["model"]
        is_clip = model.get("end_of_word_suffix") == "</w>"
        name = text_config.get("hf_tokenizer_name", "")
        if text_config and is_clip == bool(name):
            kind, needed = ("CLIP's", name) if is_clip else ("not CLIP's", "CLIP's")
            raise BackendError(f"{path}: it is {kind} tokenizer, and the model needs {needed}")
        if is_clip:
            merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
            return ClipTokenizer(model["vocab"], merges, context_length, clean)
        beside = path.with_name("tokenizer_config.json")
        config = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
        return HubTokenizer(content, config, context_length, clean)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackendError(f"{path}: no tokenizer.json that can be used ({one_line(error)})") from error


def cleaner_of(text_config: Mapping[str, Any], where: object) -> Clean:
    """The cleaning that a `text_cfg` names, with OpenCLIP's defaults. Raises BackendError, which names `where`."""
    options = dict(text_config.get("tokenizer_kwargs") or {})
    clean = options.get("clean", "whitespace" if text_config.get("hf_tokenizer_name") else "lower")
    if clean not in CLEANERS:
        raise BackendError(f"{where}: clean={clean!r} in tokenizer_kwargs; allowed: {', '.join(CLEANERS)}")
    options |= {name: text_config.get(name) for name in ("tokenizer_mode", "hf_model_name")}
    for name in ("tokenizer_mode", "hf_model_name", "strip_sep_token", "language", "reduction_mask"):
        if options.get(name):
            raise BackendError(f"{where}: text towers with {name} ({options[name]!r}) are not supported")
    return CLEANERS[clean]


def is_cut_at_the_end(text_config: Mapping[str, Any]) -> bool:
    """Whether a text tower may run at a text's true length: it is causal, and pooled at the end token.

    `text_config`: the `text_cfg` of the model, or {} for CLIP's. Other towers run at their full context.
    """
    pooling = text_config.get("pool_type", "argmax")
    needs_all = any(text_config.get(name) for name in ("no_causal_mask", "embed_cls", "hf_tokenizer_name"))
    return pooling == "argmax" and not needs_all


def true_length(tokens: Tokens) -> int:
    """The length of the longest text of CLIP's tokenizer, end token included. The end token has the highest id.

    In a causal tower, tokens after the end token have no influence, so cutting them off is exact.
    """
    return int(tokens.argmax(axis=1).max()) + 1
