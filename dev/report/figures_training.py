"""
Figures of a run's log: Figures 3, 4, 10 and Table 6 of the paper, validation per domain, sparsity and load per layer, speed
and memory. Each function takes the subjects and returns a Figure, or None where nothing in it applies to them.
"""
from html import escape

import numpy as np
import plotly.graph_objects as go

from plot import (DEPTH_COLOURS, HEAT, STAGE_NAMES, Figure, Html, Panel, colour, command, depth_colour, duration, kept_points,
                  level, line, missing, running_mean, stage_shapes, table)

EXPERTS_OPTION, FLIP_OPTION = "--log-experts-every", "--flip-every"
STEP_AXIS = {"title": {"text": "step"}}
# the paper's Table 6: 469M active parameters, 120 billion tokens; hours in the stages
PUBLISHED_HOURS = [("paper: MoE, 469M", 0.12, 0.41, 119.12, 119.65),
                   ("paper: ReMoE, 469M", 0.32, 0.91, 119.25, 120.48)]


def retrain(subject, option):
    run = subject.run
    router = f" --router {run.router}" if run.router else ""
    return f"./train_remoe{router} {option} --out {run.folder}-again"


def several_names(subjects, key, make):
    """a panel in which every run that has the key is a curve"""
    traces = [make(s) for s in subjects if s.run.has(key)]
    return [trace for trace in traces if trace is not None]


def hover(text):
    """the step is the page's to tell: above all curves, or above the one that is pointed at"""
    return f"{text}<extra>%{{fullData.name}}</extra>"


def stages(subjects):
    panels = []
    for s in subjects:
        run = s.run
        if not run.stage_spans:
            continue
        steps, loss, penalty = run.steps, run.column("lm_loss"), run.column("lambda") * run.column("reg_loss")
        keep = kept_points(steps, [loss, run.column("sparsity")])
        curve = lambda y, name, colour, axis, form: line(steps[keep], y[keep], name, colour, yaxis=axis, hovertemplate=hover(form))
        positive = lambda y: np.where(y > 0, y, np.nan)
        traces = [curve(loss, Html("L<sub>lm</sub>"), "#3d82e0", "y", "%{y:.4f}"),
                  curve(positive(run.column("lambda")), "λ", "#b05fd6", "y2", "%{y:.3e}"),
                  curve(positive(penalty), Html("λ L<sub>reg</sub>"), "#e8762d", "y2", "%{y:.3e}"),
                  curve(run.column("sparsity"), "S", "#23a06b", "y3", "%{y:.4f}")]
        least = np.nanmin([0.4, *run.column("sparsity")])
        layout = {"xaxis": {**STEP_AXIS, "anchor": "y3"}, "shapes": stage_shapes(run),
                  "yaxis": {"title": {"text": "loss"}, "domain": [0.7, 1]},
                  "yaxis2": {"title": {"text": "λ, λL<sub>reg</sub>"}, "type": "log", "domain": [0.36, 0.66], "exponentformat": "power"},
                  "yaxis3": {"title": {"text": "S"}, "domain": [0, 0.32], "range": [float(least) - 0.02, 1.02]}}
        if run.target is not None:
            layout["shapes"].append(level(run.target, f"1 - k/E = {run.target:.4g}", yref="y3", at="start"))
        panels.append(Panel(traces, layout, title(s), 460, steps=True))
    if not panels:
        return None
    return Figure("stages", "Three stages", "The loss, lambda with the penalty it makes of the regulariser, and the sparsity S (the share of "
                  "(token, expert) pairs that are off). Stage I is nearly dense while lambda is tiny, in stage II the penalty thins "
                  "the experts out, in stage III lambda only keeps S in place.", "Figure 4", panels,
                  missing=[f"<b>{escape(s.name)}</b>: its router ({escape(s.run.router or 'unknown')}) has no stages."
                           for s in subjects if s.run.rows and not s.run.stage_spans])


def title(subject):
    router = subject.run.router if subject.run else subject.stats.router if subject.stats else None
    return subject.name if not router or router in subject.name else f"{subject.name} ({router})"


