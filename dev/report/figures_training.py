"""
Figures of a run's log: Figures 3, 4, 10 and Table 6 of the paper, validation per domain, sparsity and load
per layer, speed and memory. Each function takes the subjects and returns a Figure; one that is empty is left
out of the page.
"""

from html import escape

import numpy as np
import plotly.graph_objects as go

from plot import (
    HEAT,
    STAGE_NAMES,
    STEP,
    Figure,
    Html,
    Panel,
    axis,
    depth_colour,
    duration,
    kept_points,
    level,
    line,
    missing,
    number_text,
    rgba,
    running_mean,
    stage_shapes,
    table,
)

MOST_DOMAINS = 24  # with a panel each
MOST_COLUMNS = 200  # of a heat map over steps
# the paper's Table 6: 469M active parameters, 120 billion tokens; hours in the stages and in all
PUBLISHED = [
    ("paper: MoE, 469M", 0.12, 0.41, 119.12, 119.65),
    ("paper: ReMoE, 469M", 0.32, 0.91, 119.25, 120.48),
]


def title(s):
    """a run's name, and its router where the name does not tell"""
    return s.name if not s.run.router or s.run.router in s.name else f"{s.name} ({s.run.router})"


def hover(text):
    """the step is the page's to tell: above all curves, or above the one that is pointed at"""
    return f"{text}<extra>%{{fullData.name}}</extra>"


def curve(s, y, form, **more):
    """of a run, by steps"""
    return line(s.run.steps, y, s.name, s.colour, hovertemplate=hover(form), **more)


def by_step(traces, name, heading, height=260, shapes=(), **y_axis):
    layout = {"xaxis": STEP, "yaxis": axis(name, **y_axis), "shapes": list(shapes)}
    return Panel(traces, layout, heading, height, steps=True)


def not_logged(s, what, option):
    more = "(the run's other options are under <a href='#sources'>Sources</a>)"
    return f"<b>{escape(s.name)}</b>: {what}. Train with <code>{option}</code> {more}."


# ---------------------------------------------------------------- losses and stages


def stages(subjects):
    with_stages = [s for s in subjects if s.run.stage_spans]
    without = [s for s in subjects if not s.run.stage_spans] if with_stages else []
    notes = [
        f"<b>{escape(s.name)}</b>: its router ({escape(s.run.router or 'unknown')}) has no stages."
        for s in without
    ]
    return Figure("stages", [stages_panel(s) for s in with_stages], missing=notes)


def stages_panel(s):
    """loss, lambda and S, one above the other, on one axis of steps"""
    run = s.run
    loss, weight, sparsity = run.column("lm_loss"), run.column("lambda"), run.column("sparsity")
    keep = kept_points(run.steps, [loss, sparsity])

    def part(y, name, colour, where, form):
        return line(run.steps[keep], y[keep], name, colour, yaxis=where, hovertemplate=hover(form))

    def positive(y):  # the axis is logarithmic
        return np.where(y > 0, y, np.nan)

    traces = [
        part(loss, Html("L<sub>lm</sub>"), "#3d82e0", "y", "%{y:.4f}"),
        part(positive(weight), "λ", "#b05fd6", "y2", "%{y:.3e}"),
        part(
            positive(weight * run.column("reg_loss")), Html("λ L<sub>reg</sub>"), "#e8762d", "y2", "%{y:.3e}"
        ),
        part(sparsity, "S", "#23a06b", "y3", "%{y:.4f}"),
    ]
    least = float(np.nanmin([0.4, *sparsity]))
    shapes = stage_shapes(run)
    if run.target is not None:
        shapes.append(level(run.target, f"1 - k/E = {run.target:.4g}", at="start", yref="y3"))
    layout = {
        "xaxis": {**STEP, "anchor": "y3"},
        "yaxis": axis("loss", domain=[0.7, 1]),
        "yaxis2": axis("λ, λL<sub>reg</sub>", type="log", domain=[0.36, 0.66], exponentformat="power"),
        "yaxis3": axis("S", domain=[0, 0.32], range=[least - 0.02, 1.02]),
        "shapes": shapes,
    }
    return Panel(traces, layout, title(s), 460, steps=True)


