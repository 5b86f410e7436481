"""
One HTML file of figures: all that it needs is in it, so it opens from a disk, without a server or a network.

plotly.js is 4.8 MB; it is packed with gzip (2.0 MB as base64) and unpacked by the browser's DecompressionStream. When the page would still
pass MOST_BYTES, long curves lose points (plot.kept_points) and texts their ends until it fits; the page says so.
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

import numpy as np
import plotly
import plotly.offline

import coloured_text
import figures_routing
import figures_training
import plot
from plot import COLOURS, duration

MOST_BYTES = 6_000_000 - 1
HERE = Path(__file__).resolve().parent


def version():
    """of this report's own sources"""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def when(seconds):
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "unknown"


# ---------------------------------------------------------------- what the page says of its sources

def summary(s):
    """a run in eight numbers"""
    run = s.run
    facts = []
    stats = s.stats
    experts, active = (run.config.get("num_experts"), run.config.get("num_experts_per_tok")) if run.config else (stats.experts, stats.active) if stats else (None, None)
    router = run.router or (stats.router if stats else None)
    facts.append(("router", f"{router or 'not known'}" + (f", {active} of {experts}" if experts and router != "dense" else "")))
    if run.rows:
        asked = run.options.get("steps")
        facts.append(("steps", f"{run.steps[-1]}" + (f" of {asked}" if isinstance(asked, int) and asked != run.steps[-1] else "")))
        loss = run.column("lm_loss")
        finite = loss[np.isfinite(loss)]
        if len(finite):
            facts.append(("training loss", f"{finite[-max(1, min(50, len(finite) // 10)):].mean():.4f}"))
    value = figures_training.last(s, "all")
    if np.isfinite(value):
        facts.append(("validation loss", f"{value:.4f}"))
    if run.stage_spans:
        facts.append(("settled after", f"{run.settled} steps" if run.settled is not None else "not yet"))
        late = run.column("sparsity")[-50:]
        late = late[np.isfinite(late)]
        if len(late):
            facts.append((f"S, last {len(late)} steps", f"{late.mean():.4f}"))
    if run.has("tok_s"):
        facts.append(("tokens/s, late", f"{np.nanmedian(run.column('tok_s')[-max(1, len(run.rows) // 4):]):,.0f}"))
    if run.has("mem_gb"):
        facts.append(("memory", f"{np.nanmax(run.column('mem_gb')):.3g} GB"))
    if run.has("ms"):
        facts.append(("time of all steps", duration(np.nansum(run.column("ms")))))
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<section class="run" style="--run:{s.colour}"><h2>{escape(s.name)}</h2><dl>{items}</dl>{warnings(run)}</section>'


def warnings(run):
    found = []
    if run.dropped:
        found.append(f"{run.dropped} row{'s' * (run.dropped > 1)} of its log could not be read and {'are' if run.dropped > 1 else 'is'} left out.")
    if run.cut:
        found.append("The log's last line is cut: the run was interrupted, or is still writing.")
    if run.checkpoint is None:
        found.append("No checkpoint: options, k and E are not known.")
    loss = run.column("lm_loss")
    if len(loss) and not np.isfinite(loss).all():
        found.append(f"{int((~np.isfinite(loss)).sum())} steps have no finite loss.")
    return "".join(f'<p class="warn">{escape(text)}</p>' for text in found)


def run_command(run):
    """the options that the checkpoint holds, as a command line"""
    words = ["./train_remoe"]
    for key, value in run.options.items():
        if isinstance(value, (int, float, str)) and value not in ("", False):
            text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
            words.append(f"--{key.replace('_', '-')} " + (f"'{text}'" if any(c in text for c in " *?[$") else text))
    return " ".join(words)


def made_from(s):
    run, rows = s.run, []
    rows.append(("run", str(run.folder)))
    rows.append(("log", f"{len(run.rows)} steps, {sum(map(len, run.validations.values()))} validations; written {when(run.changed)}"))
    clock = run.column("time")
    clock = clock[np.isfinite(clock)]
    if len(clock):
        rows.append(("trained", f"{when(clock[0])} to {when(clock[-1])}"))
    if run.checkpoint is not None:
        rows.append(("checkpoint", str(run.checkpoint)))
    trainer = run.state.get("version")
    if isinstance(trainer, str):
        rows.append(("trainer", trainer))
    for key, name in (("train_data", "training data"), ("val_data", "validation data"), ("tokenizer", "vocabulary")):
        if isinstance(run.options.get(key), str):
            rows.append((name, run.options[key]))
    shards = run.state.get("shards")
    if isinstance(shards, list):
        known = [shard for shard in shards if isinstance(shard, dict)]
        rows.append(("shards", "; ".join(f"{shard.get('name')} {shard.get('bytes')} bytes, hash {shard.get('hash')}" for shard in known[:8])
                     + (f"; {len(known) - 8} more" if len(known) > 8 else "")))
    for what, file in (("statistics", s.stats), ("trace", s.trace)):
        if file:
            rows.append((what, f"{file.path}, of {file.checkpoint or 'an unnamed checkpoint'} (step {file.metadata.get('step', 'unknown')}); written {when(file.changed)}"))
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    options = f"<details><summary>its options, as a command</summary><pre>{escape(run_command(run))}</pre></details>" if run.options else ""
    return f'<h4><i style="background:{s.colour}"></i>{escape(s.name)}</h4><div class="table"><table class="facts"><tbody>{body}</tbody></table></div>{options}'


