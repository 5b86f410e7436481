"""
The numbers that the report draws: a statistics file against a count token by token, ranks and tables by hand,
curves that were thinned, texts cut into tokens, screenshots written smaller.
"""

import math
import zlib

import numpy as np

import inputs
from checks import HERE, check, near

import coloured_text
import figures_routing
import figures_training
import plot
import small_png
from plot import Subject
from routing_files import Stats, Trace
from sources import Run, byte_of_unicode, nested


def test_statistics():
    path = HERE / "numbers.safetensors"
    mask, ids, where = inputs.write_stats(
        path, layers=4, experts=6, vocabulary=40, tokens=300, every_layer=True, seed=3
    )
    stats = Stats(path)
    n, layers, experts = mask.shape
    ratio = np.zeros((6, layers, experts))
    for i in range(n):  # a token at a time
        for l in range(layers):
            for e in range(experts):
                ratio[where[i], l, e] += bool(mask[i, l, e]) / 300
    check("routed ratio", near(stats.ratio, ratio, 1e-12))
    check("routed ratio of all", near(stats.ratio_all, mask.mean(0)))
    mean = [
        mask[ids == v].sum() / (layers * (ids == v).sum()) if (ids == v).any() else math.nan
        for v in range(40)
    ]
    check("mean active experts", near(np.nan_to_num(stats.mean_active), np.nan_to_num(mean)))
    distance = []
    for l in range(layers):
        split = lambda x: [value / sum(x) for value in x]
        middle = split([sum(ratio[d, l, e] for d in range(6)) / 6 for e in range(experts)])
        distance.append(
            sum(sum(abs(p - q) for p, q in zip(split(ratio[d, l]), middle)) / 2 for d in range(6)) / 6
        )
    check(
        "specialisation",
        near(figures_routing.specialisation(stats), distance, 1e-10),
        figures_routing.specialisation(stats),
    )
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
    check(
        "Spearman of a rising map", near(figures_routing.spearman(np.arange(9.0), np.exp(np.arange(9.0))), 1)
    )
    # 1 - 6 sum d^2 / (n (n^2 - 1)) where no ranks are shared: d = 1 1 1 1 0
    check(
        "Spearman by hand",
        near(
            figures_routing.spearman(np.array([1, 2, 3, 4, 5.0]), np.array([2, 1, 4, 3, 5.0])), 1 - 24 / 120
        ),
    )
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
    check("GPT-2's bytes", sorted(byte_of_unicode().values()) == list(range(256)))
    check(
        "nested",
        nested([[1, 2], [3, None]], 2).shape == (2, 2)
        and nested([[1], [2, 3]], 2) is None
        and nested([1, [2]], 2) is None
        and nested("x", 1) is None,
    )


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
    part = (
        lambda kind, body: len(body).to_bytes(4, "big")
        + kind
        + body
        + zlib.crc32(kind + body).to_bytes(4, "big")
    )
    size = (7).to_bytes(4, "big") + (10).to_bytes(4, "big")
    data = (
        small_png.SIGNATURE
        + part(b"IHDR", size + b"\x08\x02\0\0\0")
        + part(b"IDAT", zlib.compress(rows))
        + part(b"IEND", b"")
    )
    check("PNG: read", (small_png.read(data) == image).all())
    parts = dict(small_png.chunks(small_png.smaller(data)))
    index = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(10, 8)[:, 1:]
    check(
        "PNG: few colours stay as they are",
        (np.frombuffer(parts[b"PLTE"], np.uint8).reshape(-1, 3)[index] == image).all(),
    )


def test_run():
    run = Run(inputs.write_run(HERE / "run-numbers", steps=50, val_every=25))
    check(
        "stages",
        run.stage_spans == [(1, 1, 10), (2, 11, 20), (3, 21, 50)] and run.settled == 20,
        run.stage_spans,
    )
    check("target, tokens", run.target == 0.875 and run.tokens_per_step == 3072)
    check("validations", sorted(run.validations["all"]) == [25, 50] and len(run.validations) == 7)
    bare = Run(inputs.write_run(HERE / "run-bare", steps=50, checkpoint=False))
    check("tokens from the speed", bare.tokens_per_step == 3072 and bare.target is None)
    figure = figures_training.stage_times([Subject("a", "#000", run)])
    check(
        "Table 6",
        all(
            text in figure.html
            for text in (
                "<td>3.00 s</td><td>2.00 s</td><td>3.00 s</td><td>8.00 s</td><td>20</td>",
                "119.12 h",
            )
        ),
        figure.html[:600],
    )
    topk = Run(inputs.write_run(HERE / "run-topk", "topk", steps=50))
    figure = figures_training.stage_times([Subject("a", "#000", topk), Subject("b", "#000", run)])
    check(
        "Table 6: the same steps",
        "<td>a</td><td>1.00 s</td><td>1.00 s</td><td>3.00 s</td><td>5.00 s</td>" in figure.html,
        figure.html[:600],
    )


def test_trace():
    inputs.write_trace(HERE / "numbers-trace.safetensors", layers=2, experts=4, sources=("a", "b"))
    trace = Trace(HERE / "numbers-trace.safetensors")
    name, begin, end = trace.sources[1]
    data = coloured_text.source_json(trace, name, begin, end, 10)
    again = np.zeros((2, 10, 4))
    for l, layer in enumerate(data["on"]):
        for t, cell in enumerate(layer):
            again[l, t, cell[0::2]] = cell[1::2]
    check(
        "gates of a source",
        np.allclose(again, trace.gates[:, begin : begin + 10], atol=5e-3, rtol=5e-3)
        and ((again > 0) == (trace.gates[:, begin : begin + 10] > 0)).all(),
    )
    check(
        "loss of a source",
        data["loss"][0] is None
        and near(data["loss"][1:], trace.loss[begin + 1 : begin + 10], 1e-3)
        and data["ids"] == trace.ids[begin : begin + 10].tolist(),
    )


TESTS = [
    test_statistics,
    test_table_12,
    test_ranks,
    test_thinning,
    test_bytes,
    test_png,
    test_run,
    test_trace,
]
