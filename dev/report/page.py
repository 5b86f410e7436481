"""
One HTML file of figures: all that it needs is in it, so it opens from a disk, without a server or a network.

plotly.js is 4.8 MB; it is packed with gzip (2.0 MB as base64) and unpacked by the browser's
DecompressionStream. When the page would still pass MOST_BYTES, long curves lose points (plot.kept_points) and
texts their ends until it fits.
"""

import base64
import functools
import gzip
import json
import re
import subprocess
import time
from html import escape
from pathlib import Path

import plotly
import plotly.offline

import figures_routing
import figures_training
import plot
from captions import CAPTIONS
from coloured_text import MOST_TOKENS, coloured_text
from report import MOST_BYTES
from run_facts import made_from, summary, when

LEAST_POINTS = 50  # per curve, below which a page is rather too large
HERE = Path(__file__).resolve().parent


def version():
    """of this report's own sources"""
    try:
        words = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@functools.cache
def packed_plotly():
    return base64.b64encode(gzip.compress(plotly.offline.get_plotlyjs().encode(), 9, mtime=0)).decode()


# ---------------------------------------------------------------- a figure


def panel_html(panel, number):
    layer = f' data-layer="{panel.layer}"' if panel.layer is not None else ""
    heading = f"<h4>{escape(panel.title)}</h4>" if panel.title else ""
    plot_html = f'<div class="plot" id="plot-{number}" style="height:{panel.height}px"></div>'
    return f'<div class="panel{" wide" if panel.wide else ""}"{layer}>{heading}{plot_html}</div>'


def card(figure, panels):
    """a figure's HTML; its panels are appended to `panels`, which page.js draws"""
    title, paper, text = CAPTIONS[figure.id]
    html = f'<article class="card" id="{figure.id}"><h3>{escape(title)}'
    html += f'<span class="paper">{escape(paper)}</span>' if paper else ""
    html += f'</h3><p class="text">{text}</p>'
    if figure.panels:
        first = len(panels)
        panels += [panel.json() for panel in figure.panels]
        plots = "".join(panel_html(panel, first + i) for i, panel in enumerate(figure.panels))
        html += f'<div class="legend"></div><div class="grid{" small" if figure.small else ""}">{plots}</div>'
    notes = "".join(f'<p class="missing">{note}</p>' for note in figure.missing)
    return f"{html}{figure.html}{notes}</article>"


def section(id, name, figures, panels):
    cards = "".join(card(figure, panels) for figure in figures if not figure.empty)
    return f'<section id="{id}"><h2 class="section">{name}</h2>{cards}</section>'


# ---------------------------------------------------------------- the page


def layer_count(subjects):
    files = [file.layers for s in subjects for file in (s.stats, s.trace) if file]
    return max(files + [s.run.layers for s in subjects])


def early_stages(subjects):
    """is so little of a run before stage III that only a logarithmic axis shows it?"""
    return any(s.run.settled is not None and s.run.settled < 0.08 * s.run.steps[-1] for s in subjects)


def made_by(command):
    return (
        f"Made {when(time.time())} by <code>{escape(command)}</code>, remoe.c {escape(version())}, "
        f"plotly {escape(plotly.__version__)}. Of a curve with more than {plot.MOST_POINTS} points every "
        "span shows its least and its largest."
    )


def render(subjects, title, command, refresh, most_tokens):
    panels = []
    text, text_data = coloured_text(subjects, most_tokens)
    parts = [
        ("training", "Training", [make(subjects) for make in figures_training.FIGURES]),
        ("routing", "Routing", [make(subjects) for make in figures_routing.FIGURES]),
        ("reading", "Text", [text]),
    ]
    body = "".join(section(id, name, figures, panels) for id, name, figures in parts)
    links = [(id, name) for id, name, _ in parts] + [("sources", "Sources")]
    data = {
        "panels": panels,
        "text": text_data,
        "colours": plot.COLOURS,
        "layers": layer_count(subjects),
        "logSteps": early_stages(subjects),
        "refresh": refresh,
    }
    fields = {
        "TITLE": escape(title),
        "STYLE": (HERE / "page.css").read_text(),
        "SCRIPT": "".join((HERE / name).read_text() for name in ("text.js", "page.js")),
        "NAV": "".join(f'<a href="#{id}">{name}</a>' for id, name in links),
        "RUNS": "".join(summary(s) for s in subjects),
        "BODY": body,
        "SOURCES": "".join(made_from(s) for s in subjects),
        "MADE": made_by(command),
        "PLOTLY": packed_plotly(),
        "DATA": json.dumps(data, cls=plotly.utils.PlotlyJSONEncoder).replace("<", "\\u003c"),
    }
    html = re.sub(r"{{(\w+)}}", lambda field: fields[field[1]], (HERE / "page.html").read_text())
    return html.encode("utf-8", errors="xmlcharrefreplace")


def make_page(subjects, title, command, refresh=0):
    """-> bytes"""
    points, tokens = plot.MOST_POINTS, MOST_TOKENS
    try:
        while True:
            html = render(subjects, title, command, refresh, tokens)
            if len(html) < MOST_BYTES or plot.MOST_POINTS <= LEAST_POINTS:
                return html
            plot.MOST_POINTS, tokens = plot.MOST_POINTS // 2, max(100, tokens // 2)
    finally:
        plot.MOST_POINTS = points
