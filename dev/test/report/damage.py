"""
Input that is not as it should be: a log with rows that are none, a folder without a log, a file that was cut
or is another's. Each gives a page that says what is missing, or a sentence and exit 1.
"""

import json
import os
import subprocess
import sys
import time

import numpy as np
from safetensors.numpy import load_file, save_file

import inputs
from checks import HERE, ROOT, call, check

MOST_PAGE = 6_000_000
WORDS_FOR_NUMBERS = b"""\
{"step": 0, "lm_loss": NaN, "sparsity": Infinity, "lambda": -Infinity, "ms": NaN, "stage": NaN}
{"step": 1, "lm_loss": 1e999, "sparsity": 1, "stage": 1e99, "ms": 1}
"""
OTHER_KINDS = b"""\
{"step": 0, "lm_loss": "x", "sparsity": [], "stage": {}, "layer_sparsity": 3, "tokens_per_expert": 5}
{"step": 1, "lm_loss": 2, "layer_expert_tokens": [[1], 2], "flip_rate": "a", "layer_sparsity": [1, null, "x"]}
{"step": 2, "lm_loss": 2, "layer_expert_tokens": [[1, 2], [3]], "layer_flip_rate": [], "time": 1e300}
{"step": 5, "lm_loss": 2, "flip_rate": 0.5, "ms": true}
{"step": 3, "lm_loss": 2, "layer_sparsity": [0.5], "lambda": -1, "sparsity": -5, "stage": 2, "tok_s": 1e308}
"""


def page(what, *words, has=()):
    out = HERE / "page.html"
    out.unlink(missing_ok=True)
    status, said = call(*words, "--out", out)
    text = out.read_text() if out.exists() else ""
    ok = (
        status == 0
        and text.endswith("</html>\n")
        and len(text) <= MOST_PAGE
        and all(word in text for word in has)
    )
    check(f"a page of {what}", ok, (status, said[-1500:], [word for word in has if word not in text]))
    return text


def refuse(what, *words, has):
    status, said = call(*words, "--out", HERE / "refused.html")
    ok = (
        status == 1
        and said.startswith("error: ")
        and "Traceback" not in said
        and all(word in said for word in has)
        and not (HERE / "refused.html").exists()
    )
    check(f"a sentence about {what}", ok, (status, said[-1500:]))


