"""Keeps passwords out of records."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"(?<=://)[^\s/'\"]*@")


def without_credentials(text: str) -> str:
    """The text with `user:password@` of every URL in it replaced by `***@`."""
    return _USER_INFO.sub("***@", text)
