"""Words to numbers, with a vocabulary of the training rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Annotated

import numpy as np
from annotated_types import Ge

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, Transform
from hasten.data.transforms import checks

PADDING, UNKNOWN = 0, 1
SPECIAL = 2
"""How many ids stand for no word."""


@dataclass(frozen=True, kw_only=True)
class Tokens(Transform):
    """A text to the numbers of its first `length` words, (B, length), and a mask (B, length), both int64.

    0 is padding and 1 a word that is not in the vocabulary; the words have 2 and more, the commonest first. The mask is
    1 where there is a word. An empty text counts as one unknown word, so that no mask is all 0.

    Attributes:
        column: of texts; the columns `ids` and `mask` take its place.
        vocabulary_size: how many ids there are at most, padding and the unknown word included.
        length: words of a text that are kept, and the width of both columns.
        lowercase: whether upper and lower case are the same.
        pattern: regular expression of a word; the default takes runs of letters and digits, and punctuation one by one.
        vocabulary: the words; None: the commonest of the training rows, equally common ones in alphabetical order.
        dynamic_length: whether the model is to take shorter rows too, from callers that make the numbers themselves.
            Rows that come through here are all `length` wide, so that what is deployed is what was measured.
        ids, mask: names of the new columns.
    """

    column: str
    vocabulary_size: Annotated[int, Ge(3)] = 8000
    length: Annotated[int, Ge(1)] = 32
    lowercase: bool = True
    pattern: str = r"\w+|[^\w\s]"
    vocabulary: tuple[str, ...] | None = None
    dynamic_length: bool = True
    ids: str = "ids"
    mask: str = "mask"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"pattern must be a regular expression, got {self.pattern!r}: {error} (Tokens.pattern)"
            ) from error

    def fit(self, columns: Columns) -> Tokens:
        return self.fit_pieces([columns])

    def fit_pieces(self, pieces: Iterable[Columns]) -> Tokens:
        if self.vocabulary is not None:
            return self
        counts = Counter[str]()
        first = 0
        for columns in pieces:
            with checks.numbered_from(first):
                texts = checks.texts(columns, self.column, self)
            counts.update(word for text in texts for word in self._words(text))
            first += len(texts)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return replace(self, vocabulary=tuple(ranked[: self.vocabulary_size - SPECIAL]))

    def __call__(self, columns: Columns) -> Columns:
        texts = checks.texts(columns, self.column, self)
        ids_BL = np.full((len(texts), self.length), PADDING, dtype=np.int64)
        for row, text in enumerate(texts):
            # Stops at the last word that counts, however long the text.
            numbers = [self._numbers.get(word, UNKNOWN) for word in islice(self._words(text), self.length)]
            ids_BL[row, : max(1, len(numbers))] = numbers or [UNKNOWN]
        made = {self.ids: ids_BL, self.mask: (ids_BL != PADDING).astype(np.int64)}
        return checks.replaced(columns, [self.column], made, self)

    def dynamic(self) -> Mapping[str, tuple[int, ...]]:
        return {self.ids: (0,), self.mask: (0,)} if self.dynamic_length else {}

    def facts(self) -> Mapping[str, int]:
        return {} if self.vocabulary is None else {"vocabulary_size": len(self.vocabulary) + SPECIAL}

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        if self.vocabulary is None:
            raise ConfigError("Tokens.vocabulary is null and was not learned from training rows (data.transforms)")
        return {word: number for number, word in enumerate(self.vocabulary, start=SPECIAL)}

    @cached_property
    def _word(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def _words(self, text: str) -> Iterator[str]:
        return (
            match.group() for match in self._word.finditer(text.lower() if self.lowercase else text) if match.group()
        )
