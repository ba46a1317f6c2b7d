"""Figures as PNG files and as SVG elements for the page.

The SVG keeps text as text, so that it can be selected, searched and read aloud. Its ids start with the figure's name,
so that a page can hold several figures. It contains no address of another file.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_SVG_OPTIONS = {"svg.fonttype": "none", "svg.hashsalt": "farebox"}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_FONTS = re.compile(r"'DejaVu Sans'(, [^;\"]*)?sans-serif")


class Drawing(NamedTuple):
    """A figure in both formats, with the words that stand beside it."""

    png: bytes
    svg: str
    """An `<svg>` element with a title and a description."""
    title: str
    caption: str


def drawing(figure: Figure, name: str, title: str, caption: str) -> Drawing:
    """Render a figure in both formats; `name` starts the ids of the SVG."""
    return Drawing(png(figure), svg(figure, name, title, caption), title, caption)


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def svg(figure: Figure, name: str, title: str, description: str) -> str:
    """Return a figure as an `<svg>` element to be placed in a page."""
    out = io.StringIO()
    with rc_context(_SVG_OPTIONS):
        FigureCanvasSVG(figure).print_svg(out, metadata=_NO_METADATA)
    text = out.getvalue()
    width, height = re.findall(r'<svg [^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    body = text[text.index("<defs") : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<([\w:]+)((?:\s[^<>]*)?)>", lambda tag: _own_ids(tag[0], name), body)
    words = f"<title id={name}-title>{escape(title)}</title><desc id={name}-desc>{escape(description)}</desc>"
    size = f'viewBox="0 0 {width} {height}" style="width:{float(width):.0f}pt;min-width:{0.75 * float(width):.0f}pt"'
    return f'<svg role=img aria-labelledby="{name}-title {name}-desc" {size}>{words}\n{body}</svg>'


def _own_ids(tag: str, name: str) -> str:
    """Prefix the ids of a tag and its references to others; shorten its list of fonts."""
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'\b(?:xlink:)?href="#', f'href="#{name}-', tag)
    return _FONTS.sub("'DejaVu Sans',sans-serif", re.sub(r"url\(#", f"url(#{name}-", tag))
