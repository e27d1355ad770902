"""Markup that escapes whatever is not markup already."""

from __future__ import annotations

import html
import re
from typing import Any

_VOID = {"meta", "link", "br", "input"}
# What neither XML nor UTF-8 can hold: controls, lone surrogates, non-characters.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Markup(str):
    """Text that is markup; any other `str` is escaped before it comes into a page."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Text as markup, for contents and for quoted attributes.

    >>> escape('<b> & "c"')
    '&lt;b&gt; &amp; &quot;c&quot;'
    """
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_ILLEGAL.sub("\ufffd", text), quote=True))


def join(*children: str, separator: str = "") -> Markup:
    """Children side by side, each escaped unless it is markup."""
    return Markup(separator.join(escape(child) for child in children))


def tag(name: str, /, *children: str, **attributes: Any) -> Markup:
    """An element, valid as HTML and as XML.

    Args:
      name: of the element.
      children: markup, or text that is escaped.
      attributes: a trailing underscore is dropped and others become hyphens; None and False leave
        an attribute out, True gives the bare one, numbers are rounded to 3 decimals.

    >>> tag("p", "a < b", tag("b", "c"), class_="x", data_tip="<", hidden=False)
    '<p class="x" data-tip="&lt;">a &lt; b<b>c</b></p>'
    """
    text = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{text}>")
    return Markup(f"<{name}{text}>{join(*children)}</{name}>")


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    key = key.rstrip("_").replace("_", "-")
    if value is True:
        return f' {key}=""'
    if isinstance(value, float):
        value = f"{value:.3f}".rstrip("0").rstrip(".")
    return f' {key}="{escape(str(value))}"'
