"""Reads pages strictly: every tag closed, every chart well-formed XML, nothing loaded."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "input"}


class Page(HTMLParser):
    """A parsed page: its elements with attributes, its text by element, its charts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.source, self.open, self.elements, self.texts = text, [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"
        self.charts = [
            ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)
        ]

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute twice: {tag} {names}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self, tag):
        return [text for name, text in self.texts if name == tag]

    @property
    def sections(self):
        return [attributes["id"] for attributes in self.all("section")]


def assert_self_contained(page):
    assert len(page.source.encode()) < 2_000_000
    outside = [text for tag, text in page.texts if tag in ("style", "script") and "url(" in text]
    assert not outside
    for tag, attributes in page.elements:
        assert "src" not in attributes and "style" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        href = attributes.get("href", "#")
        assert href.startswith("#") or href == "data:,", href
        if href.startswith("#") and len(href) > 1:
            assert any(a.get("id") == href[1:] for _, a in page.elements), href


def assert_accessible(page):
    assert page.all("html")[0]["lang"] == "en"
    for chart in page.charts:
        attributes = chart.attrib
        assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
