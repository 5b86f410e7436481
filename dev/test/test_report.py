"""
dev/report, three ways: its numbers against counts made in the plainest way; damaged, foreign and missing input, of which each must
give a page or a sentence and exit 1, never a traceback; the page in a headless Chromium, offline, wide and narrow.

    dev/test/test_report.sh
"""
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "dev/report"), str(ROOT / "dev/test")]

import coloured_text # noqa: E402
import figures_routing # noqa: E402
import figures_training # noqa: E402
import plot # noqa: E402
import report # noqa: E402
import report_inputs # noqa: E402
import small_png # noqa: E402
from browser import Browser, find_browser # noqa: E402
from plot import Subject # noqa: E402
from routing_files import Stats, Trace # noqa: E402
from sources import Run, nested # noqa: E402

HERE = ROOT / "build/test/report"
MOST_PAGE = 6_000_000
checks = failed = 0


def check(what, ok, figure=""):
    global checks, failed
    checks += 1
    if not ok:
        failed += 1
        print(f"FAILED {what} {figure}", flush=True)


def near(a, b, most=1e-12):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and bool((np.abs(a - b) <= most * np.maximum(np.abs(b), 1e-300)).all())


# ---------------------------------------------------------------- numbers

def test_statistics():
    path = HERE / "numbers.safetensors"
    mask, ids, where = report_inputs.write_stats(path, layers=4, experts=6, vocabulary=40, tokens=300, every_layer=True, seed=3)
    stats = Stats(path)
    n, layers, experts = mask.shape
    ratio = np.zeros((6, layers, experts))
    for i in range(n): # a token at a time
        for l in range(layers):
            for e in range(experts):
                ratio[where[i], l, e] += bool(mask[i, l, e]) / 300
    check("routed ratio", near(stats.ratio, ratio, 1e-12))
    check("routed ratio of all", near(stats.ratio_all, mask.mean(0)))
    mean = [mask[ids == v].sum() / (layers * (ids == v).sum()) if (ids == v).any() else math.nan for v in range(40)]
    check("mean active experts", near(np.nan_to_num(stats.mean_active), np.nan_to_num(mean)))
    distance = []
    for l in range(layers):
        split = lambda x: [value / sum(x) for value in x]
        middle = split([sum(ratio[d, l, e] for d in range(6)) / 6 for e in range(experts)])
        distance.append(sum(sum(abs(p - q) for p, q in zip(split(ratio[d, l]), middle)) / 2 for d in range(6)) / 6)
    check("specialisation", near(figures_routing.specialisation(stats), distance, 1e-10), figures_routing.specialisation(stats))
    same = type("Same", (), {"ratio": np.tile([[0.1, 0.3]], (3, 2, 1)), "tokens": np.ones(3)})
    check("no specialisation", near(1 + figures_routing.specialisation(same), [1, 1]))


