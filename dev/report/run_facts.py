"""
What the page says of a run beside its figures: in short, what is wrong with its log, what it was made from
(HTML).
"""

import time
from html import escape

import numpy as np

from plot import duration
from sources import whole

LATE = 50  # steps whose mean stands for the end of a run


def when(seconds):
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "unknown"


def late_mean(values, most=LATE):
    """-> the mean of the last finite values, a tenth of them at most; None without any"""
    values = values[np.isfinite(values)]
    return values[-max(1, min(most, len(values) // 10)) :].mean() if len(values) else None


# ---------------------------------------------------------------- in short


def router_fact(s):
    router = s.run.router or (s.stats.router if s.stats else None)
    experts, active = s.run.config.get("num_experts"), s.run.config.get("num_experts_per_tok")
    if s.stats:
        experts, active = s.stats.experts, s.stats.active
    return (router or "not known") + (f", {active} of {experts}" if experts and router != "dense" else "")


def facts(s):
    run = s.run
    yield "router", router_fact(s)
    if run.rows:
        asked = whole(run.options.get("steps"))
        yield "steps", f"{run.steps[-1]}" + (f" of {asked}" if asked not in (None, run.steps[-1]) else "")
    if run.has("lm_loss"):
        yield "training loss", f"{late_mean(run.column('lm_loss')):.4f}"
    losses = run.validations.get("all", {})
    if losses and np.isfinite(losses[max(losses)]):
        yield "validation loss", f"{losses[max(losses)]:.4f}"
    if run.stage_spans:
        yield "settled after", "not yet" if run.settled is None else f"{run.settled} steps"
        if run.has("sparsity"):
            yield f"S, last {LATE} steps", f"{np.nanmean(run.column('sparsity')[-LATE:]):.4f}"
    if run.has("tok_s"):
        yield "tokens/s, late", f"{np.nanmedian(run.column('tok_s')[-max(1, len(run.rows) // 4) :]):,.0f}"
    if run.has("mem_gb"):
        yield "memory", f"{np.nanmax(run.column('mem_gb')):.3g} GB"
    if run.has("ms"):
        yield "time of all steps", duration(np.nansum(run.column("ms")))


def warnings(run):
    if run.dropped:
        yield f"{run.dropped} row{'s' * (run.dropped > 1)} of its log could not be read: left out."
    if run.cut:
        yield "The log's last line is cut: the run was interrupted, or is still writing."
    if run.checkpoint is None:
        yield "No checkpoint: options, k and E are not known."
    lost = int((~np.isfinite(run.column("lm_loss"))).sum())
    if lost:
        yield f"{lost} step{'s' * (lost > 1)} without a finite loss."


def summary(s):
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts(s))
    notes = "".join(f'<p class="warn">{escape(text)}</p>' for text in warnings(s.run))
    html = f"<h2>{escape(s.name)}</h2><dl>{items}</dl>{notes}"
    return f'<section class="run" style="--run:{s.colour}">{html}</section>'


# ---------------------------------------------------------------- what it was made from


def run_command(run):
    """the options that the checkpoint holds, as a command line"""
    words = ["./train_remoe"]
    for key, value in run.options.items():
        if isinstance(value, (int, float, str)) and value != "":
            text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
            quoted = f"'{text}'" if any(c in text for c in " *?[$") else text
            words.append(f"--{key.replace('_', '-')} {quoted}")
    return " ".join(words)


def shards_text(shards):
    known = [shard for shard in shards if isinstance(shard, dict)]
    texts = [
        f"{shard.get('name')} {shard.get('bytes')} bytes, hash {shard.get('hash')}" for shard in known[:8]
    ]
    return "; ".join(texts) + (f"; {len(known) - 8} more" if len(known) > 8 else "")


def sources(s):
    run = s.run
    yield "run", str(run.folder)
    validations = sum(map(len, run.validations.values()))
    yield "log", f"{len(run.rows)} steps, {validations} validations; written {when(run.changed)}"
    clock = run.column("time")
    clock = clock[np.isfinite(clock)]
    if len(clock):
        yield "trained", f"{when(clock[0])} to {when(clock[-1])}"
    if run.checkpoint is not None:
        yield "checkpoint", str(run.checkpoint)
    for key, name in (
        ("train_data", "training data"),
        ("val_data", "validation data"),
        ("tokenizer", "vocabulary"),
    ):
        if isinstance(run.options.get(key), str):
            yield name, run.options[key]
    if isinstance(run.state.get("shards"), list):
        yield "shards", shards_text(run.state["shards"])
    for name, file in (("statistics", s.stats), ("trace", s.trace)):
        if file:
            step = file.metadata.get("step", "unknown")
            made = f"of {file.checkpoint or 'an unnamed checkpoint'} (step {step})"
            yield name, f"{file.path}, {made}; written {when(file.changed)}"


def made_from(s):
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in sources(s))
    html = f'<h4><i style="background:{s.colour}"></i>{escape(s.name)}</h4>'
    html += f'<div class="table"><table class="facts"><tbody>{rows}</tbody></table></div>'
    if s.run.options:
        command = escape(run_command(s.run))
        html += f"<details><summary>its options, as a command</summary><pre>{command}</pre></details>"
    return html
