"""Reads HTML as a strict reader does: every element is closed where it was opened."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br"}


@dataclass
class Element:
    """An element, what is in it, and the text directly in it."""

    tag: str
    attributes: dict[str, str | None]
    children: list["Element"] = field(default_factory=list)
    own_text: str = ""

    def all(self, tag: str) -> list["Element"]:
        """Every element of this name below."""
        return [each for each in self.walk() if each.tag == tag]

    def walk(self) -> list["Element"]:
        """Every element below, in order."""
        return [each for child in self.children for each in (child, *child.walk())]

    @property
    def text(self) -> str:
        """All text in it."""
        return self.own_text + "".join(child.text for child in self.children)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is there twice"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.open[-1].own_text += data


def read_html(text: str) -> Element:
    """The elements of a page; an AssertionError where they are not nested."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is not closed"
    return reader.open[0]
