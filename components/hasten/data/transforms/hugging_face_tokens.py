"""Texts to the numbers that a pretrained model of Hugging Face knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Ge

from hasten.core.errors import ConfigError
from hasten.core.interfaces import Columns, Transform
from hasten.data.transforms import checks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokens(Transform):
    """A text to `input_ids` and `attention_mask`, both (B, length) int64, by a saved fast tokenizer.

    Longer texts are cut and shorter ones padded, on the side and with the token that the file says. A text without any
    token keeps one position of padding in the mask, so that no mask is all 0.

    Attributes:
        column: of texts; the new columns take its place.
        length: tokens of a text that are kept, special ones included, and the width of the new columns.
        folder: that `save_pretrained` wrote, with a tokenizer.json; not needed once the tokenizer is known.
        tokenizer: content of that file; None: read from the folder when the transform is fitted.
        token_type_ids: whether to give that column too.
        dynamic_length: whether the model is to take shorter rows too, from callers that make the numbers themselves.
            Rows that come through here are all `length` wide, so that what is deployed is what was measured.
    """

    column: str
    length: Annotated[int, Ge(1)]
    folder: str | None = None
    tokenizer: str | None = None
    token_type_ids: bool = False
    dynamic_length: bool = True

    def __post_init__(self) -> None:
        if self.folder is None and self.tokenizer is None:
            raise ConfigError(
                "HuggingFaceTokens.folder must name a folder with a tokenizer.json, got null (data.transforms)"
            )

    def fit(self, columns: Columns) -> HuggingFaceTokens:
        if self.tokenizer is not None:
            return self
        file = Path(self.folder or "") / FILE
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"HuggingFaceTokens.folder={self.folder} has no readable {FILE}: {error}") from error
        return replace(self, tokenizer=content, folder=None)

    def __call__(self, columns: Columns) -> Columns:
        encodings = self._tokenizer.encode_batch(checks.texts(columns, self.column, self))
        mask_BL = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
        made = {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": mask_BL,
        }
        empty_B = ~mask_BL.any(axis=1)
        mask_BL[empty_B, 0] = 1
        if self.token_type_ids:
            made["token_type_ids"] = np.array([encoding.type_ids for encoding in encodings], dtype=np.int64)
        return checks.replaced(columns, [self.column], made, self)

    def dynamic(self) -> Mapping[str, tuple[int, ...]]:
        if not self.dynamic_length:
            return {}
        names = ("input_ids", "attention_mask", *(["token_type_ids"] if self.token_type_ids else []))
        return dict.fromkeys(names, (0,))

    def facts(self) -> Mapping[str, int]:
        """`vocabulary_size` is the highest id plus one; the embedding of a pretrained model may hold more."""
        if self.tokenizer is None:
            return {}
        return {"vocabulary_size": max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigError("tokenizers is not installed: pip install 'hasten[transformers]'") from error

        if self.tokenizer is None:
            raise ConfigError("HuggingFaceTokens has not read its tokenizer.json yet (data.transforms)")
        try:
            tokenizer = Tokenizer.from_str(self.tokenizer)
            padding = tokenizer.padding or {}
            token = padding.get("pad_token") or _padding_token(tokenizer)
            known = tokenizer.token_to_id(token)
            tokenizer.enable_padding(
                length=self.length,
                direction=padding.get("direction", "right"),
                pad_id=padding.get("pad_id", 0 if known is None else known),
                pad_type_id=padding.get("pad_type_id", 0),
                pad_token=token,
            )
            cut = tokenizer.truncation or {}
            tokenizer.enable_truncation(self.length, direction=cut.get("direction", "right"))
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(
                f"HuggingFaceTokens can't use its tokenizer.json with length={self.length}: {error}"
            ) from error
        return tokenizer


def _padding_token(tokenizer: Tokenizer) -> str:
    """The padding token by the names that model families give it."""
    return next(
        (token for token in ("[PAD]", "<pad>", "<|endoftext|>") if tokenizer.token_to_id(token) is not None), "[PAD]"
    )