def loss(subjects):
    raw, by_hours = [], []
    for s in subjects:
        run = s.run
        if not run.has("lm_loss"):
            continue
        steps, y = run.steps, run.column("lm_loss")
        window = max(1, min(100, len(y) // 40))
        smooth = running_mean(y, window)
        name = f"{s.name}, mean of {window}" if window > 1 else s.name
        if window > 1:
            raw.append(line(steps, y, name, s.colour, width=0.8, opacity=0.35, hoverinfo="skip", showlegend=False))
        raw.append(line(steps, smooth, name, s.colour, width=2, hovertemplate=hover("loss %{y:.4f}")))
        hours = np.nancumsum(run.column("ms")) / 3.6e6
        unit = hours_unit(subjects)
        by_hours.append(line(hours * unit[1], smooth, name, s.colour, width=2, hovertemplate=f"%{{x:.3f}} {unit[0]}<br>loss %{{y:.4f}}<extra>%{{fullData.name}}</extra>"))
    if not raw:
        return None
    unit = hours_unit(subjects)
    ends = [y for s in subjects for y in s.run.column("lm_loss")[len(s.run.rows) // 20:] if np.isfinite(y)]
    axis = {"yaxis": {"title": {"text": "training loss"}}}
    if ends:
        low, high = np.percentile(ends, [0.1, 99])
        axis["yaxis"]["range"] = [float(low - 0.05 * (high - low)), float(high + 0.1 * (high - low) + 1e-3)]
    return Figure("loss", "Training loss", "By steps, and by the time that the steps took: stage I and II of a ReLU router cost more "
                  "time per step.", "Figure 5", [
                      Panel(raw, {**axis, "xaxis": STEP_AXIS}, "by step", steps=True),
                      Panel(by_hours, {**axis, "xaxis": {"title": {"text": unit[0]}}}, "by time")])


def hours_unit(subjects):
    """of all runs together: (name, how many an hour has)"""
    longest = max((np.nansum(s.run.column("ms")) / 3.6e6 for s in subjects), default=0)
    return ("hours", 1) if longest >= 2 else ("minutes", 60) if longest * 60 >= 2 else ("seconds", 3600)


def sparsity(subjects):
    panels = []
    for s in subjects:
        run = s.run
        if not run.stage_spans or not run.has("sparsity"):
            continue
        steps, y = run.steps, run.column("sparsity")
        after = run.settled if run.settled is not None else 100
        late = y[(steps > max(after, 100)) & np.isfinite(y)] if (steps > max(after, 100)).any() else y[:0]
        layout = {"xaxis": STEP_AXIS, "yaxis": {"title": {"text": "S"}}, "shapes": []}
        if run.target is not None:
            layout["shapes"].append(level(run.target, f"target {run.target:.4g}", at="start"))
            layout["yaxis"]["range"] = [max(0, run.target - 6 * (1 - run.target) / 8), 1.01]
        told = ""
        if len(late):
            told = f"{late.mean():.4f} ± {late.std():.4f} after step {max(after, 100)}"
            layout["shapes"].append({"type": "rect", "xref": "x", "yref": "y", "x0": max(after, 100), "x1": int(steps[-1]), "layer": "below",
                                     "y0": float(late.mean() - late.std()), "y1": float(late.mean() + late.std()), "line": {"width": 0},
                                     "fillcolor": "rgba(35,160,107,0.18)"})
        panels.append(Panel([line(steps, y, "S", s.colour, width=1, hovertemplate=hover("S %{y:.4f}"))], layout,
                            f"{title(s)}: {told}" if told else title(s), steps=True))
    if not panels:
        return None
    return Figure("sparsity", "Sparsity", "S at every step, without averaging; the band is its mean and standard deviation after the first 100 "
                  "steps, or after the settling where that is later. (The paper's run: 0.8751 ± 0.0061 around 0.875.)", "Figure 3", panels)


def validation(subjects):
    domains = []
    for s in subjects:
        domains += [name for name in s.run.validations if name not in domains]
    domains = sorted(domains, key=lambda name: (name != "all", name))
    lacking = [missing(s, "no validation", f"./train_remoe --load {s.folder} --eval") for s in subjects if not s.run.validations]
    if not domains:
        return Figure("validation", "Validation per domain", "", "", missing=lacking)
    times = max(len(v) for s in subjects for v in s.run.validations.values())
    panels = []
    if times > 1:
        for name in domains[:24]:
            traces = []
            for s in subjects:
                points = sorted(s.run.validations.get(name, {}).items())
                if points:
                    traces.append(line([p[0] for p in points], [p[1] for p in points], s.name, s.colour, width=2, mode="lines+markers",
                                       hovertemplate=hover("loss %{y:.4f}")))
            panels.append(Panel(traces, {"xaxis": STEP_AXIS, "yaxis": {"title": {"text": "loss"}}}, name if name != "all" else "all domains", 230, steps=True))
    else:
        traces = [go.Scatter(x=[last(s, name) for name in reversed(domains)], y=[escape(name) for name in reversed(domains)], name=escape(s.name), mode="markers",
                             marker={"color": s.colour, "size": 11}, hovertemplate="%{y}: %{x:.4f}<extra>%{fullData.name}</extra>")
                  for s in subjects if s.run.validations]
        panels.append(Panel(traces, {"xaxis": {"title": {"text": "validation loss"}}, "yaxis": {"type": "category"}}, "", 90 + 34 * len(domains)))
    shown = [s for s in subjects if s.run.validations]
    best = lambda name: np.nanmin([last(s, name) for s in shown]) if np.isfinite([last(s, name) for s in shown]).any() else np.nan
    mark = lambda s, name: Html(f"<b>{last(s, name):.4f}</b>") if len(shown) > 1 and last(s, name) == best(name) else number_text(last(s, name))
    rows = [[name, *(mark(s, name) for s in shown)] for name in domains]
    return Figure("validation", "Validation per domain", "The loss in nats per token of each validation shard; the table is of the last validation"
                  + (", the lowest of a domain in bold." if len(shown) > 1 else "."), "",
                  panels, table(["domain", *(s.name for s in shown)], rows), lacking, small=times > 1)


def last(subject, domain):
    points = subject.run.validations.get(domain)
    return points[max(points)] if points else np.nan


def number_text(value, digits=4):
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"


def layers(subjects):
    panels, notes = [], []
    for s in subjects:
        steps, values = s.run.arrays("layer_sparsity", 1)
        if not np.isfinite(values).any():
            continue
        n = values.shape[1]
        if np.nanmax(values) - np.nanmin(values) < 1e-6: # topk: nothing moves
            notes.append(f"<b>{escape(s.name)}</b>: S is {np.nanmean(values):.4g} in every layer at every step.")
            continue
        traces = [line(steps, values[:, l], f"layer {l}", depth_colour(l, n), layer=l, hovertemplate=hover("S %{y:.4f}")) for l in range(n)]
        traces.append(line(steps, values.mean(1), "mean", "#8a8f98", dash="dot", hovertemplate=hover("S %{y:.4f}")))
        shapes = stage_shapes(s.run) + ([level(s.run.target, "target")] if s.run.target is not None else [])
        panels.append(Panel(traces, {"xaxis": STEP_AXIS, "yaxis": {"title": {"text": "S of the layer"}}, "shapes": shapes}, title(s), 340, steps=True))
    if not panels and not notes:
        return None
    return Figure("layers", "Sparsity of each layer", "lambda steers only the mean over layers: where the experts are spent is the model's choice.",
                  "", panels, missing=notes)


def load(subjects):
    """tokens of the busiest and the idlest (layer, expert), dead experts, tokens without an expert"""
    spread, idle = [], []
    for s in subjects:
        run = s.run
        mean = run.column("tokens_per_expert.mean")
        with np.errstate(divide="ignore", invalid="ignore"):
            most, least = run.column("tokens_per_expert.max") / mean, run.column("tokens_per_expert.min") / mean
            zero = run.column("zero_expert_tokens") / (run.tokens_per_step or np.nan) / max(1, run.arrays("layer_sparsity", 1)[1].shape[-1])
        if np.isfinite(most).any():
            spread.append(line(run.steps, most, s.name, s.colour, hovertemplate=hover("busiest %{y:.3f} of the mean")))
            spread.append(line(run.steps, least, s.name, s.colour, dash="dot", hovertemplate=hover("idlest %{y:.3f} of the mean")))
        if np.isfinite(zero).any():
            idle.append(line(run.steps, 100 * zero, s.name, s.colour, hovertemplate=hover("%{y:.2f} %")))
    dead = [line(s.run.steps, s.run.column("dead_experts"), s.name, s.colour, hovertemplate=hover("%{y} dead")) for s in subjects if s.run.has("dead_experts")]
    if not (spread or dead):
        return None
    panels = [Panel(spread, {"xaxis": STEP_AXIS, "yaxis": {"title": {"text": "tokens / mean"}, "rangemode": "tozero"}, "shapes": [level(1, "")]},
                    "the busiest expert (line), the idlest (dotted)", steps=True),
              Panel(dead, {"xaxis": STEP_AXIS, "yaxis": {"title": {"text": "(layer, expert) pairs"}, "rangemode": "tozero"}}, "dead experts: without a token in the step", steps=True),
              Panel(idle, {"xaxis": STEP_AXIS, "yaxis": {"title": {"text": "% of (layer, token)"}, "rangemode": "tozero"}}, "tokens without an expert", steps=True)]
    return Figure("load", "Load and dead experts", "Tokens of an expert in a step, of the mean over all layers and experts: 1 would be all alike.", "", [p for p in panels if p.traces], small=True)


def experts_by_step(subjects):
    """a heat map a layer: the share of a step's tokens that each expert got, where the log counts them"""
    panels, lacking = [], []
    for s in subjects:
        steps, tokens = s.run.arrays("layer_expert_tokens", 2)
        if tokens.size == 0:
            if s.run.router != "dense":
                lacking.append(missing(s, "its log does not count tokens per expert", retrain(s, f"{EXPERTS_OPTION} 10")))
            continue
        per_step = s.run.tokens_per_step or np.nan
        keep = kept_rows(len(steps), 200)
        for l in range(tokens.shape[1]):
            share = (tokens[keep, l].T / per_step).astype(np.float32)
            panels.append(Panel([go.Heatmap(x=steps[keep], z=share, colorscale=HEAT, zmin=0, zmax=float(min(1, max(0.25, np.nanpercentile(tokens / per_step, 99)))),
                                            colorbar={"thickness": 10, "tickformat": ".0%"}, name=escape(s.name),
                                            hovertemplate="step %{x}<br>expert %{y}: %{z:.1%} of the tokens<extra></extra>")],
                                {"xaxis": STEP_AXIS, "yaxis": {"title": {"text": "expert"}}}, f"{title(s)}, layer {l}", 240, layer=l, steps=True))
    return Figure("load-by-step", "Tokens of each expert while training", "The share of a step's tokens whose layer activates the expert.", "", panels,
                  missing=lacking, small=True) if panels or lacking else None


def kept_rows(n, most):
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def flips(subjects):
    rate, count, by_layer, lacking = [], [], [], []
    for s in subjects:
        run = s.run
        y = run.column("flip_rate")
        seen = np.isfinite(y)
        if not seen.any():
            if run.router != "dense":
                lacking.append(missing(s, "no flips in its log", retrain(s, f"{FLIP_OPTION} 100")))
            continue
        unit, tokens = token_unit(subjects), run.tokens_per_step or 1
        x = run.steps[seen] * tokens / unit[1]
        told = f"%{{x:.3g}} {unit[0]}<br>%{{y:.5f}}<extra>%{{fullData.name}}</extra>"
        rate.append(line(x, y[seen], s.name, s.colour, mode="lines+markers" if seen.sum() < 200 else "lines", hovertemplate=told))
        count.append(line(x, run.column("flip_count")[seen], s.name, s.colour, mode="lines+markers" if seen.sum() < 200 else "lines", hovertemplate=told))
        steps, values = run.arrays("layer_flip_rate", 1)
        if values.size:
            n = values.shape[1]
            traces = [line(steps * tokens / unit[1], values[:, l], f"layer {l}", depth_colour(l, n), layer=l, hovertemplate=told) for l in range(n)]
            by_layer.append(Panel(traces, {"xaxis": {"title": {"text": unit[0]}}, "yaxis": {"title": {"text": "flip rate"}, "rangemode": "tozero"}}, f"{title(s)}: by layer"))
    if not rate and not lacking:
        return None
    axis = lambda name: {"xaxis": {"title": {"text": token_unit(subjects)[0]}}, "yaxis": {"title": {"text": name}, "rangemode": "tozero"}}
    panels = [Panel(rate, axis("flip rate"), "flip rate"), Panel(count, axis("flip count"), "flip count"), *by_layer] if rate else []
    return Figure("flips", "Flips", "How much of the routing one update changes, on a fixed set of validation tokens. The rate is the share of "
                  "(layer, token, expert) triples that were on and are off, or the other way round (Eq. 14); the count is E times that, experts "
                  "per layer and token (Eq. 15).", "Figure 10", panels, missing=lacking)


def token_unit(subjects):
    most = max((s.run.steps[-1] * (s.run.tokens_per_step or 1) for s in subjects if s.run.rows), default=1)
    if not any(s.run.tokens_per_step for s in subjects):
        return "steps", 1
    return ("billion tokens", 1e9) if most >= 1e9 else ("million tokens", 1e6)


def speed(subjects):
    unit = {"xaxis": STEP_AXIS}
    panels = []
    for key, name, scale, text in (("tok_s", "tokens/s", 1, "%{y:.0f} tokens/s"), ("ms", "ms per step", 1, "%{y:.1f} ms"),
                                   ("mem_gb", "memory, GB", 1, "%{y:.3f} GB")):
        traces = several_names(subjects, key, lambda s: line(s.run.steps, s.run.column(key) * scale, s.name, s.colour, hovertemplate=hover(text)))
        if traces:
            panels.append(Panel(traces, {**unit, "yaxis": {"title": {"text": name}, "rangemode": "tozero"}}, name, 260, steps=True))
    for nominal, active, name, scale, text in (("mfu", "mfu_active", "MFU, %", 100, "%{y:.2f} %"), ("tflops", "tflops_active", "TFLOP/s", 1, "%{y:.4g} TFLOP/s")):
        traces = several_names(subjects, nominal, lambda s: line(s.run.steps, s.run.column(nominal) * scale, s.name, s.colour, hovertemplate=hover(text)))
        traces += several_names(subjects, active, lambda s: line(s.run.steps, s.run.column(active) * scale, s.name, s.colour, dash="dot", hovertemplate=hover(text)))
        if traces:
            panels.append(Panel(traces, {**unit, "yaxis": {"title": {"text": name}, "rangemode": "tozero"}}, name, 260, steps=True))
    waiting = several_names(subjects, "ms_waiting", lambda s: line(s.run.steps, 100 * s.run.column("ms_waiting") / s.run.column("ms"), s.name, s.colour, hovertemplate=hover("%{y:.2f} %")))
    if waiting:
        panels.append(Panel(waiting, {**unit, "yaxis": {"title": {"text": "% of the step"}, "rangemode": "tozero"}}, "communication that is not hidden", 260, steps=True))
    return Figure("speed", "Throughput and memory", "FLOPs by the paper's formula: at k experts per token (line), and of the experts that were on (dotted).", "", panels, small=True) if panels else None


def optimizer(subjects):
    panels = []
    for key, name, kind in (("grad_norm", "gradient norm", "log"), ("lr", "learning rate", "linear")):
        traces = several_names(subjects, key, lambda s: line(s.run.steps, s.run.column(key), s.name, s.colour, hovertemplate=hover("%{y:.4g}")))
        if traces:
            panels.append(Panel(traces, {"xaxis": STEP_AXIS, "yaxis": {"title": {"text": name}, "type": kind, "exponentformat": "power"}}, name, 240, steps=True))
    return Figure("optimizer", "Gradient and learning rate", "The norm before it was clipped.", "", panels) if panels else None


def stage_times(subjects):
    """Table 6: the sum of `ms` by stage. A run without stages is cut at the steps of the first run that has them"""
    model = next((s.run.stage_spans for s in subjects if len(s.run.stage_spans) == 3), None)
    if model is None:
        model = next((s.run.stage_spans for s in subjects if s.run.stage_spans), None)
    rows, note = [], []
    for s in subjects:
        run = s.run
        ms, steps = run.column("ms"), run.steps
        if not np.isfinite(ms).any():
            continue
        spans = run.stage_spans or model or []
        if not run.stage_spans and model:
            note.append(f"<b>{escape(s.name)}</b> has no stages: its times are of the same steps.")
        times = {stage: np.nansum(ms[(steps >= first) & (steps <= last if last != spans[-1][2] or run.stage_spans else True)])
                 for stage, first, last in spans}
        rows.append([s.name, *(duration(times.get(stage, np.nan)) for stage in (1, 2, 3)), duration(np.nansum(ms)),
                     str(run.settled) if run.settled is not None else "–"])
    if not rows:
        return None
    rows += [[Html(f"<i>{name}</i>"), *(f"{hours:.2f} h" for hours in times), "–"] for name, *times in PUBLISHED_HOURS]
    head = ["run", *(STAGE_NAMES[stage] for stage in (1, 2, 3)), "total", "settled after steps"]
    return Figure("stage-times", "Time of the stages", "The sum of the steps' times. (The paper's runs had 120 billion tokens.) " + " ".join(note), "Table 6", [], table(head, rows))


FIGURES = [stages, loss, sparsity, validation, layers, load, experts_by_step, flips, stage_times, speed, optimizer]
