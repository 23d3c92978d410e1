"""What every picture owes its reader: no text is hidden, cut or tiny, and colours mean the same everywhere."""

from itertools import combinations

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import Collection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from ecanet.inspect.style import DARK, GREY, IDEAS, LIGHT, OTHERS, diverging

#: The one table, paper and ink.
TABLE = {colour.lower() for colour in (*IDEAS.values(), *OTHERS, DARK, GREY, LIGHT, "#FFFFFF", "#000000")}
#: Pixels of a letter's size (about the height of "Ag") where the picture is 800 pixels wide.
SMALLEST = 8.9


def assert_readable(figure: Figure, smallest: float = SMALLEST) -> None:
    """No text overlaps another, is cut or is too small at 800 pixels, and every colour is in the table."""
    figure.draw_without_rendering()
    texts = texts_of(figure)
    assert texts
    assert_no_text_overlaps(figure, texts)
    for text in texts:
        assert text.get_fontsize() / 72 * 800 / figure.get_figwidth() >= smallest, text.get_text()
    assert colours_of(figure) <= TABLE
    for image in figure.findobj(lambda artist: isinstance(artist, ScalarMappable)):
        if image.get_array() is not None:
            np.testing.assert_array_equal(image.get_cmap()(range(256)), diverging()(range(256)))


def assert_no_text_overlaps(figure: Figure, texts: list[Text]) -> None:
    """No two visible texts of a figure share a pixel, and none is cut off by the figure's edge."""
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts]  # no arrows
    for name, box in boxes:
        assert figure.bbox.padded(1).contains(box.x0, box.y0), name
        assert figure.bbox.padded(1).contains(box.x1, box.y1), name
    for (name, box), (other, other_box) in combinations(boxes, 2):
        assert not box.padded(-1).overlaps(other_box.padded(-1)), (name, other)


def texts_of(figure: Figure) -> list[Text]:
    hidden = _undrawn_tick_labels(figure)
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]


def _undrawn_tick_labels(figure: Figure) -> set[Text]:
    """Labels of ticks outside their axis, which matplotlib keeps without drawing them; and all where axes are off."""
    return {
        label
        for axes in figure.axes
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in axis.get_major_ticks() + axis.get_minor_ticks()
        if not axes.axison or not min(limits) <= tick.get_loc() <= max(limits)
        for label in (tick.label1, tick.label2)
    }


def colours_of(figure: Figure) -> set[str]:
    """Of lines, markers, areas and texts that are seen, without their opacity; not those of images."""
    found: list[object] = [text.get_color() for text in texts_of(figure)]
    for artist in figure.findobj(lambda artist: artist.get_visible()):
        if isinstance(artist, Line2D):
            found += [artist.get_color(), artist.get_markerfacecolor(), artist.get_markeredgecolor()]
        elif isinstance(artist, Patch):
            found += [artist.get_facecolor(), artist.get_edgecolor()]
        elif isinstance(artist, Collection) and artist.get_array() is None:
            found += [*artist.get_facecolor(), *artist.get_edgecolor()]
    return {to_hex(colour) for colour in found}