def with_log(name, text, **more):
    folder = inputs.write_run(HERE / name, steps=10, **more)
    (folder / "log.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def rows_of(folder):
    return (folder / "log.jsonl").read_bytes().split(b"\n")[:-1]


def test_logs():
    good = inputs.write_run(HERE / "good", steps=10)
    lines = rows_of(good)
    page("a run", good, has=["Three stages", "--eval --val-data", "--stats", "--trace", "Table 6"])
    page(
        "an interrupted run",
        with_log("cut", b"\n".join(lines[:5]) + b"\n" + lines[5][:40], checkpoint=False),
        has=["cut: the run was interrupted", "No checkpoint"],
    )
    page("one step", with_log("one", lines[0] + b"\n"), has=["Training loss"])
    page("one step without an end of line", with_log("one-open", lines[0]), has=["Training loss"])
    page(
        "a validation alone",
        with_log("val", b'{"step": 5, "val_loss": 2.5, "domain": "all"}\n'),
        has=["2.5000"],
    )
    page(
        "rows that are no rows",
        with_log(
            "junk",
            b"\n".join(
                [
                    b"x",
                    b"[]",
                    b"3",
                    b"{}",
                    b'{"step": -1, "lm_loss": 1}',
                    b'{"step": "3", "lm_loss": 1}',
                    b'{"step": 1e400}',
                    b"\0" * 50,
                    b"[" * 100000,
                    b"\xff\xfe{",
                    b'{"step": 2, "val_loss": 1, "domain": 7}',
                    b'{"step": 1' + b"0" * 5000 + b"}",
                    *lines[:4],
                ]
            )
            + b"\n",
        ),
        has=["12 rows of its log could not be read"],
    )
    nothing = [{"step": i, "lm_loss": None} for i in range(3)]
    page(
        "NaN losses",
        with_log("null", "\n".join(map(json.dumps, nothing)) + "\n"),
        has=["3 steps without a finite loss"],
    )
    page("NaN and infinity as words", with_log("nan", WORDS_FOR_NUMBERS))
    page("keys of other kinds", with_log("kinds", OTHER_KINDS))
    backwards = [lines[7], lines[3], lines[3], lines[0], lines[7]]
    page("steps out of order and twice", with_log("order", b"\n".join(backwards) + b"\n"))
    page(
        "huge numbers",
        with_log(
            "huge",
            b'{"step": 4503599627370496, "lm_loss": 1e308, "ms": 1e308, "tok_s": 1e-300, "sparsity": 1e300}\n'
            b'{"step": 9, "lm_loss": 1e29, "ms": 1e29, "tok_s": 1e-29, "sparsity": -1e29, "stage": 3}\n'
            + lines[0]
            + b"\n",
        ),
    )
    hostile = '</script><script>alert(1)</script><img src=x onerror=alert(2)>\ud800"'
    text = page(
        "a hostile domain",
        with_log(
            "hostile",
            "\n".join(json.dumps({"step": s, "val_loss": 1 + s, "domain": hostile}) for s in (0, 1))
            + "\n"
            + lines[0].decode()
            + "\n",
        ),
    )
    check("its name is escaped", "<img src=x" not in text and "<script>alert" not in text)
    bad = inputs.write_run(HERE / "bad-state", steps=10)
    (bad / "step_00000010/state.json").write_text('{"options": [1], "shards": {"a": 1}, "version": 7}')
    (bad / "step_00000010/config.json").write_text(
        '{"num_experts": -8, "num_experts_per_tok": "1", "router": 3'
    )
    page("a damaged checkpoint", bad)
    (bad / "step_00000010/config.json").write_text(
        '{"num_experts": 0, "num_experts_per_tok": "1", "router": [3]}'
    )
    (bad / "step_00000010/state.json").write_text(
        '{"options": {"batch": "a", "seq_len": null, "steps": [], "train_data": {}}, "shards": [1, {}]}'
    )
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
    log = (HERE / "good/log.jsonl").read_bytes()
    refused = [call(good, "--out", HERE / name) for name in ("good/log.jsonl", "empty/log.jsonl")]  # the second: a FIFO
    check("an output that is there and no page", all(s == 1 and "no page" in said for s, said in refused), refused)
    check("... stays", (HERE / "good/log.jsonl").read_bytes() == log, HERE / "good/log.jsonl")
    status, said = call(good, "--out", "/dev/full/x")
    check("an output nowhere", status == 1 and said.startswith("error: "), (status, said))
    status, said = call()
    check("no run: usage, exit 2", status == 2 and "usage:" in said, (status, said))


def test_files():
    run, path = HERE / "good", HERE / "file.safetensors"

    def stats(what, change=None, meta=None, has=("file.safetensors", "--->")):
        inputs.write_stats(path, tokens=200)
        tensors, header = load_file(path), inputs.metadata(
            "stats", "relu", 3, 8, 1, 64, domains=json.dumps(inputs.DOMAINS), used_layers="[1]"
        )
        if change:
            change(tensors)
        save_file(tensors, path, {**header, **(meta or {})})
        refuse(f"statistics {what}", run, "--stats", path, has=has)

    refuse("a stats file that is not there", run, "--stats", HERE / "none.safetensors", has=["cannot read"])
    for size in (0, 7, 100, 5000):
        inputs.write_stats(path, tokens=200)
        path.write_bytes(path.read_bytes()[:size])
        refuse(
            f"a stats file of {size} bytes",
            run,
            "--stats",
            path,
            has=["damaged", "--stats RUN/stats.safetensors"],
        )
    path.write_bytes(b"\xff" * 64)
    refuse("a file of ones", run, "--stats", path, has=["damaged"])
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refuse("a header of 2^62 bytes", run, "--stats", path, has=["damaged"])
    save_file({"a": np.zeros(3)}, path)
    refuse("weights", run, "--stats", path, has=["not a stats file"])
    inputs.write_trace(path)
    refuse("a trace for statistics", run, "--stats", path, has=["it is a trace file"])
    stats("without counts", lambda t: t.pop("count"), has=["lacks the tensor count"])
    stats("of another shape", lambda t: t.update(count=t["count"][:5]), has=["count is int64[5]"])
    stats(
        "of another kind", lambda t: t.update(count=t["count"].astype(np.float32)), has=["count is float32"]
    )
    stats("with a negative count", lambda t: t["count"].__setitem__(3, -1), has=["negative"])
    stats("whose sums differ", lambda t: t["count"].__setitem__(3, t["count"][3] + 1), has=["differ"])
    stats(
        "with more routed than tokens",
        lambda t: t["tokens"].__setitem__(0, 1),
        has=["more tokens than its domain"],
    )
    stats(
        "with more uses than occurrences",
        lambda t: t["used.1"].__setitem__((0, 0), 10**6),
        has=["more often than it occurs"],
    )
    stats("without a domain's tensor", lambda t: t.pop("routed.books"), has=["routed.books"])
    for key, value in (
        ("layers", "0"),
        ("layers", "3.5"),
        ("experts", "-1"),
        ("vocab_size", "9" * 40),
        ("domains", "{}"),
        ("domains", "["),
        ("used_layers", "[9]"),
        ("used_layers", "x"),
    ):
        stats(f"with {key} {value[:10]}", meta={key: value}, has=[f"'{key}'"])
    inputs.write_stats(path, "topk", tokens=200)
    refuse("statistics of another router", run, "--stats", path, has=["of a topk model", "relu run"])
    inputs.write_stats(path, layers=5, tokens=200)
    refuse("statistics of other layers", run, "--stats", path, has=["of 5 layers"])
    inputs.write_stats(path, tokens=3)
    page("statistics of 3 tokens a domain", run, "--stats", path, has=["fewer than 10 token ids"])
    inputs.write_stats(path, tokens=50, domains=["one"])
    page("statistics of one domain", run, "--stats", path)
    inputs.write_stats(path, experts=40, tokens=50, k=2)
    page("statistics of 40 experts", run, "--stats", path, "--trace", trace_of_40())

    def trace(what, change, meta=None, has=("--->",)):
        inputs.write_trace(path)
        tensors, header = load_file(path), inputs.metadata(
            "trace", "relu", 3, 8, 1, 64, sources='["text.txt"]'
        )
        change(tensors)
        save_file(tensors, path, {**header, **(meta or {})})
        refuse(f"a trace {what}", run, "--trace", path, has=has)

    trace("without ids", lambda t: t.pop("ids"), has=["no token"])
    trace("with offsets that fall", lambda t: t["offsets"].__setitem__(5, 0), has=["offsets"])
    trace("with offsets beyond its bytes", lambda t: t["offsets"].__setitem__(-1, 10**9), has=["offsets"])
    trace("with other gates", lambda t: t.update(gates=t["gates"][:, :5]), has=["gates is"])
    trace("whose sources fall", lambda t: t.update(starts=np.array([3])), has=["sources"])
    trace("without names of sources", lambda t: None, {"sources": "7"}, has=["'sources'"])
    inputs.write_trace(path, times=200)
    page("a long trace", run, "--trace", path)
    inputs.write_trace(path)
    tensors = load_file(path)
    tensors["gates"][0, 3, 2], tensors["loss"][5] = np.nan, np.inf
    save_file(tensors, path, inputs.metadata("trace", "relu", 3, 8, 1, 64, sources='["</script>"]'))
    page("a trace with NaN", run, "--trace", path)


def trace_of_40():
    inputs.write_trace(HERE / "trace-40.safetensors", experts=40, k=2)
    return HERE / "trace-40.safetensors"


def test_size():
    """5,000 rows of 24 layers, twice: below 6 MB all the same"""
    row = {
        "lm_loss": 2.5,
        "reg_loss": 0.1,
        "lambda": 1.0,
        "sparsity": 0.9,
        "ms": 1.0,
        "tok_s": 3e6,
        "tflops": 1.0,
        "tflops_active": 1.0,
        "mfu": 0.4,
        "mfu_active": 0.4,
        "mem_gb": 1.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "dead_experts": 0,
        "zero_expert_tokens": 1,
    }
    rng = np.random.default_rng(1)
    for name in ("long-1", "long-2"):
        folder = inputs.write_run(HERE / name, steps=3, layers=24)
        noise = rng.random((5000, 24)).round(4)
        with open(folder / "log.jsonl", "w") as log:
            for i in range(5000):
                log.write(
                    json.dumps(
                        {
                            "step": 12 * i,
                            **{key: value + float(noise[i, 0]) for key, value in row.items()},
                            "stage": 1 + (i > 20) + (i > 40),
                            "layer_sparsity": noise[i].tolist(),
                            "layer_flip_rate": noise[i].tolist(),
                            "flip_rate": 0.1,
                            "flip_count": 0.1,
                        }
                    )
                    + "\n"
                )
    page("two long runs", HERE / "long-1", HERE / "long-2")


# ---------------------------------------------------------------- follow.py


def test_follow():
    folder = inputs.write_run(HERE / "followed", steps=10)
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
    check(
        "follow: names",
        flat({"step": 3, "a": 1, "b": {"c": None, "d": 2}, "e": [5, float("nan")], "f": "x"})
        == {"a": 1, "b/d": 2, "e/0": 5},
    )
    for words, said in (
        (["--once"], "report.html"),
        (["--once", "--tensorboard", str(HERE / "tb")], "tensorboardX"),
        (["--once", "--wandb", "x"], "wandb"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED, str(folder), *words], cwd=ROOT, capture_output=True, text=True
        )
        check(
            f"follow {words}",
            done.returncode == (0 if words == ["--once"] else 1)
            and said in done.stdout + done.stderr
            and "Traceback" not in done.stderr,
            done.stderr[-800:],
        )
    see_the_end(folder)
    done = subprocess.run(
        [sys.executable, "dev/report/follow.py", str(HERE / "nowhere"), "--once"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    check(
        "follow: no run",
        done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr,
        done.stderr[-800:],
    )


def see_the_end(folder):
    """the page reloads itself as long as it is remade, and no longer"""
    page = folder / "report.html"
    page.unlink()
    command = [sys.executable, "dev/report/follow.py", str(folder), "--seconds", "0.3"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if page.exists():
            break
        time.sleep(0.1)
    alive = page.exists() and '"refresh": 5' in page.read_text()
    process.terminate()
    check("follow: ends when told to", process.wait(60) == 0 and alive and '"refresh": 0' in page.read_text())


# the mirrors' libraries are missing, whether or not they are installed here
BLOCKED = """
import sys
import time
for name in ("tensorboardX", "torch", "wandb"):
    sys.modules[name] = None
sys.path.insert(0, "dev/report")
sys.argv[0] = "follow.py"
import follow
sys.exit(follow.main())
"""


def test_needs():
    for script in ("report.py", "follow.py", "pictures.py"):
        program = BLOCKED.replace("follow", script[:-3]).replace('"wandb"', '"numpy"')
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        said = done.stderr.startswith("error: numpy is not installed\n  ---> pip install")
        check(f"{script} without its libraries", done.returncode == 1 and said, done.stderr[-500:])


TESTS = [test_logs, test_refusals, test_files, test_size, test_follow, test_needs]
