"""
What all figures are made of: a Figure is a card of the page, a Panel a plot in it, and a layer's panels and
curves are shown when the reader has chosen the layer.

The page adds what depends on its reader (dark or light, width, linear or logarithmic steps), so nothing here
names a background or a text colour. Colours below are readable on white and on black.
"""

from dataclasses import dataclass, field
from html import escape

import numpy as np
import plotly.graph_objects as go
import plotly.io

plotly.io.templates.default = "none"  # 7 KB a figure, and the page has its own

COLOURS = [
    "#3d82e0",
    "#e8762d",
    "#23a06b",
    "#b05fd6",
    "#d9486a",
    "#1ba3b8",
    "#c79a1b",
    "#8d7b68",
    "#7c8a99",
    "#6f9c2f",
]
STAGE_COLOURS = {1: "rgba(232,118,45,0.16)", 2: "rgba(176,95,214,0.15)", 3: "rgba(61,130,224,0.06)"}
STAGE_NAMES = {1: "I dense", 2: "II sparsifying", 3: "III sparse"}
DEPTH_COLOURS = ["#3068d8", "#8a5be0", "#d0549c", "#ee7a3a", "#d9a81c"]  # first layer to last
HEAT = [[0, "#dbe9f6"], [0.25, "#9fcbe6"], [0.5, "#4f9bd0"], [0.75, "#2167ac"], [1, "#0a306b"]]
MOST_POINTS = 2400  # per curve; page.py lowers it when a page would grow too large


@dataclass
class Panel:
    traces: list
    layout: dict = field(default_factory=dict)
    title: str = ""
    height: int = 300
    layer: int = None  # shown with this layer only
    steps: bool = False  # its x axis counts steps
    wide: bool = False

    def json(self):
        figure = go.Figure(
            data=self.traces, layout={"height": self.height, **self.layout}
        )  # refuses unknown properties
        return {
            "figure": figure.to_plotly_json(),
            "title": self.title,
            "height": self.height,
            "layer": self.layer,
            "steps": self.steps,
            "wide": self.wide,
        }


@dataclass
class Figure:
    id: str  # title and text: captions.py
    panels: list = field(default_factory=list)
    html: str = ""  # a table, or what the page's own script fills
    missing: list = field(default_factory=list)  # HTML: what is not there, and the command that makes it
    small: bool = False  # panels of which three or four stand side by side

    @property
    def empty(self):
        return not (self.panels or self.html or self.missing)


@dataclass
class Subject:
    """a column of the report: a run, and what was made from its checkpoint"""

    name: str
    colour: str
    run: object = None
    stats: object = None
    trace: object = None

    @property
    def folder(self):
        return str(self.run.folder) if self.run else self.name


class Html(str):
    """text that is HTML already"""


def html(text):
    return text if isinstance(text, Html) else escape(str(text))


def rgba(colour, alpha):
    return "rgba(%d,%d,%d,%g)" % (*(int(colour[i : i + 2], 16) for i in (1, 3, 5)), alpha)


def number_text(value, digits=4):
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"


def colour(i):
    return COLOURS[i % len(COLOURS)]


def depth_colour(layer, layers):
    """a layer's colour: where it is between the first and the last"""
    place = 0 if layers < 2 else layer / (layers - 1) * (len(DEPTH_COLOURS) - 1)
    i = min(int(place), len(DEPTH_COLOURS) - 2)
    a, b = (np.array([int(c[j : j + 2], 16) for j in (1, 3, 5)]) for c in DEPTH_COLOURS[i : i + 2])
    return "#%02x%02x%02x" % tuple(int(v) for v in np.rint(a + (b - a) * (place - i)))


def axis(title="", **more):
    return {"title": {"text": title}, **more}


STEP = axis("step")


def command(text):
    return f"<code>{escape(text)}</code>"


def missing(subject, what, text):
    return f"<b>{escape(subject.name)}</b>: {what}. {command(text)}"


def kept_points(x, ys, most=None):
    """
    -> indices of the points to draw. A long curve is cut into `most`/2 spans, half of them equal on a linear
    axis and half on a logarithmic one, and of each span the rows of the least and the largest value stay:
    nothing is averaged, no spike is lost
    """
    most = most or MOST_POINTS
    if len(x) <= most:
        return np.arange(len(x))
    spans = max(4, most // (2 * len(ys)) // 2)
    edges = np.union1d(np.linspace(x[0], x[-1], spans), np.geomspace(max(x[0], 1), max(x[-1], 2), spans))
    starts = np.unique(np.searchsorted(x, edges).clip(0, len(x) - 1))
    kept = {0, len(x) - 1}
    for a, b in zip(starts, [*starts[1:], len(x)]):
        for y in ys:
            span = y[a:b]
            if np.isfinite(span).any():
                kept |= {a + int(np.nanargmin(span)), a + int(np.nanargmax(span))}
    return np.array(sorted(kept))


def line(x, y, name, colour, **more):
    """a curve; x and y in single precision, which is what eyes and the page's size can bear"""
    x, y = np.asarray(x), np.asarray(y, dtype=np.float64)
    keep = kept_points(x, [y])
    layer = more.pop("layer", None)
    style = {"color": colour, "width": more.pop("width", 1.5)}
    if "dash" in more:
        style["dash"] = more.pop("dash")
    x = x[keep]
    return go.Scatter(
        x=x.astype(np.int32) if x.dtype.kind == "i" and x.max(initial=0) < 1 << 31 else x,
        y=y[keep].astype(np.float32),
        name=html(name),
        mode=more.pop("mode", "lines"),
        line=style,
        marker={"color": colour, "size": 5},
        meta={"layer": layer},
        **more,
    )


def running_mean(y, window):
    """over the last `window` values, NaN left out"""
    finite = np.isfinite(y)
    total, seen = np.cumsum(np.where(finite, y, 0)), np.cumsum(finite)
    total[window:], seen[window:] = total[window:] - total[:-window], seen[window:] - seen[:-window]
    return np.where(seen > 0, total / np.maximum(seen, 1), np.nan)


def stage_shapes(run):
    """the three stages, shaded over all of a panel's height"""
    shapes = []
    for stage, first, last in run.stage_spans:
        shapes.append(
            {
                "type": "rect",
                "xref": "x",
                "yref": "paper",
                "x0": first,
                "x1": last + 1,
                "y0": 0,
                "y1": 1,
                "layer": "below",
                "line": {"width": 0},
                "fillcolor": STAGE_COLOURS[stage],
                "label": {
                    "text": STAGE_NAMES[stage].split()[0],
                    "textposition": "top center",
                    "font": {"size": 11},
                },
            }
        )
    return shapes


def level(y, text, colour="#8a8f98", at="end", **more):
    """a horizontal line at a known value"""
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "yref": "y",
        "y0": y,
        "y1": y,
        "line": {"color": colour, "width": 1.2, "dash": "dash"},
        "label": {"text": text, "textposition": at, "font": {"size": 10, "color": colour}},
        **more,
    }


def table(head, rows, caption=""):
    """of texts, escaped; a column of numbers is right-aligned by the page's style"""
    cells = lambda tag, row: "".join(f"<{tag}>{html(cell)}</{tag}>" for cell in row)
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f'<div class="table"><table>{caption}{head}<tbody>{body}</tbody></table></div>'


def duration(ms):
    seconds = ms / 1000
    if not np.isfinite(seconds):
        return "–"
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.2f} min" if seconds >= 60 else f"{seconds:.2f} s"