# ---------------------------------------------------------------- figures to HTML

def card(figure, panels):
    """a figure's HTML; its panels are appended to `panels`, which page.js draws"""
    parts = []
    for panel in figure.panels:
        layer = f' data-layer="{panel.layer}"' if panel.layer is not None else ""
        heading = f"<h4>{escape(panel.title)}</h4>" if panel.title else ""
        parts.append(f'<div class="panel{" wide" if panel.wide else ""}"{layer}>{heading}<div class="plot" id="plot-{len(panels)}" style="height:{panel.height}px"></div></div>')
        panels.append(panel.json())
    notes = "".join(f'<p class="missing">{note}</p>' for note in figure.missing)
    paper = f'<span class="paper">{escape(figure.paper)}</span>' if figure.paper else ""
    text = f'<p class="text">{figure.text}</p>' if figure.text else ""
    grid = f'<div class="legend"></div><div class="grid{" small" if figure.small else ""}">{"".join(parts)}</div>' if parts else ""
    return f'<article class="card" id="{figure.id}"><h3>{escape(figure.title)}{paper}</h3>{text}{grid}{figure.html}{notes}</article>'


def sections(subjects, most_tokens):
    """-> [(id, name, [Figure])], the data of the coloured text"""
    text, text_data = coloured_text.coloured_text(subjects, most_tokens)
    training = [make(subjects) for make in figures_training.FIGURES]
    routing = [make(subjects) for make in figures_routing.FIGURES]
    return [("training", "Training", training), ("routing", "Routing", routing), ("reading", "Text", [text])], text_data


@functools.cache
def packed_plotly():
    return base64.b64encode(gzip.compress(plotly.offline.get_plotlyjs().encode(), 9, mtime=0)).decode()


def render(subjects, title, command, refresh, packed, most_tokens):
    panels, body, nav = [], [], []
    parts, text_data = sections(subjects, most_tokens)
    for id, name, figures in parts:
        cards = [card(figure, panels) for figure in figures if figure is not None]
        nav.append(f'<a href="#{id}">{name}</a>')
        body.append(f'<section id="{id}"><h2 class="section">{name}</h2>{"".join(cards)}</section>')
    nav.append('<a href="#sources">Sources</a>')
    data = {"panels": panels, "text": text_data, "colours": COLOURS, "layers": layer_count(subjects), "logSteps": early_stages(subjects), "refresh": refresh}
    sources = "".join(made_from(s) for s in subjects)
    made = (f"Made {when(time.time())} by <code>{escape(command)}</code>, remoe.c {escape(version())}, plotly {escape(plotly.__version__)}."
            f" Curves of more than {plot.MOST_POINTS} points show the least and the largest of each span.")
    fields = {"TITLE": escape(title), "STYLE": (HERE / "page.css").read_text(), "SCRIPT": (HERE / "page.js").read_text(), "NAV": "".join(nav),
              "RUNS": "".join(summary(s) for s in subjects), "BODY": "".join(body), "SOURCES": sources, "MADE": made, "PLOTLY": packed,
              "DATA": json.dumps(data, cls=plotly.utils.PlotlyJSONEncoder).replace("<", "\\u003c")}
    html = re.sub(r"{{(\w+)}}", lambda field: fields[field[1]], (HERE / "page.html").read_text())
    return html.encode("utf-8", errors="xmlcharrefreplace")


def layer_count(subjects):
    counts = [file.layers for s in subjects for file in (s.stats, s.trace) if file]
    return max(counts + [s.run.arrays("layer_sparsity", 1)[1].shape[-1] for s in subjects], default=0)


def early_stages(subjects):
    """is so little of the runs before stage III that only a logarithmic axis shows it?"""
    return any(s.run.settled is not None and s.run.settled < 0.08 * s.run.steps[-1] for s in subjects)


def make_page(subjects, title, command, refresh=0):
    """-> bytes"""
    packed = packed_plotly()
    points, tokens = plot.MOST_POINTS, coloured_text.MOST_TOKENS
    while True:
        html = render(subjects, title, command, refresh, packed, tokens)
        if len(html) <= MOST_BYTES or plot.MOST_POINTS <= 50:
            plot.MOST_POINTS = points
            return html
        plot.MOST_POINTS, tokens = plot.MOST_POINTS // 2, max(100, tokens // 2)
