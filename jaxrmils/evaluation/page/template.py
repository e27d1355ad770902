"""The frame of every page: one file that loads nothing and runs nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jaxrmils.evaluation.page.axes import symbols
from jaxrmils.evaluation.page.markup import Markup, join, tag
from jaxrmils.evaluation.page.saved import SavedTest
from jaxrmils.version import __version__


def document(title: str, subtitle: str, head: Markup, sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
      title: heading, and the tab's name.
      subtitle: under it.
      head: what comes before the first section.
      sections: those without content are left out.

    Returns:
      HTML that needs no other file. Its security policy forbids every request, and every script
      and style but its own, known by their hashes.
    """
    style, script = Markup(_resource("page.css")), Markup(_resource("page.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    shown = [section for section in sections if section[2]]
    links = [tag("a", name, href=f"#{key}") for key, name, _ in shown]
    return "<!DOCTYPE html>\n" + tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", **{"http-equiv": "Content-Security-Policy"}, content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("meta", name="generator", content=f"jaxrmils {__version__}"),
            tag("link", rel="icon", href="data:,"),
            tag("title", f"{title} · {subtitle}"),
            tag("style", style),
        ),
        "\n",
        tag(
            "body",
            symbols(),
            tag("header", tag("h1", title), tag("div", subtitle, class_="subtitle")),
            tag(
                "main",
                head,
                tag("nav", *links, aria_label="sections"),
                *(
                    join("\n", tag("section", tag("h2", name), content, id=key))
                    for key, name, content in shown
                ),
            ),
            tag("footer", f"Made by jaxrmils {__version__}. Nothing in this page is loaded."),
            tag("script", script),
        ),
        lang="en",
    )


Section = tuple[str, str, Markup]
"""A section's anchor, heading and content."""


def verdict_box(test: SavedTest, words: str) -> Markup:
    """The verdict, large, with the sentence behind it."""
    outcome = test.outcome
    short = {
        "lossless": "Lossless",
        "not lossless": "Not lossless",
        "no evidence": "No evidence either way",
    }
    return tag(
        "div",
        tag("strong", short[outcome]),
        tag("p", words),
        class_=f"verdict {outcome.replace(' ', '-')}",
    )


def tiles(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """Large numbers: name, number, and what belongs to it."""
    return tag(
        "dl",
        *(
            tag(
                "div",
                tag("dt", name),
                tag("dd", number, class_="big"),
                tag("dd", more, class_="more"),
            )
            for name, number, more in entries
        ),
        class_="tiles",
    )


def notes(entries: Sequence[str], label: str = "notes") -> Markup:
    """What a reader should not miss; nothing where there is nothing."""
    if not entries:
        return Markup("")
    return tag("ul", *(tag("li", entry) for entry in entries), class_="notes", aria_label=label)


def facts(entries: Mapping[str, Any]) -> Markup:
    """Names with values."""
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", str(value)))
        for name, value in entries.items()
    ]
    return tag("table", tag("tbody", *rows), class_="facts")


def _resource(name: str) -> str:
    return files("jaxrmils.evaluation.page").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
