"""
Figures of a statistics file: where tokens went, by layer, expert, domain and token id (Figures 7, 8b-d, 9,
11, 12 and Table 12 of the paper). Each function takes the subjects and returns a Figure; one that is empty is
left out of the page.
"""

import shlex
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from plot import HEAT, Figure, Html, Panel, axis, colour, level, line, missing, table
from sources import read_vocabulary, token_text

LEAST_COUNT = 20  # of a token id that is drawn: one seen less often says little
RUNNING_IDS = 500  # ids that Figure 7's mean runs over
MOST_DOTS = 2500  # of Figure 7
SURE, LISTED, UNSURE = (
    0.97,
    8,
    3,
)  # Table 12: P(e | v) at least this, so many tokens per expert; so many without such
INACTIVE = 1 / 8  # Figure 8: an expert with less than this of k/E is white; the paper's 1/64 at k/E = 1/8
MOST_BARS = 24  # experts that a bar chart still separates


def with_stats(subjects):
    return [s for s in subjects if s.stats]


def title(s):
    return s.name if s.stats.router in s.name else f"{s.name} ({s.stats.router})"


def always_k(stats):
    """every token has the same number of experts: nothing to draw of how many"""
    return bool((stats.routed.sum(2) == stats.tokens[:, None] * stats.active).all())


