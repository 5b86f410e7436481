"""
Figures of a statistics file: where tokens went, by layer, expert, domain and token id (Figures 7, 8b-d, 9, 11, 12 and Table 12 of
the paper; their definitions stand beside each).
"""
from html import escape

import numpy as np
import plotly.graph_objects as go

from plot import HEAT, MOST_BARS, Figure, Html, Panel, colour, level, line, missing, table
from routing_files import STATS_COMMAND
from sources import read_vocabulary, token_text

LEAST_COUNT = 20        # of a token id that is drawn: one seen less often says little
RUNNING_IDS = 500       # ids that Figure 7's mean runs over
MOST_DOTS = 2500        # of Figure 7
SURE, LISTED = 0.97, 8  # Table 12: P(e | v) at least this, so many tokens per expert
INACTIVE = 1 / 64       # Figure 8: an expert with fewer tokens is white


def title(s):
    return s.name if s.stats.router in s.name else f"{s.name} ({s.stats.router})"


def lacking(subjects):
    return [missing(s, "no statistics", STATS_COMMAND.format(run=s.folder))
            for s in subjects if not s.stats and not (s.run and s.run.router == "dense")]


def with_stats(subjects):
    return [s for s in subjects if s.stats]


def always_k(stats):
    """every token has the same number of experts: nothing to draw of how many"""
    return bool((stats.routed.sum(2) == stats.tokens[:, None] * stats.active).all())


def heat_maps(subjects):
    """ratio[l, e] of all tokens, logarithmic; below 1/64 white"""
    panels = []
    for s in with_stats(subjects):
        ratio = s.stats.ratio_all
        with np.errstate(divide="ignore"):
            z = np.where(ratio >= INACTIVE, np.log2(ratio), np.nan)
        rows = ratio.shape[0]
        panels.append(Panel([go.Heatmap(z=z.astype(np.float32), customdata=ratio.astype(np.float32), zmin=-6, zmax=0, colorscale=HEAT, xgap=2, ygap=2,
                                        hoverongaps=True, name=escape(s.name),
                                        hovertemplate="layer %{y}, expert %{x}<br>%{customdata:.2%} of the tokens<extra></extra>",
                                        colorbar={"thickness": 10, "tickvals": [-6, -4, -2, 0], "ticktext": ["1/64", "1/16", "1/4", "1"]})],
                            {"xaxis": {"title": {"text": "expert"}, **whole_ticks(ratio.shape[1])}, "yaxis": {"title": {"text": "layer"}, **whole_ticks(rows)}},
                            f"{title(s)}: {int((ratio < INACTIVE).sum())} of {ratio.size} below 1/64", max(210, min(520, 90 + 34 * rows))))
    return Figure("heat", "Tokens of each layer and expert", "The share of all tokens that a layer sends to an expert; less than 1/64 is left white.",
                  "Figure 8b, c", panels, missing=lacking(subjects))