def loss(subjects):
    shown = [s for s in subjects if s.run.has("lm_loss")]
    if not shown:
        return Figure("loss")
    unit, per_hour = time_unit(shown)
    steps, times = [], []
    for s in shown:
        y = s.run.column("lm_loss")
        window = max(1, min(100, len(y) // 40))
        name = f"{s.name}, mean of {window}" if window > 1 else s.name
        mean = running_mean(y, window)
        if window > 1:
            pale = {"width": 0.8, "opacity": 0.35, "hoverinfo": "skip", "showlegend": False}
            steps.append(line(s.run.steps, y, name, s.colour, **pale))
        steps.append(line(s.run.steps, mean, name, s.colour, width=2, hovertemplate=hover("%{y:.4f}")))
        told = hover(f"%{{x:.3f}} {unit}<br>loss %{{y:.4f}}")
        hours = np.nancumsum(s.run.column("ms")) / 3.6e6
        times.append(line(hours * per_hour, mean, name, s.colour, width=2, hovertemplate=told))
    y_axis = axis("training loss", **loss_range(shown))
    return Figure(
        "loss",
        [
            Panel(steps, {"xaxis": STEP, "yaxis": y_axis}, "by step", steps=True),
            Panel(times, {"xaxis": axis(unit), "yaxis": y_axis}, "by time"),
        ],
    )


def loss_range(subjects):
    """what the curves have after a twentieth of the steps: the first fall would squeeze the rest together"""
    values = np.concatenate([s.run.column("lm_loss")[len(s.run.rows) // 20 :] for s in subjects])
    values = values[np.isfinite(values)]
    if not len(values):
        return {}
    low, high = np.percentile(values, [0.1, 99])
    return {"range": [float(low - 0.05 * (high - low)), float(high + 0.1 * (high - low) + 1e-3)]}


def time_unit(subjects):
    """-> the name of a unit that suits all runs, how many an hour has"""
    hours = max(np.nansum(s.run.column("ms")) / 3.6e6 for s in subjects)
    return ("hours", 1) if hours >= 2 else ("minutes", 60) if hours * 60 >= 2 else ("seconds", 3600)


def sparsity(subjects):
    shown = [s for s in subjects if s.run.stage_spans and s.run.has("sparsity")]
    return Figure("sparsity", [sparsity_panel(s) for s in shown])


def sparsity_panel(s):
    run = s.run
    steps, y = run.steps, run.column("sparsity")
    after = max(100, run.settled or 0)
    late = y[(steps > after) & np.isfinite(y)]
    shapes, heading, limits = [], title(s), {}
    if run.target is not None:
        shapes.append(level(run.target, f"target {run.target:.4g}", at="start"))
        limits = {"range": [max(0, run.target - 0.75 * (1 - run.target)), 1.01]}
    if len(late):
        mean, deviation = float(late.mean()), float(late.std())
        heading += f": {mean:.4f} ± {deviation:.4f} after step {after}"
        band = {"x0": after, "x1": int(steps[-1]), "y0": mean - deviation, "y1": mean + deviation}
        shapes.append(
            {
                "type": "rect",
                **band,
                "layer": "below",
                "line": {"width": 0},
                "fillcolor": rgba("#23a06b", 0.18),
            }
        )
    return by_step([curve(s, y, "S %{y:.4f}", width=1)], "S", heading, 300, shapes, **limits)


# ---------------------------------------------------------------- validation


def validation(subjects):
    shown = [s for s in subjects if s.run.validations]
    lacking = [
        missing(s, "no validation in its log", s.run.evaluate()) for s in subjects if not s.run.validations
    ]
    names = sorted(
        {name for s in shown for name in s.run.validations}, key=lambda name: (name != "all", name)
    )
    if not names:
        return Figure("validation", missing=lacking)
    several = max(len(losses) for s in shown for losses in s.run.validations.values()) > 1
    panels = (
        [domain_panel(shown, name) for name in names[:MOST_DOMAINS]]
        if several
        else [dots_panel(shown, names)]
    )
    rows = [[name, *best_in_bold([last(s, name) for s in shown])] for name in names]
    return Figure(
        "validation", panels, table(["domain", *(s.name for s in shown)], rows), lacking, small=several
    )


def domain_panel(subjects, name):
    traces = []
    for s in subjects:
        points = sorted(s.run.validations.get(name, {}).items())
        if points:
            x, y = zip(*points)
            told = {"mode": "lines+markers", "hovertemplate": hover("%{y:.4f}")}
            traces.append(line(x, y, s.name, s.colour, width=2, **told))
    return by_step(traces, "loss", "all domains" if name == "all" else name, 230)


def dots_panel(subjects, names):
    """one validation only: a row per domain"""
    names = names[::-1]
    traces = [
        go.Scatter(
            x=[last(s, name) for name in names],
            y=[escape(name) for name in names],
            name=escape(s.name),
            mode="markers",
            marker={"color": s.colour, "size": 11},
            hovertemplate=hover("%{y}: %{x:.4f}"),
        )
        for s in subjects
    ]
    layout = {"xaxis": axis("validation loss"), "yaxis": {"type": "category"}}
    return Panel(traces, layout, "", 90 + 34 * len(names))


def last(s, domain):
    losses = s.run.validations.get(domain)
    return losses[max(losses)] if losses else np.nan


def best_in_bold(values):
    finite = [value for value in values if np.isfinite(value)]
    bold = min(finite) if len(values) > 1 and finite else None
    return [Html(f"<b>{number_text(value)}</b>") if value == bold else number_text(value) for value in values]


# ---------------------------------------------------------------- layers and experts


def layers(subjects):
    panels, notes = [], []
    for s in subjects:
        steps, values = s.run.arrays("layer_sparsity", 1)
        if not np.isfinite(values).any():
            continue
        if np.nanmax(values) - np.nanmin(values) < 1e-6:  # topk: nothing moves
            notes.append(
                f"<b>{escape(s.name)}</b>: S is {np.nanmean(values):.4g} in every layer at every step."
            )
            continue
        traces = layer_curves(steps, values, "S %{y:.4f}")
        traces.append(
            line(steps, values.mean(1), "mean", "#8a8f98", dash="dot", hovertemplate=hover("S %{y:.4f}"))
        )
        shapes = stage_shapes(s.run) + ([level(s.run.target, "target")] if s.run.target is not None else [])
        panels.append(by_step(traces, "S of the layer", title(s), 340, shapes))
    return Figure("layers", panels, missing=notes)


def layer_curves(x, values, form):
    """[n, L]: a curve per layer, shown with its layer"""
    n = values.shape[1]
    return [
        line(x, values[:, l], f"layer {l}", depth_colour(l, n), layer=l, hovertemplate=hover(form))
        for l in range(n)
    ]


def load(subjects):
    """tokens of the busiest and the idlest (layer, expert), dead experts, tokens without an expert"""
    spread, dead, idle = [], [], []
    for s in subjects:
        run = s.run
        with np.errstate(divide="ignore", invalid="ignore"):
            most, least = (
                run.column(f"tokens_per_expert.{key}") / run.column("tokens_per_expert.mean")
                for key in ("max", "min")
            )
        pairs = (run.tokens_per_step or np.nan) * max(1, run.layers)
        without = 100 * run.column("zero_expert_tokens") / pairs
        if np.isfinite(most).any():
            spread.append(curve(s, most, "busiest %{y:.3f} of the mean"))
            spread.append(curve(s, least, "idlest %{y:.3f} of the mean", dash="dot"))
        if run.has("dead_experts"):
            dead.append(curve(s, run.column("dead_experts"), "%{y} dead"))
        if np.isfinite(without).any():
            idle.append(curve(s, without, "%{y:.2f} %"))
    zero = {"rangemode": "tozero"}
    panels = [
        by_step(
            spread,
            "tokens / mean",
            "the busiest expert (line), the idlest (dotted)",
            300,
            [level(1, "")],
            **zero,
        ),
        by_step(dead, "(layer, expert) pairs", "dead experts: without a token in the step", 300, **zero),
        by_step(idle, "% of (layer, token)", "tokens without an expert", 300, **zero),
    ]
    return Figure("load", [panel for panel in panels if panel.traces], small=True)


def experts_by_step(subjects):
    """a heat map per layer: the share of a step's tokens that each expert got, where the log counts them"""
    panels, lacking = [], []
    for s in subjects:
        steps, tokens = s.run.arrays("layer_expert_tokens", 2)
        if tokens.size:
            panels += expert_maps(s, steps, tokens / (s.run.tokens_per_step or np.nan))
        elif s.run.router != "dense":
            lacking.append(
                not_logged(s, "its log does not count tokens per expert", "--log-experts-every 10")
            )
    return Figure("load-by-step", panels, missing=lacking, small=True)


def expert_maps(s, steps, share):
    """share [n, L, E]"""
    if not np.isfinite(share).any():
        return []
    keep = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_COLUMNS)).round().astype(int))
    most = float(np.clip(np.nanpercentile(share, 99), 0.01, 1))
    panels = []
    for l in range(share.shape[1]):
        trace = go.Heatmap(
            x=steps[keep],
            z=share[keep, l].T.astype(np.float32),
            zmin=0,
            zmax=most,
            colorscale=HEAT,
            colorbar={"thickness": 10, "tickformat": ".1~%"},
            hovertemplate="step %{x}<br>expert %{y}: %{z:.1%} of the tokens<extra></extra>",
        )
        layout = {"xaxis": STEP, "yaxis": axis("expert")}
        panels.append(Panel([trace], layout, f"{title(s)}, layer {l}", 240, layer=l, steps=True))
    return panels


def flips(subjects):
    rate, count, by_layer, lacking = [], [], [], []
    unit, tokens_per_unit = token_unit(subjects)
    for s in subjects:
        run = s.run
        seen = np.isfinite(run.column("flip_rate"))
        if not seen.any():
            if run.router != "dense":
                lacking.append(not_logged(s, "no flips in its log", "--flip-every 100"))
            continue
        scale = (run.tokens_per_step or 1) / tokens_per_unit
        form = f"%{{x:.3g}} {unit}<br>%{{y:.5f}}"
        style = {"mode": "lines+markers" if seen.sum() < 200 else "lines", "hovertemplate": hover(form)}
        for traces, key in ((rate, "flip_rate"), (count, "flip_count")):
            traces.append(line(run.steps[seen] * scale, run.column(key)[seen], s.name, s.colour, **style))
        steps, values = run.arrays("layer_flip_rate", 1)
        if values.size:
            by_layer.append((layer_curves(steps * scale, values, form), "flip rate", f"{title(s)}: by layer"))
    parts = [(rate, "flip rate", "flip rate"), (count, "flip count", "flip count"), *by_layer] if rate else []
    panels = [
        Panel(traces, {"xaxis": axis(unit), "yaxis": axis(name, rangemode="tozero")}, heading)
        for traces, name, heading in parts
    ]
    return Figure("flips", panels, missing=lacking)


def token_unit(subjects):
    """-> the name of a unit for the x axis, tokens in it"""
    if not any(s.run.tokens_per_step for s in subjects):
        return "steps", 1
    most = max((s.run.steps[-1] * (s.run.tokens_per_step or 1) for s in subjects if s.run.rows), default=1)
    return ("billion tokens", 1e9) if most >= 1e9 else ("million tokens", 1e6)


# ---------------------------------------------------------------- time


def stage_times(subjects):
    """
    Table 6: the sum of `ms` by stage. A run without stages is cut at the steps of the first run that has them
    """
    model = max((s.run.stage_spans for s in subjects), key=len)
    rows, notes = [], []
    for s in subjects:
        ms, steps, spans = s.run.column("ms"), s.run.steps, s.run.stage_spans or model
        if not np.isfinite(ms).any():
            continue
        if model and not s.run.stage_spans:
            notes.append(f"<b>{escape(s.name)}</b> has no stages: its times are of the same steps.")
        bounds = [first for _, first, _ in spans[1:]] + [np.inf]
        times = {
            stage: np.nansum(ms[(steps >= first) & (steps < end)])
            for (stage, first, _), end in zip(spans, bounds)
        }
        cells = [duration(times.get(stage, np.nan)) for stage in STAGE_NAMES]
        settled = "–" if s.run.settled is None else str(s.run.settled)
        rows.append([s.name, *cells, duration(np.nansum(ms)), settled])
    if not rows:
        return Figure("stage-times")
    rows += [
        [Html(f"<i>{name}</i>"), *(f"{hours:.2f} h" for hours in times), "–"] for name, *times in PUBLISHED
    ]
    return Figure(
        "stage-times",
        html=table(["run", *STAGE_NAMES.values(), "total", "settled after steps"], rows),
        missing=notes,
    )


def speed(subjects):
    zero = {"rangemode": "tozero"}
    panels = []
    for key, name, form in (
        ("tok_s", "tokens/s", "%{y:.0f} tokens/s"),
        ("ms", "ms per step", "%{y:.1f} ms"),
        ("mem_gb", "memory, GB", "%{y:.3f} GB"),
    ):
        traces = [curve(s, s.run.column(key), form) for s in subjects if s.run.has(key)]
        panels.append(by_step(traces, name, name, **zero))
    for key, name, scale, form in (
        ("mfu", "MFU, %", 100, "%{y:.2f} %"),
        ("tflops", "TFLOP/s", 1, "%{y:.4g} TFLOP/s"),
    ):
        shown = [s for s in subjects if s.run.has(key)]
        traces = [curve(s, scale * s.run.column(key), form) for s in shown]
        traces += [curve(s, scale * s.run.column(f"{key}_active"), form, dash="dot") for s in shown]
        panels.append(by_step(traces, name, name, **zero))
    waiting = [s for s in subjects if s.run.has("ms_waiting")]
    traces = [curve(s, 100 * s.run.column("ms_waiting") / s.run.column("ms"), "%{y:.2f} %") for s in waiting]
    panels.append(by_step(traces, "% of the step", "communication that is not hidden", **zero))
    return Figure("speed", [panel for panel in panels if panel.traces], small=True)


def optimizer(subjects):
    panels = []
    for key, name, kind in (("grad_norm", "gradient norm", "log"), ("lr", "learning rate", "linear")):
        traces = [curve(s, s.run.column(key), "%{y:.4g}") for s in subjects if s.run.has(key)]
        panels.append(by_step(traces, name, name, 240, type=kind, exponentformat="power"))
    return Figure("optimizer", [panel for panel in panels if panel.traces])


FIGURES = [
    stages,
    loss,
    sparsity,
    validation,
    layers,
    load,
    experts_by_step,
    flips,
    stage_times,
    speed,
    optimizer,
]
