"""
The page of coloured tokens: a trace's text, each token with the experts that took it in every layer, its
gates, its loss.

A source is sent to the page as parallel lists over its tokens; `on[l]` holds of each token "expert gate
expert gate ...", since few of the [L, N, E] gates are not zero. What is drawn of it (shade, colours, the grid
of gates) is page.js's.
"""

import shlex

import numpy as np

from plot import Figure, missing
from routing_files import TRACE_COMMAND
from sources import token_text

MOST_TOKENS = 1500  # of a source


def show_bytes(pieces):
    """
    A character may be split over tokens: its first token shows it, the others show nothing but a mark. Bytes
    that are no text are shown as \\xE2
    """
    text = b"".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    shown, at = [""] * len(pieces), 0
    token = 0
    while at < len(text):
        size = character_size(text, at)
        while ends[token] <= at:
            token += 1
        shown[token] += text[at : at + size].decode("utf-8", errors="backslashreplace")
        at += size
    return [word or "·" for word in shown]


def character_size(text, at):
    """bytes of the character that begins here; 1 where none does"""
    for size in (1, 2, 3, 4):
        try:
            text[at : at + size].decode("utf-8")
            return size if at + size <= len(text) else 1
        except UnicodeDecodeError:
            continue
    return 1


def source_json(trace, name, begin, end, most):
    end = min(end, begin + most)
    gates = trace.gates[:, begin:end]
    on = []
    for layer in gates:
        tokens, experts = np.nonzero(np.nan_to_num(layer, nan=1.0))
        values = layer[tokens, experts]
        cells = [[] for _ in range(end - begin)]
        for t, e, gate in zip(tokens.tolist(), experts.tolist(), values.tolist()):
            cells[t] += [e, float(f"{gate:.3g}") if np.isfinite(gate) else None]
        on.append(cells)
    loss = trace.loss[begin:end].astype(np.float64)
    return {
        "name": name,
        "text": show_bytes(trace.pieces[begin:end]),
        "ids": trace.ids[begin:end].tolist(),
        "on": on,
        "loss": [float(f"{x:.4g}") if np.isfinite(x) else None for x in loss],
    }


def text_json(s, most):
    t = s.trace
    return {
        "name": s.name,
        "router": t.router,
        "layers": t.layers,
        "experts": t.experts,
        "sources": [source_json(t, name, a, b, most) for name, a, b in t.sources],
        "cut": any(b - a > most for _, a, b in t.sources),
        "most": most,
    }


def coloured_text(subjects, most=MOST_TOKENS):
    """-> Figure, the data for page.js"""
    data = [text_json(s, most) for s in subjects if s.trace]
    lacking = [
        missing(s, "no trace", TRACE_COMMAND.replace("RUN", shlex.quote(s.folder)))
        for s in subjects
        if not s.trace and s.run.router != "dense"
    ]
    return Figure("text", html='<div id="coloured"></div>' if data else "", missing=lacking), data