def test_table_12():
    count, used = np.array([100, 50, 200, 30, 40]), np.array([98, 50, 199, 29, 0])
    words = {10: b"a", 11: b"b", 12: b"c", 13: b"d", 14: b"e"}
    row = figures_routing.expert_row(count, used, np.arange(10, 15), words, 3)
    texts = [part.split("<sub>")[0][-1] for part in row[1].split("</sub>")[:-1]]
    check("table 12: P >= 0.97, by frequency", row[0] == "3" and texts == ["c", "a", "b"], texts)
    row = figures_routing.expert_row(count, used // 2, np.arange(10, 15), words, 3)
    check("table 12: without such, the largest P", "pale" in row[1] and "50.0%" in row[1], row)


def test_ranks():
    check("ranks share a tie", figures_routing.ranks(np.array([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2])
    check("Spearman of a rising map", near(figures_routing.spearman(np.arange(9.0), np.exp(np.arange(9.0))), 1))
    # 1 - 6 sum d^2 / (n (n^2 - 1)) where no ranks are shared: d = 1 1 1 1 0
    check("Spearman by hand", near(figures_routing.spearman(np.array([1, 2, 3, 4, 5.0]), np.array([2, 1, 4, 3, 5.0])), 1 - 24 / 120))
    check("Spearman of a constant", math.isnan(figures_routing.spearman(np.ones(4), np.arange(4.0))))


def test_thinning():
    x, y = np.arange(1, 60001), np.sin(np.arange(60000) / 900.0)
    y[[17, 31234]] = [9, -9]
    kept = plot.kept_points(x, [y])
    check("a long curve has few points", 500 < len(kept) <= plot.MOST_POINTS, len(kept))
    check("no spike is lost", {0, 17, 31234, 59999} <= set(kept.tolist()))
    check("the first steps stay", (np.diff(kept[:20]) <= 2).all(), kept[:20])
    check("a short curve stays whole", len(plot.kept_points(x[:2000], [y[:2000]])) == 2000)
    check("all NaN", len(plot.kept_points(x, [np.full(60000, np.nan)])) == 2)
    check("running mean", near(plot.running_mean(np.array([1, np.nan, 3, 5, 7.0]), 2), [1, 1, 3, 4, 6]))


def test_bytes():
    pieces = [b"caf\xc3", b"\xa9", b" ", b"\xff", b"\xe6\x9d", b"\xb1!", b"x\xe6"]
    shown = coloured_text.show_bytes(pieces)
    check("characters over tokens", shown == ["café", "·", " ", "\\xff", "東", "!", "x\\xe6"], shown)
    check("GPT-2's bytes", sorted(report_bytes().values()) == list(range(256)))
    check("nested", nested([[1, 2], [3, None]], 2).shape == (2, 2) and nested([[1], [2, 3]], 2) is None and nested([1, [2]], 2) is None and nested("x", 1) is None)


def report_bytes():
    from sources import byte_of_unicode
    return byte_of_unicode()


def test_png():
    """every filter of the format, applied by its definition"""
    image = np.random.default_rng(5).integers(0, 256, (10, 7, 3)).astype(np.uint8)
    image[:, 2:5] = image[0, 0]
    rows, flat = b"", image.reshape(10, 21).astype(int)
    for y in range(10):
        above = flat[y - 1] if y else np.zeros(21, int)
        row = [y % 5]
        for i in range(21):
            a, b, c = (flat[y, i - 3] if i >= 3 else 0), above[i], (above[i - 3] if i >= 3 else 0)
            paeth = min((abs(a + b - c - v), place, v) for place, v in enumerate((a, b, c)))[2]
            row.append(int(flat[y, i] - (0, a, b, (a + b) // 2, paeth)[y % 5]) % 256)
        rows += bytes(row)
    part = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    size = (7).to_bytes(4, "big") + (10).to_bytes(4, "big")
    data = small_png.SIGNATURE + part(b"IHDR", size + b"\x08\x02\0\0\0") + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
    check("PNG: read", (small_png.read(data) == image).all())
    parts = dict(small_png.chunks(small_png.smaller(data)))
    index = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(10, 8)[:, 1:]
    check("PNG: few colours stay as they are", (np.frombuffer(parts[b"PLTE"], np.uint8).reshape(-1, 3)[index] == image).all())


def test_run():
    run = Run(report_inputs.write_run(HERE / "run-numbers", steps=50, val_every=25))
    check("stages", run.stage_spans == [(1, 1, 10), (2, 11, 20), (3, 21, 50)] and run.settled == 20, run.stage_spans)
    check("target, tokens", run.target == 0.875 and run.tokens_per_step == 3072)
    check("validations", sorted(run.validations["all"]) == [25, 50] and len(run.validations) == 7)
    bare = Run(report_inputs.write_run(HERE / "run-bare", steps=50, checkpoint=False))
    check("tokens from the speed", bare.tokens_per_step == 3072 and bare.target is None)
    figure = figures_training.stage_times([Subject("a", "#000", run)])
    check("Table 6", all(text in figure.html for text in ("<td>3.00 s</td><td>2.00 s</td><td>3.00 s</td><td>8.00 s</td><td>20</td>", "119.12 h")), figure.html[:600])
    topk = Run(report_inputs.write_run(HERE / "run-topk", "topk", steps=50))
    figure = figures_training.stage_times([Subject("a", "#000", topk), Subject("b", "#000", run)])
    check("Table 6: the same steps", "<td>a</td><td>1.00 s</td><td>1.00 s</td><td>3.00 s</td><td>5.00 s</td>" in figure.html, figure.html[:600])


def test_trace():
    report_inputs.write_trace(HERE / "numbers-trace.safetensors", layers=2, experts=4, sources=("a", "b"))
    trace = Trace(HERE / "numbers-trace.safetensors")
    name, begin, end = trace.sources[1]
    data = coloured_text.source_json(trace, name, begin, end, 10)
    again = np.zeros((2, 10, 4))
    for l, layer in enumerate(data["on"]):
        for t, cell in enumerate(layer):
            again[l, t, cell[0::2]] = cell[1::2]
    check("gates of a source", np.allclose(again, trace.gates[:, begin:begin + 10], atol=5e-3, rtol=5e-3) and ((again > 0) == (trace.gates[:, begin:begin + 10] > 0)).all())
    check("loss of a source", data["loss"][0] is None and near(data["loss"][1:], trace.loss[begin + 1:begin + 10], 1e-3) and data["ids"] == trace.ids[begin:begin + 10].tolist())


# ---------------------------------------------------------------- input that is not as it should be

def call(*words):
    """-> exit status, what it printed; in this process, since Python and plotly start slowly"""
    said = io.StringIO()
    before, sys.argv = sys.argv, ["report.py", *map(str, words)]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = report.main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        status = -1
        said.write(traceback.format_exc())
    finally:
        sys.argv = before
    return status, said.getvalue()


def page(what, *words, has=()):
    out = HERE / "page.html"
    out.unlink(missing_ok=True)
    status, said = call(*words, "--out", out)
    text = out.read_text() if out.exists() else ""
    ok = status == 0 and text.endswith("</html>\n") and len(text) <= MOST_PAGE and all(word in text for word in has)
    check(f"a page of {what}", ok, (status, said[-1500:], [word for word in has if word not in text]))
    return text


def refuse(what, *words, has):
    status, said = call(*words, "--out", HERE / "refused.html")
    ok = status == 1 and said.startswith("error: ") and "Traceback" not in said and all(word in said for word in has) and not (HERE / "refused.html").exists()
    check(f"a sentence about {what}", ok, (status, said[-1500:]))


def with_log(name, text, **more):
    folder = report_inputs.write_run(HERE / name, steps=10, **more)
    (folder / "log.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def rows_of(folder):
    return (folder / "log.jsonl").read_bytes().split(b"\n")[:-1]


def test_logs():
    good = report_inputs.write_run(HERE / "good", steps=10)
    lines = rows_of(good)
    page("a run", good, has=["Three stages", "--eval --stats", "--trace", "Table 6"])
    page("an interrupted run", with_log("cut", b"\n".join(lines[:5]) + b"\n" + lines[5][:40], checkpoint=False), has=["cut: the run was interrupted", "No checkpoint"])
    page("one step", with_log("one", lines[0] + b"\n"), has=["Training loss"])
    page("one step without an end of line", with_log("one-open", lines[0]), has=["Training loss"])
    page("a validation alone", with_log("val", b'{"step": 5, "val_loss": 2.5, "domain": "all"}\n'), has=["2.5000"])
    page("rows that are no rows", with_log("junk", b"\n".join([b"x", b"[]", b"3", b"{}", b'{"step": -1, "lm_loss": 1}', b'{"step": "3", "lm_loss": 1}', b'{"step": 1e400}', b"\0" * 50,
         b"[" * 100000, b"\xff\xfe{", b'{"step": 2, "val_loss": 1, "domain": 7}', b'{"step": 1' + b"0" * 5000 + b"}", *lines[:4]]) + b"\n"), has=["12 rows of its log could not be read"])
    nothing = [{"step": i, "lm_loss": None} for i in range(3)]
    page("NaN losses", with_log("null", "\n".join(map(json.dumps, nothing)) + "\n"), has=["3 steps have no finite loss"])
    page("NaN and infinity as words", with_log("nan", b'{"step": 0, "lm_loss": NaN, "sparsity": Infinity, "lambda": -Infinity, "ms": NaN, "stage": NaN}\n{"step": 1, "lm_loss": 1e999, "sparsity": 1, "stage": 1e99, "ms": 1}\n'))
    page("keys of other kinds", with_log("kinds", b'{"step": 0, "lm_loss": "x", "sparsity": [], "stage": {}, "layer_sparsity": 3, "tokens_per_expert": 5, "ms": true, "layer_expert_tokens": [[1], 2], "flip_rate": "a"}\n'
         b'{"step": 1, "lm_loss": 2, "layer_sparsity": [0.5, null, "x"], "layer_expert_tokens": [[1, 2], [3]], "layer_flip_rate": [], "flip_rate": 0.5, "time": 1e300}\n'
         b'{"step": 2, "lm_loss": 2, "layer_sparsity": [0.5], "lambda": -1, "sparsity": -5, "stage": 2, "tok_s": 1e308, "ms": 1e308}\n'))
    backwards = [lines[7], lines[3], lines[3], lines[0], lines[7]]
    page("steps out of order and twice", with_log("order", b"\n".join(backwards) + b"\n"))
    page("huge numbers", with_log("huge", json.dumps({"step": 2 ** 52, "lm_loss": 1e308, "ms": 1e308, "tok_s": 1e-300, "sparsity": 1e300, "stage": 3}) + "\n" + lines[0].decode() + "\n"))
    hostile = '</script><script>alert(1)</script><img src=x onerror=alert(2)>\ud800"'
    text = page("a hostile domain", with_log("hostile", "\n".join(json.dumps({"step": s, "val_loss": 1 + s, "domain": hostile}) for s in (0, 1)) + "\n" + lines[0].decode() + "\n"))
    check("its name is escaped", "<img src=x" not in text and "<script>alert" not in text)
    bad = report_inputs.write_run(HERE / "bad-state", steps=10)
    (bad / "step_00000010/state.json").write_text('{"options": [1], "shards": {"a": 1}, "version": 7}')
    (bad / "step_00000010/config.json").write_text('{"num_experts": -8, "num_experts_per_tok": "1", "router": 3')
    page("a damaged checkpoint", bad)
    (bad / "step_00000010/config.json").write_text('{"num_experts": 0, "num_experts_per_tok": "1", "router": [3]}')
    (bad / "step_00000010/state.json").write_text('{"options": {"batch": "a", "seq_len": null, "steps": [], "train_data": {}}, "shards": [1, {}]}')
    page("a foreign checkpoint", bad)


def test_refusals():
    (HERE / "empty").mkdir()
    refuse("a folder that is not there", HERE / "none", has=["no folder", "--->"])
    refuse("an empty folder", HERE / "empty", has=["no log.jsonl", "--->"])
    refuse("a log without rows", with_log("no-rows", b""), has=["no row that can be read", "--->"])
    refuse("a log of junk", with_log("only-junk", b"x\ny\n"), has=["no row that can be read (2 that cannot)"])
    good = HERE / "good"
    refuse("a run named twice", good, good, has=["named twice"])
    refuse("too many files", good, "--stats", "a", "b", has=["2 files for --stats, 1 runs"])
    os.mkfifo(HERE / "empty/log.jsonl")
    refuse("a FIFO", HERE / "empty", has=["not a regular file"])
    (HERE / "folder.html").mkdir()
    status, said = call(good, "--out", HERE / "folder.html")
    check("an output that is a folder", status == 1 and "cannot write" in said, (status, said))
    status, said = call(good, "--out", HERE / "good/log.jsonl/x.html")
    check("an output under a file", status == 1 and "cannot write" in said, (status, said))
    status, said = call(good, "--out", "/dev/full/x")
    check("an output nowhere", status == 1 and said.startswith("error: "), (status, said))
    status, said = call()
    check("no run: usage, exit 2", status == 2 and "usage:" in said, (status, said))


def test_files():
    run, path = HERE / "good", HERE / "file.safetensors"

    def stats(what, change=None, meta=None, has=("file.safetensors", "--->")):
        report_inputs.write_stats(path, tokens=200)
        tensors, header = load_file(path), report_inputs.metadata("stats", "relu", 3, 8, 1, 64, domains=json.dumps(report_inputs.DOMAINS), used_layers="[1]")
        if change:
            change(tensors)
        save_file(tensors, path, {**header, **(meta or {})})
        refuse(f"statistics {what}", run, "--stats", path, has=has)

    refuse("a stats file that is not there", run, "--stats", HERE / "none.safetensors", has=["cannot read"])
    for size in (0, 7, 100, 5000):
        report_inputs.write_stats(path, tokens=200)
        path.write_bytes(path.read_bytes()[:size])
        refuse(f"a stats file of {size} bytes", run, "--stats", path, has=["damaged", "--stats RUN/stats.safetensors"])
    path.write_bytes(b"\xff" * 64)
    refuse("a file of ones", run, "--stats", path, has=["damaged"])
    path.write_bytes((2 ** 62).to_bytes(8, "little") + b"{}")
    refuse("a header of 2^62 bytes", run, "--stats", path, has=["damaged"])
    save_file({"a": np.zeros(3)}, path)
    refuse("weights", run, "--stats", path, has=["not a stats file"])
    report_inputs.write_trace(path)
    refuse("a trace for statistics", run, "--stats", path, has=["it is a trace file"])
    stats("without counts", lambda t: t.pop("count"), has=["lacks the tensor count"])
    stats("of another shape", lambda t: t.update(count=t["count"][:5]), has=["count is int64[5]"])
    stats("of another kind", lambda t: t.update(count=t["count"].astype(np.float32)), has=["count is float32"])
    stats("with a negative count", lambda t: t["count"].__setitem__(3, -1), has=["negative"])
    stats("whose sums differ", lambda t: t["count"].__setitem__(3, t["count"][3] + 1), has=["differ"])
    stats("with more routed than tokens", lambda t: t["tokens"].__setitem__(0, 1), has=["more tokens than its domain"])
    stats("with more uses than occurrences", lambda t: t["used.1"].__setitem__((0, 0), 10 ** 6), has=["more often than it occurs"])
    stats("without a domain's tensor", lambda t: t.pop("routed.books"), has=["routed.books"])
    for key, value in (("layers", "0"), ("layers", "3.5"), ("experts", "-1"), ("vocab_size", "9" * 40), ("domains", "{}"), ("domains", "["), ("used_layers", "[9]"), ("used_layers", "x")):
        stats(f"with {key} {value[:10]}", meta={key: value}, has=[f"'{key}'"])
    report_inputs.write_stats(path, "topk", tokens=200)
    refuse("statistics of another router", run, "--stats", path, has=["of a topk model", "relu run"])
    report_inputs.write_stats(path, layers=5, tokens=200)
    refuse("statistics of other layers", run, "--stats", path, has=["of 5 layers"])
    report_inputs.write_stats(path, tokens=3)
    page("statistics of 3 tokens a domain", run, "--stats", path, has=["fewer than 10 token ids"])
    report_inputs.write_stats(path, tokens=50, domains=["one"])
    page("statistics of one domain", run, "--stats", path)
    report_inputs.write_stats(path, experts=40, tokens=50, k=2)
    page("statistics of 40 experts", run, "--stats", path, "--trace", trace_of_40())

    def trace(what, change, meta=None, has=("--->",)):
        report_inputs.write_trace(path)
        tensors, header = load_file(path), report_inputs.metadata("trace", "relu", 3, 8, 1, 64, sources='["text.txt"]')
        change(tensors)
        save_file(tensors, path, {**header, **(meta or {})})
        refuse(f"a trace {what}", run, "--trace", path, has=has)

    trace("without ids", lambda t: t.pop("ids"), has=["no token"])
    trace("with offsets that fall", lambda t: t["offsets"].__setitem__(5, 0), has=["offsets"])
    trace("with offsets beyond its bytes", lambda t: t["offsets"].__setitem__(-1, 10 ** 9), has=["offsets"])
    trace("with other gates", lambda t: t.update(gates=t["gates"][:, :5]), has=["gates is"])
    trace("whose sources fall", lambda t: t.update(starts=np.array([3])), has=["sources"])
    trace("without names of sources", lambda t: None, {"sources": "7"}, has=["'sources'"])
    report_inputs.write_trace(path, times=200)
    page("a long trace", run, "--trace", path)
    report_inputs.write_trace(path)
    tensors = load_file(path)
    tensors["gates"][0, 3, 2], tensors["loss"][5] = np.nan, np.inf
    save_file(tensors, path, report_inputs.metadata("trace", "relu", 3, 8, 1, 64, sources='["</script>"]'))
    page("a trace with NaN", run, "--trace", path)


def trace_of_40():
    report_inputs.write_trace(HERE / "trace-40.safetensors", experts=40, k=2)
    return HERE / "trace-40.safetensors"


def test_size():
    """5,000 rows of 24 layers, twice: below 6 MB all the same"""
    row = {"lm_loss": 2.5, "reg_loss": 0.1, "lambda": 1.0, "sparsity": 0.9, "ms": 1.0, "tok_s": 3e6, "tflops": 1.0, "tflops_active": 1.0, "mfu": 0.4, "mfu_active": 0.4, "mem_gb": 1.0, "grad_norm": 1.0, "lr": 1e-3,
           "dead_experts": 0, "zero_expert_tokens": 1}
    rng = np.random.default_rng(1)
    for name in ("long-1", "long-2"):
        folder = report_inputs.write_run(HERE / name, steps=3, layers=24)
        noise = rng.random((5000, 24)).round(4)
        with open(folder / "log.jsonl", "w") as log:
            for i in range(5000):
                log.write(json.dumps({"step": 12 * i, **{key: value + float(noise[i, 0]) for key, value in row.items()}, "stage": 1 + (i > 20) + (i > 40), "layer_sparsity": noise[i].tolist(), "layer_flip_rate": noise[i].tolist(),
                                      "flip_rate": 0.1, "flip_count": 0.1}) + "\n")
    page("two long runs", HERE / "long-1", HERE / "long-2")


# ---------------------------------------------------------------- follow.py

def test_follow():
    folder = report_inputs.write_run(HERE / "followed", steps=10)
    lines = rows_of(folder)
    (folder / "log.jsonl").write_bytes(b"\n".join(lines[:4]) + b"\n" + lines[4][:30])
    from follow import Log, flat
    log = Log(folder / "log.jsonl")
    check("follow: complete lines only", [step for step, _ in log.new_rows()] == [1, 2, 3, 4])
    (folder / "log.jsonl").write_bytes(b"\n".join(lines[:6]) + b"\n")
    check("follow: the rest of a line", [step for step, _ in log.new_rows()] == [5, 6])
    other = folder / "log.jsonl.new"
    other.write_bytes(b"\n".join(lines[:3]) + b"\n")
    other.replace(folder / "log.jsonl")
    check("follow: a log that was cut back", log.new_rows() == [])
    with open(folder / "log.jsonl", "ab") as file:
        file.write(b"\n".join(lines[3:8]) + b"\n")
    check("follow: goes on, no row twice", [step for step, _ in log.new_rows()] == [7, 8])
    check("follow: names", flat({"step": 3, "a": 1, "b": {"c": None, "d": 2}, "e": [5, float("nan")], "f": "x"}) == {"a": 1, "b/d": 2, "e/0": 5})
    for words, said in ((["--once"], "report.html"), (["--once", "--tensorboard", str(HERE / "tb")], "tensorboardX"), (["--once", "--wandb", "x"], "wandb")):
        done = subprocess.run([sys.executable, "-c", BLOCKED, str(folder), *words], cwd=ROOT, capture_output=True, text=True)
        check(f"follow {words}", done.returncode == (0 if words == ["--once"] else 1) and said in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr[-800:])
    done = subprocess.run([sys.executable, "dev/report/follow.py", str(HERE / "nowhere"), "--once"], cwd=ROOT, capture_output=True, text=True)
    check("follow: no run", done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr, done.stderr[-800:])


# the mirrors' libraries are missing, whether or not they are installed here
BLOCKED = """
import sys
for name in ("tensorboardX", "torch", "wandb"):
    sys.modules[name] = None
sys.path.insert(0, "dev/report")
sys.argv[0] = "follow.py"
import follow
sys.exit(follow.main())
"""


# ---------------------------------------------------------------- the browser

FIGURES = ["stages", "loss", "sparsity", "validation", "layers", "load", "load-by-step", "flips", "stage-times", "speed", "optimizer", "heat", "layer-sparsity", "domains", "specialisation",
           "active-by-domain", "frequency", "token-experts", "text"]
COUNT_MARKS = """(() => Object.fromEntries([...document.querySelectorAll(".plot")].filter((p) => p.offsetParent).map((p) => [p.closest(".card").id + "/" + p.id,
    p.querySelectorAll(".js-line, .points path, .bars .point path, .hm image, .heatmaplayer image").length])))()"""
CENTRE = """(() => { const e = document.querySelector(%r); e.scrollIntoView({block: "center"}); const r = e.getBoundingClientRect(); return [r.left + r.width * %g, r.top + r.height * %g]; })()"""


def place(page, selector, x=0.5, y=0.5):
    return page.eval(CENTRE % (selector, x, y))


def click(page, selector):
    page.click(*place(page, selector))


def test_browser():
    if find_browser() is None:
        print("report: the page in a browser: skipped: no Chromium here (apt-get install chromium)")
        return
    runs = report_inputs.write_both(HERE / "browser", steps=60)
    out = HERE / "browser.html"
    status, said = call(*runs, "--out", out)
    check("the page for the browser", status == 0, said)
    with Browser() as browser:
        for width, height, dark in ((1280, 900, False), (400, 800, True)):
            see(browser, out, width, height, dark)


def see(browser, out, width, height, dark):
    page, where = browser.open(out, width, height, dark=dark, touch=width < 600), f"at {width}:"
    page.wait("window.report && report.ready")
    page.eval("report.drawAll().then(() => 1)")
    check(f"{where} all figures", page.eval("[...document.querySelectorAll('.card[id]')].map((c) => c.id)") == FIGURES, page.eval("[...document.querySelectorAll('.card[id]')].map((c) => c.id)"))
    marks = page.eval(COUNT_MARKS)
    check(f"{where} every plot has marks", len(marks) > 30 and all(marks.values()), [name for name, n in marks.items() if not n])
    check(f"{where} no horizontal scroll", page.eval("document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"))
    see_hover(page, where, width < 600)
    see_layers(page, where)
    see_choices(page, where, dark)
    see_text(page, where)
    check(f"{where} still no horizontal scroll", page.eval("document.documentElement.scrollWidth <= innerWidth"))
    page.screenshot(HERE / f"page-{width}.png", whole=True)
    page.eval("localStorage.clear()")
    check(f"{where} no error, no network", page.trouble == [], page.trouble[:3])


def see_hover(page, where, touch):
    for card, mark in (("stages", ".nsewdrag"), ("heat", ".heatmaplayer image"), ("domains", ".bars .point path")):
        spot = place(page, f"#{card} .plot {mark}")
        if touch:
            for kind, points in (("touchStart", [{"x": spot[0], "y": spot[1]}]), ("touchEnd", [])):
                page.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
        page.mouse(spot[0] - 3, spot[1])
        page.mouse(*spot)
        try:
            page.wait(f"/[0-9]/.test((document.querySelector('#{card} .hoverlayer') || {{}}).textContent || '')", 5)
            ok = True
        except Exception:
            ok = False
        check(f"{where} {card} tells a value", ok)


def see_layers(page, where):
    panels, lines = "[...document.querySelectorAll('#domains .panel')].filter((p) => p.offsetParent).length", "document.querySelectorAll('#layers .js-line').length"
    before = page.eval(panels), page.eval(lines)
    click(page, "#choose-layers button[data-n='1']")
    page.wait(f"{lines} < {before[1]}", 5)
    after = page.eval(panels), page.eval(lines)
    check(f"{where} a layer is left out", before[0] == 6 and after[0] == 4 and after[1] == before[1] - 2, (before, after))
    click(page, "#choose-layers button[data-n='1']")
    page.wait(f"{lines} == {before[1]}", 5)
    for n in (0, 1, 2):
        click(page, f"#choose-layers button[data-n='{n}']")
    check(f"{where} the last layer stays", page.eval(panels) == 2, page.eval(panels))
    page.eval("report.chooseLayers([0, 1, 2])")


def see_choices(page, where, dark):
    page.eval("document.querySelector('#stages .plot').scrollIntoView()")
    click(page, "#choose-steps button[data-log='1']")
    check(f"{where} logarithmic steps", page.eval("document.querySelector('#stages .plot')._fullLayout.xaxis.type") == "log")
    lines = "document.querySelectorAll('#stages .js-line').length"
    before = page.eval(lines)
    click(page, "#stages .legend button")
    page.wait(f"{lines} == {before} - 1", 5)
    click(page, "#stages .legend button")
    colour = "[getComputedStyle(document.body).backgroundColor, document.querySelector('#stages .plot')._fullLayout.font.color]"
    seen = page.eval(colour)
    check(f"{where} the reader's colours", (int(seen[0].split("(")[1].split(",")[0]) < 60) == dark, seen)
    page.eval("scrollTo(0, 0)")
    click(page, "#theme")
    other = page.eval(colour)
    check(f"{where} the switch", other[0] != seen[0] and other[1] != seen[1], (seen, other))
    click(page, "#theme")
    check(f"{where} and back", page.eval(colour) == seen)


def see_text(page, where):
    tokens = "document.querySelectorAll('#coloured .tokens span').length"
    check(f"{where} tokens of both runs", page.eval(tokens) == 116, page.eval(tokens))
    shades = set()
    for shade in ("count", "expert", "loss"):
        click(page, f"#shade button[data-shade='{shade}']")
        shades.add(page.eval("document.querySelectorAll('#coloured .tokens span')[5].style.background"))
    check(f"{where} three shades", len(shades) == 3, shades)
    click(page, "#coloured .tokens span[data-t='5']")
    check(f"{where} a token tells its gates", page.eval("!document.getElementById('tip').hidden && /relu: loss [0-9.]+.*layer.*topk: loss/s.test(document.getElementById('tip').textContent)"),
          page.eval("document.getElementById('tip').textContent"))
    page.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
    check(f"{where} the next token", page.eval("/token 6,/.test(document.getElementById('tip').textContent)"), page.eval("document.getElementById('tip').textContent"))
    page.send("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape")
    check(f"{where} and it goes", page.eval("document.getElementById('tip').hidden"))


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    for test in (test_statistics, test_table_12, test_ranks, test_thinning, test_bytes, test_png, test_run, test_trace, test_logs, test_refusals, test_files, test_size, test_follow, test_browser):
        begin = time.monotonic()
        try:
            test()
        except Exception:
            check(test.__name__, False, traceback.format_exc())
        if "--times" in sys.argv:
            print(f"{test.__name__:20} {time.monotonic() - begin:6.1f} s")
    print(f"report          {'ok' if failed == 0 else 'FAILED'} {checks} checks, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