def whole_ticks(name, n):
    return axis(name, tickmode="linear", dtick=max(1, -(-n // 12)))


def most_layers(subjects):
    return max((s.stats.layers for s in with_stats(subjects)), default=0)


# ---------------------------------------------------------------- by layer and expert


def heat_maps(subjects):
    lacking = [
        missing(s, "no statistics", s.run.evaluate(f" --stats {shlex.quote(s.folder)}/stats.safetensors"))
        for s in subjects
        if not s.stats and s.run.router != "dense"
    ]
    return Figure("heat", [heat_map(s) for s in with_stats(subjects)], missing=lacking)


def heat_map(s):
    """ratio[l, e] of all tokens, logarithmic"""
    ratio, least = s.stats.ratio_all, INACTIVE * s.stats.share
    layers, experts = ratio.shape
    gap = 2 if experts <= MOST_BARS else 0
    with np.errstate(divide="ignore"):
        shown = np.where(ratio >= least, np.log2(ratio), np.nan)
    lowest = int(np.floor(np.log2(least)))
    ticks = list(range(0, lowest - 1, -2))
    trace = go.Heatmap(
        z=shown.astype(np.float32),
        customdata=ratio.astype(np.float32),
        zmin=np.log2(least),
        zmax=0,
        colorscale=HEAT,
        xgap=gap,
        ygap=gap,
        hoverongaps=True,
        hovertemplate="layer %{y}, expert %{x}<br>%{customdata:.2%} of the tokens<extra></extra>",
        colorbar={
            "thickness": 10,
            "tickvals": ticks,
            "ticktext": [f"1/{2 ** -n}" if n else "1" for n in ticks],
        },
    )
    layout = {"xaxis": whole_ticks("expert", experts), "yaxis": whole_ticks("layer", layers)}
    heading = f"{title(s)}: {int((ratio < least).sum())} of {ratio.size} below 1/{1 / least:.4g}"
    return Panel([trace], layout, heading, max(210, min(520, 90 + 34 * layers)))


def by_layer(subjects, values, name, form, heading, height, shapes=(), dotted_mean=False, **y_axis):
    """a wide panel with a curve per run: values(stats) [L]"""
    traces = []
    for s in with_stats(subjects):
        y = values(s.stats)
        told = f"{form}<extra>%{{fullData.name}}</extra>"
        style = {"mode": "lines+markers", "hovertemplate": "layer %{x}<br>" + told}
        traces.append(line(np.arange(len(y)), y, s.name, s.colour, width=2, **style))
        if dotted_mean:
            ends = np.array([0, max(1, len(y) - 1)])
            traces.append(
                line(ends, [y.mean()] * 2, s.name, s.colour, dash="dot", hovertemplate="mean: " + told)
            )
    if not traces:
        return []
    layout = {
        "xaxis": whole_ticks("layer", most_layers(subjects)),
        "yaxis": axis(name, **y_axis),
        "shapes": list(shapes),
    }
    return [Panel(traces, layout, heading, height, wide=True)]


def layer_sparsity(subjects):
    targets = sorted({1 - s.stats.share for s in with_stats(subjects)})
    shapes = [level(target, f"1 - k/E = {target:.4g}") for target in targets]
    values = lambda stats: 1 - stats.ratio_all.sum(1) / stats.experts  # noqa: E731
    panels = by_layer(subjects, values, "S of the layer", "S %{y:.4f}", "", 320, shapes, dotted_mean=True)
    return Figure("layer-sparsity", panels)


# ---------------------------------------------------------------- by domain


def all_domains(subjects):
    """in their order of appearance: a domain has one colour in all runs"""
    return list(dict.fromkeys(name for s in with_stats(subjects) for name in s.stats.domains))


def domains(subjects):
    """a panel per layer and run: ratio[d, l, e]"""
    panels, names = [], all_domains(subjects)
    for l in range(most_layers(subjects)):
        shown = [s for s in with_stats(subjects) if l < s.stats.layers]
        most = max(float(s.stats.ratio[:, l].max()) for s in shown)
        for s in shown:
            make = domain_bars if s.stats.experts <= MOST_BARS else domain_map
            panels.append(make(s, l, names, most))
    return Figure("domains", panels)


def domain_trace(s, names, d, x, y, form):
    name = s.stats.domains[d]
    told = f"{form}<extra>%{{fullData.name}}</extra>"
    return go.Bar(
        x=x, y=y, name=escape(name), marker={"color": colour(names.index(name))}, hovertemplate=told
    )


def domain_bars(s, l, names, most):
    ratio = s.stats.ratio[:, l].astype(np.float32)
    x = np.arange(s.stats.experts)
    traces = [domain_trace(s, names, d, x, ratio[d], "expert %{x}: %{y:.2%}") for d in range(len(ratio))]
    layout = {
        "barmode": "group",
        "bargap": 0.25,
        "shapes": [level(s.stats.share, "")],
        "xaxis": whole_ticks("expert", s.stats.experts),
        "yaxis": {"range": [0, most * 1.08], "tickformat": ".0%"},
    }
    return Panel(traces, layout, f"layer {l} · {title(s)}", 240, layer=l)


def domain_map(s, l, names, most):
    ratio = s.stats.ratio[:, l].astype(np.float32)
    trace = go.Heatmap(
        z=ratio,
        y=[escape(name) for name in s.stats.domains],
        zmin=0,
        zmax=most,
        colorscale=HEAT,
        colorbar={"thickness": 10, "tickformat": ".1~%"},
        hovertemplate="%{y}, expert %{x}: %{z:.2%}<extra></extra>",
    )
    layout = {"xaxis": axis("expert"), "yaxis": {"type": "category"}}
    return Panel([trace], layout, f"layer {l} · {title(s)}", 130 + 22 * len(ratio), layer=l)


def specialisation(stats):
    """
    [L] mean over domains of the total-variation distance of the domain's split over experts from the mean one
    """
    ratio = stats.ratio[stats.tokens > 0]

    def split(x):
        return x / np.maximum(x.sum(-1, keepdims=True), 1e-300)

    return 0.5 * np.abs(split(ratio) - split(ratio.mean(0))).sum(-1).mean(0)


def specialisations(subjects):
    several = [s for s in with_stats(subjects) if len(s.stats.domains) > 1]
    panels = by_layer(several, specialisation, "distance", "%{y:.4f}", "", 280, rangemode="tozero")
    return Figure("specialisation", panels)


def active_by_domain(subjects):
    panels, notes, names = [], [], all_domains(subjects)
    for s in with_stats(subjects):
        if always_k(s.stats):
            what = f"every token has {s.stats.active} of {s.stats.experts} experts in every layer"
            notes.append(f"<b>{escape(s.name)}</b>: {what}.")
            continue
        mean = s.stats.ratio.sum(2)
        mean = np.concatenate([mean, mean.mean(1, keepdims=True)], 1).astype(np.float32)
        x = [*map(str, range(s.stats.layers)), "mean"]
        form = "layer %{x}: %{y:.3f} experts"
        layout = {
            "barmode": "group",
            "bargap": 0.25,
            "shapes": [level(s.stats.active, "")],
            "xaxis": axis("layer", type="category"),
            "yaxis": axis("experts per token"),
        }
        traces = [domain_trace(s, names, d, x, mean[d], form) for d in range(len(mean))]
        panels.append(Panel(traces, layout, title(s), 300, wide=s.stats.layers > 6))
    return Figure("active-by-domain", panels, missing=notes)


# ---------------------------------------------------------------- by token id


def ranks(values):
    """1-based, equal values share the mean of their ranks"""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(a, b):
    """Pearson's correlation of ranks; NaN where one of them is constant"""
    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def vocabulary(s):
    """of the checkpoint that was counted, or the run's"""
    words = read_vocabulary(Path(s.stats.checkpoint)) if s.stats.checkpoint else {}
    return words or read_vocabulary(s.run.checkpoint)


def token_frequency(subjects):
    panels, notes, rows = [], [], []
    for s in with_stats(subjects):
        seen = np.flatnonzero(s.stats.count >= LEAST_COUNT)
        if always_k(s.stats):
            continue  # the note stands with the domains
        if len(seen) < 10:
            what = f"fewer than 10 token ids occur {LEAST_COUNT} times or more"
            notes.append(f"<b>{escape(s.name)}</b>: {what}. Count validation shards with more text.")
            continue
        seen = seen[np.argsort(s.stats.mean_active[seen], kind="stable")]
        mean, words = s.stats.mean_active[seen], vocabulary(s)
        panels.append(frequency_panel(s, seen, mean, words))
        fewest, most = tokens_html(words, seen[:12], mean[:12]), tokens_html(
            words, seen[::-1][:12], mean[::-1][:12]
        )
        rows.append([s.name, fewest, most])
    html = table(["run", "fewest experts per layer", "most"], rows) if rows else ""
    return Figure("frequency", panels, html, notes)


def frequency_panel(s, seen, mean, words):
    """
    ids by their experts per layer, and their frequency: the ids themselves, and the geometric mean of
    neighbours
    """
    share = s.stats.count[seen] / s.stats.count.sum()
    window = min(RUNNING_IDS, max(3, len(seen) // 10))
    smooth = np.exp(np.convolve(np.log(share), np.ones(window) / window, mode="valid"))
    drawn = np.unique(np.linspace(0, len(seen) - 1, min(len(seen), MOST_DOTS)).round().astype(int))
    of_tokens, per_layer = "%{y:.2e} of the tokens", "experts per layer<extra></extra>"
    dots = go.Scatter(
        x=drawn.astype(np.int32),
        y=share[drawn].astype(np.float32),
        text=[escape(token_text(words, int(v))) for v in seen[drawn]],
        customdata=mean[drawn].astype(np.float32),
        name="token id",
        mode="markers",
        yaxis="y2",
        marker={"size": 4, "color": "#e8762d", "opacity": 0.35},
        hovertemplate=f"'%{{text}}'<br>{of_tokens}<br>%{{customdata:.3f}} {per_layer}",
    )
    middle = np.arange(len(smooth)) + window // 2
    name, told = f"its mean over {window} ids", f"{of_tokens}<extra></extra>"
    running = line(middle, smooth, name, "#c2410c", width=2, yaxis="y2", hovertemplate=told)
    told = f"%{{y:.3f}} {per_layer}"
    experts = line(drawn, mean[drawn], "experts per layer", "#3d82e0", width=2.5, hovertemplate=told)
    right = {
        "type": "log",
        "dtick": 1,
        "exponentformat": "power",
        "overlaying": "y",
        "side": "right",
        "showgrid": False,
    }
    layout = {
        "hovermode": "closest",
        "xaxis": axis("token ids by their experts per layer"),
        "yaxis": axis("experts per layer", rangemode="tozero"),
        "yaxis2": axis("share of tokens", **right),
        "shapes": [level(s.stats.active, "")],
    }
    heading = f"{title(s)}: Spearman {spearman(mean, np.log(share)):+.3f}"
    return Panel([dots, running, experts], layout, heading, 360, wide=True)


def tokens_html(words, ids, values, form="{:.2f}"):
    def chip(v, p):
        text = f"{escape(token_text(words, v))}<sub>{form.format(p)}</sub>"
        return f'<span class="tok" title="id {v}">{text}</span>'

    return Html(" ".join(map(chip, map(int, ids), values)))


def token_experts(subjects):
    """Table 12: of each expert the most frequent tokens that are nearly always routed to it"""
    parts = [(l, i, used, s) for i, s in enumerate(with_stats(subjects)) for l, used in s.stats.used.items()]
    parts = [experts_table(s, l, used) for l, _, used, s in sorted(parts, key=lambda part: part[:2])]
    return Figure("token-experts", html=f'<div class="grid">{"".join(parts)}</div>' if parts else "")


def experts_table(s, l, used):
    """used [V, E]"""
    least = max(LEAST_COUNT, int(np.ceil(2e-6 * s.stats.tokens.sum())))
    ids, words = np.flatnonzero(s.stats.count >= least), vocabulary(s)
    rows = [expert_row(s.stats.count[ids], used[ids, e], ids, words, e) for e in range(s.stats.experts)]
    shown_with = f" data-layer={l}" if len(s.stats.used) > 1 else ""
    html = table(["expert", f"tokens that occur {least} times or more"], rows, f"{title(s)}, layer {l}")
    return f"<div{shown_with}>{html}</div>"


def expert_row(count, used, ids, words, e):
    p = used / np.maximum(count, 1)
    sure = np.flatnonzero(p >= SURE)
    sure = sure[np.argsort(-count[sure], kind="stable")][:LISTED]
    if len(sure):
        return [str(e), tokens_html(words, ids[sure], p[sure], "{:.1%}")]
    most = [i for i in np.argsort(-p, kind="stable")[:UNSURE] if p[i] > 0]
    return [str(e), Html(f'<span class="pale">{tokens_html(words, ids[most], p[most], "{:.1%}")}</span>')]


FIGURES = [
    heat_maps,
    layer_sparsity,
    domains,
    specialisations,
    active_by_domain,
    token_frequency,
    token_experts,
]