def whole_ticks(n):
    return {"tickmode": "linear", "dtick": max(1, -(-n // 12))}


def layer_sparsity(subjects):
    traces, shapes, ks = [], [], set()
    for s in with_stats(subjects):
        y = 1 - s.stats.ratio_all.sum(1) / s.stats.experts
        traces.append(line(np.arange(len(y)), y, s.name, s.colour, width=2, mode="lines+markers", hovertemplate="layer %{x}<br>S %{y:.4f}<extra>%{fullData.name}</extra>"))
        traces.append(line(np.array([0, max(1, len(y) - 1)]), [y.mean()] * 2, s.name, s.colour, width=1, dash="dot", hovertemplate="mean S %{y:.4f}<extra>%{fullData.name}</extra>"))
        ks.add(s.stats.share)
    if not traces:
        return None
    layers = max(s.stats.layers for s in with_stats(subjects))
    shapes = [level(1 - share, f"1 - k/E = {1 - share:.4g}") for share in sorted(ks)]
    return Figure("layer-sparsity", "Sparsity by layer", "1 - (mean active experts) / E of each layer (dotted: their mean), on the validation tokens.", "Figure 8d",
                  [Panel(traces, {"xaxis": {"title": {"text": "layer"}, **whole_ticks(layers)}, "yaxis": {"title": {"text": "S of the layer"}}, "shapes": shapes}, "", 320, wide=True)])


def domains(subjects):
    """a panel per layer and run, a colour per domain: ratio[d, l, e]"""
    panels, names = [], all_domains(subjects)
    for l in range(max((s.stats.layers for s in with_stats(subjects)), default=0)):
        shown = [s for s in with_stats(subjects) if l < s.stats.layers]
        most = max(float(s.stats.ratio[:, l].max()) for s in shown)
        for s in shown:
            panels.append(domain_bars(s, l, names, most) if s.stats.experts <= MOST_BARS else domain_map(s, l, most))
    if not panels:
        return None
    return Figure("domains", "Tokens of each expert by domain", "The share of a domain's tokens that a layer sends to each expert. Dashed: k/E, what every expert would get if all were "
                  "alike. Bars of unlike height over one expert are specialisation. With all layers chosen this is the paper's Figure 12, with the first, "
                  "middle and last its Figure 9.", "Figures 9, 12", panels)


def all_domains(subjects):
    names = []
    for s in with_stats(subjects):
        names += [name for name in s.stats.domains if name not in names]
    return names


def domain_bars(s, l, names, most):
    ratio = s.stats.ratio[:, l].astype(np.float32)
    traces = [go.Bar(x=np.arange(ratio.shape[1]), y=ratio[d], name=escape(name), marker={"color": colour(names.index(name))}, meta={"layer": None},
                     hovertemplate="expert %{x}: %{y:.2%}<extra>%{fullData.name}</extra>") for d, name in enumerate(s.stats.domains)]
    return Panel(traces, {"barmode": "group", "bargap": 0.25, "bargroupgap": 0, "shapes": [level(s.stats.share, "")],
                          "xaxis": {"title": {"text": "expert"}, **whole_ticks(ratio.shape[1])},
                          "yaxis": {"range": [0, most * 1.08], "tickformat": ".0%"}}, f"layer {l} · {title(s)}", 240, layer=l)


def domain_map(s, l, most):
    ratio = s.stats.ratio[:, l].astype(np.float32)
    return Panel([go.Heatmap(z=ratio, y=[escape(name) for name in s.stats.domains], colorscale=HEAT, zmin=0, zmax=most, name=escape(s.name), colorbar={"thickness": 10, "tickformat": ".0%"},
                             hovertemplate="%{y}, expert %{x}: %{z:.2%}<extra></extra>")],
                 {"xaxis": {"title": {"text": "expert"}}, "yaxis": {"type": "category"}}, f"layer {l} · {title(s)}", 130 + 22 * len(ratio), layer=l)


def specialisation(stats):
    """[L] the mean over domains of the total-variation distance of the domain's split over experts from the mean one"""
    ratio = stats.ratio[stats.tokens > 0]
    normal = lambda x: x / np.maximum(x.sum(-1, keepdims=True), 1e-300)
    return 0.5 * np.abs(normal(ratio) - normal(ratio.mean(0))).sum(-1).mean(0)


def specialisations(subjects):
    traces = []
    for s in with_stats(subjects):
        if len(s.stats.domains) > 1:
            y = specialisation(s.stats)
            traces.append(line(np.arange(len(y)), y, s.name, s.colour, width=2, mode="lines+markers", hovertemplate="layer %{x}<br>%{y:.4f}<extra>%{fullData.name}</extra>"))
    if not traces:
        return None
    layers = max(s.stats.layers for s in with_stats(subjects))
    return Figure("specialisation", "Specialisation in one number a layer", "The mean over domains of the total-variation distance between the domain's split of tokens over experts and the mean "
                  "split: 0, all domains are routed alike; 1, domains share no expert.", "",
                  [Panel(traces, {"xaxis": {"title": {"text": "layer"}, **whole_ticks(layers)}, "yaxis": {"title": {"text": "distance"}, "rangemode": "tozero"}}, "", 280, wide=True)])


def active_by_domain(subjects):
    panels, names = [], all_domains(subjects)
    notes = []
    for s in with_stats(subjects):
        if always_k(s.stats):
            notes.append(f"<b>{escape(s.name)}</b>: every token has {s.stats.active} of {s.stats.experts} experts in every layer.")
            continue
        mean = s.stats.ratio.sum(2)
        x = [*(str(l) for l in range(mean.shape[1])), "mean"]
        traces = [go.Bar(x=x, y=[*mean[d].astype(np.float32).tolist(), float(mean[d].mean())], name=escape(name), marker={"color": colour(names.index(name))},
                         hovertemplate="layer %{x}: %{y:.3f} experts<extra>%{fullData.name}</extra>") for d, name in enumerate(s.stats.domains)]
        panels.append(Panel(traces, {"barmode": "group", "bargap": 0.25, "xaxis": {"title": {"text": "layer"}, "type": "category"}, "yaxis": {"title": {"text": "experts per token"}},
                                     "shapes": [level(s.stats.active, "")]}, title(s), 300, wide=mean.shape[1] > 6))
    return Figure("active-by-domain", "Experts per token by domain", "Mean active experts of each layer (dashed: k): a ReLU router may spend more where text is harder.", "Figure 11",
                  panels, missing=notes) if panels or notes else None


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
    from pathlib import Path
    words = read_vocabulary(Path(s.stats.checkpoint)) if s.stats.checkpoint else {}
    return words or (read_vocabulary(s.run.checkpoint) if s.run else {})


def token_frequency(subjects):
    panels, notes, rows = [], [], []
    for s in with_stats(subjects):
        stats, words = s.stats, vocabulary(s)
        seen = np.flatnonzero(stats.count >= LEAST_COUNT)
        if always_k(stats):
            continue # the note stands with the domains
        if len(seen) < 10:
            notes.append(f"<b>{escape(s.name)}</b>: fewer than 10 token ids occur {LEAST_COUNT} times or more. Count more tokens: validation shards with more text.")
            continue
        mean = stats.mean_active[seen]
        order = np.argsort(mean, kind="stable")
        seen, mean = seen[order], mean[order]
        share = stats.count[seen] / stats.count.sum()
        window = min(RUNNING_IDS, max(3, len(seen) // 10))
        smooth = np.exp(np.convolve(np.log(share), np.ones(window) / window, mode="valid"))
        drawn = np.unique(np.linspace(0, len(seen) - 1, min(len(seen), MOST_DOTS)).round().astype(int))
        texts = [escape(token_text(words, int(v))) for v in seen[drawn]]
        traces = [go.Scatter(x=drawn.astype(np.int32), y=share[drawn].astype(np.float32), mode="markers", name="token id", yaxis="y2", text=texts,
                             customdata=mean[drawn].astype(np.float32), marker={"size": 4, "color": "#e8762d", "opacity": 0.35},
                             hovertemplate="'%{text}'<br>%{y:.2e} of the tokens<br>%{customdata:.3f} experts per layer<extra></extra>"),
                  line(np.arange(len(smooth)) + window // 2, smooth, f"its mean over {window} ids", "#c2410c", width=2, yaxis="y2", hovertemplate="%{y:.2e} of the tokens<extra></extra>"),
                  line(drawn, mean[drawn], "experts per layer", "#3d82e0", width=2.5, hovertemplate="%{y:.3f} experts per layer<extra></extra>")]
        panels.append(Panel(traces, {"hovermode": "closest", "xaxis": {"title": {"text": "token ids by their experts per layer"}},
                                     "yaxis": {"title": {"text": "experts per layer"}, "rangemode": "tozero"}, "shapes": [level(stats.active, "")],
                                     "yaxis2": {"title": {"text": "share of tokens"}, "type": "log", "dtick": 1, "overlaying": "y", "side": "right", "exponentformat": "power", "showgrid": False}},
                            f"{title(s)}: Spearman {spearman(mean, np.log(share)):+.3f}", 360, wide=True))
        rows.append([s.name, tokens_html(words, seen[:12], mean[:12]), tokens_html(words, seen[::-1][:12], mean[::-1][:12])])
    if not panels and not notes:
        return None
    return Figure("frequency", "Experts by token frequency", f"Token ids that occur at least {LEAST_COUNT} times, from the fewest experts to the most, and how frequent they are (dashed: k). The paper finds that "
                  "rare tokens get more experts: a clearly negative Spearman correlation.", "Figure 7", panels,
                  table(["run", "fewest experts per layer", "most"], rows) if rows else "", notes)


def tokens_html(words, ids, values, percent=False):
    chips = [f'<span class="tok" title="id {int(v)}">{escape(token_text(words, int(v)))}<sub>{f"{p:.1%}" if percent else f"{p:.2f}"}</sub></span>' for v, p in zip(ids, values)]
    return Html(" ".join(chips))


def token_experts(subjects):
    """Table 12: of each expert the most frequent tokens that are nearly always routed to it"""
    parts, lower = [], True
    for s in with_stats(subjects):
        words = vocabulary(s)
        for l, used in sorted(s.stats.used.items()):
            least = max(LEAST_COUNT, int(np.ceil(2e-6 * s.stats.tokens.sum())))
            ids = np.flatnonzero(s.stats.count >= least)
            rows = [expert_row(s.stats.count[ids], used[ids, e], ids, words, e) for e in range(s.stats.experts)]
            many = len(s.stats.used) > 1
            parts.append(f'<div{f" data-layer={l}" if many else ""}>' + table(["expert", f"tokens that occur {least} times or more"], rows, f"{title(s)}, layer {l}") + "</div>")
    if not parts:
        return None
    return Figure("token-experts", "Tokens of each expert", f"P(e | v), the share of a token's occurrences that reach expert e: of the tokens with P of {SURE} or more the {LISTED} most frequent. An expert "
                  "without such tokens shows, in grey, the three with the largest P. (Where k/E is near 1, a P near 1 is no specialisation. "
                  "<code>--stats-layers all</code> counts every layer.)", "Table 12", [], f'<div class="grid">{"".join(parts)}</div>')


def expert_row(count, used, ids, words, e):
    p = used / np.maximum(count, 1)
    sure = np.flatnonzero(p >= SURE)
    sure = sure[np.argsort(-count[sure], kind="stable")][:LISTED]
    if len(sure):
        return [str(e), tokens_html(words, ids[sure], p[sure], True)]
    most = [i for i in np.argsort(-p, kind="stable")[:3] if p[i] > 0]
    return [str(e), Html(f'<span class="pale">{tokens_html(words, ids[most], p[most], True)}</span>')]


FIGURES = [heat_maps, layer_sparsity, domains, specialisations, active_by_domain, token_frequency, token_experts]
