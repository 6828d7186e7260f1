"""The sentences of a page, kept as Markdown beside its module: `## name`, then text with {values} and **bold** words."""

from __future__ import annotations

import html
import re
import string
from pathlib import Path
from typing import Any

from dae.reporting.elements import Html, text


def read_prose(page: str) -> dict[str, str]:
    """Text by name, from the file next to the module `page`; line breaks become spaces, blank lines are kept."""
    _, *parts = re.split(r"^## (.+)\n", Path(page).with_suffix(".md").read_text(), flags=re.M)
    return {name: re.sub(r"(?<!\n)\n(?!\n)", " ", words.strip()) for name, words in zip(parts[::2], parts[1::2], strict=True)}


class _Escaping(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> Html:
        return value if isinstance(value, Html) else text(format(value, format_spec))


def paragraphs(words: str, tag: str = "p", **values: Any) -> list[Html]:
    """An element per paragraph of `read_prose`, with its {values} escaped unless they are `Html`."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(words))
    return [Html(f"<{tag}>{part}</{tag}>") for part in _Escaping().vformat(bold, (), values).split("\n\n")]
