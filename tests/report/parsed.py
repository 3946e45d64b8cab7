"""What a page of HTML consists of."""

import re
from html.parser import HTMLParser

VOID = {"meta", "input"}


class Page(HTMLParser):
    """What a page consists of; every element must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def charts(html: str) -> dict[str, str]:
    """Figures by their titles."""
    return {
        re.sub(r" ?<small>.*?</small>", "", title): body
        for title, body in re.findall(r"<figure.*?<h3>(.*?)</h3>(.*?)</figure>", html, re.DOTALL)
    }
