"""A report taken apart again: what a browser would see of it."""

import json
import re
from html.parser import HTMLParser
from typing import Any

NETWORK = re.compile(r"https?:|//[\w.]+/|@import|url\(", re.IGNORECASE)


class Page(HTMLParser):
    """charts: data by title; paths: of drawn lines by chart and look; images: (source, alt); text: all of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.charts: dict[str, dict[str, Any]] = {}
        self.paths: dict[tuple[str, str], str] = {}
        self.bars: dict[str, list[dict[str, float]]] = {}
        self.images: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self._title, self._json, self._silent = "", False, False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.tags.add(tag)
        self.links += [found[name] for name in ("src", "href", "action", "srcset") if name in found]
        self._json = tag == "script" and found.get("type") == "application/json"
        self._silent = tag in ("script", "style")
        if tag == "figure" and "aria-label" in found:
            self._title = found["aria-label"].partition(".")[0]
        if tag == "path" and "line" in found["class"]:
            self.paths[self._title, found["class"].split()[1]] = found["d"]
        if tag == "rect":
            sizes = {name: float(found[name]) for name in ("x", "y", "width", "height")}
            self.bars.setdefault(self._title, []).append(sizes)
        if tag == "img":
            self.images.append((found["src"], found["alt"]))

    def handle_endtag(self, tag: str) -> None:
        self._json = self._silent = False

    def handle_data(self, data: str) -> None:
        if self._json:
            self.charts[self._title] = json.loads(data)
        elif not self._silent:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def series(self, chart: str, name: str) -> tuple[list[float], list[float]]:
        """x and y of a line, or of the bars, from the data beside the drawing."""
        (line,) = [line for line in self.charts[chart]["series"] if line["name"] == name]
        return line["x"], line["y"]

    def drawn(self, chart: str, look: str) -> list[tuple[float, float]]:
        """The points of a line from the drawing itself, in values of the axes."""
        left, right, bottom, top = self.charts[chart]["frame"]
        points = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", self.paths[chart, look])
        return [
            (left + float(x) / 1000 * (right - left), top - float(y) / 1000 * (top - bottom))
            for x, y in points
        ]

    @property
    def needs_network(self) -> list[str]:
        """Whatever a browser would load or follow from elsewhere."""
        text = self.source.replace('xmlns="http://www.w3.org/2000/svg"', "")
        text = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", text)
        return NETWORK.findall(text) + [link for link in self.links if not link.startswith("data:")]
