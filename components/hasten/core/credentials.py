"""Keeps passwords out of records."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

_USER_INFO = re.compile(r"(?<=://)[^\s/'\"]*@")
_SECRET = r"(?:[\w.-]*(?:token|password|passwd|pwd|secret|signature|credential|access_?key|api_?key)|sig)"
_IN_QUERY = re.compile(rf"(?i)([?&;]{_SECRET}=)[^&;#\s'\"]+")
_BEARER = re.compile(r"(?i)\b(authorization: ?basic|bearer)\s+[\w.~+/=-]{8,}")
SECRET_VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "DATABRICKS_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
)
SHORTEST = 4
"""Characters of a secret from which on it is looked for everywhere; a shorter one would be found in every word."""


def without_credentials(text: str) -> str:
    """The text without secrets.

    `user:password@` of every URL in it is replaced by `***@`, and so are tokens, passwords and signatures in query
    strings, `Bearer ...`, and whatever is the value of an environment variable that holds a secret of the tracking
    server or of a store of artefacts.
    """
    for secret in _in_the_environment():
        text = text.replace(secret, "***")
    text = _USER_INFO.sub("***@", text)
    return _BEARER.sub(r"\1 ***", _IN_QUERY.sub(r"\1***", text))


def plain_without_credentials(values: Any) -> Any:
    """The same of every text in plain lists and mappings."""
    if isinstance(values, Mapping):
        return {name: plain_without_credentials(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [plain_without_credentials(value) for value in values]
    return without_credentials(values) if isinstance(values, str) else values


def _in_the_environment() -> Iterator[str]:
    for name in SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= SHORTEST:
            yield secret
