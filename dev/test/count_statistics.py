"""The routing statistics again, counted from gates that dumps hold, by no line of the trainer (dev/test/test_statistics.sh).

usage: count_statistics.py stats STATS SHARD:DUMP ...    a shard a domain, in the file's order, and a dump of its windows
       count_statistics.py trace STATS TRACE             the same of a trace's gates and ids
       count_statistics.py text TRACE TEXT SHARD:DUMP    a trace of a text; a dump of its first window, with logits
       count_statistics.py flips LOG STEP BEFORE:AFTER ... dumps of the calibration set, one update apart
"""
import json, math, struct, sys


def load(path):  # a safetensors file: its metadata, and each tensor as (shape, flat values)
    data = open(path, "rb").read()
    size = struct.unpack("<Q", data[:8])[0]
    header, tensors = json.loads(data[8 : 8 + size]), {}
    meta = header.pop("__metadata__")
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        code = {"F32": "f", "I64": "q", "I32": "i", "U8": "B"}[entry["dtype"]]
        count = (end - begin) // struct.calcsize(code)
        tensors[name] = entry["shape"], struct.unpack_from(f"<{count}{code}", data, 8 + size + begin)
    return meta, tensors


def shard(path, n):  # its first n tokens
    return struct.unpack_from(f"<{n}H", open(path, "rb").read(), 1024)


def check(what, got, want):
    if list(got) != list(want):
        sys.exit(f"{what} differs: {[(i, g, w) for i, (g, w) in enumerate(zip(got, want)) if g != w][:8]}")


def count(stats, domains):  # domains: (ids, gates) each, gates [L][N E]
    meta, tensors = load(stats)
    L, E, V = (int(meta[key]) for key in ("layers", "experts", "vocab_size"))
    names, kept = json.loads(meta["domains"]), json.loads(meta["used_layers"])
    tokens, active, seen = [], [0] * V, [0] * V
    used = {l: [0] * (V * E) for l in kept}
    for name, (ids, gates) in zip(names, domains, strict=True):
        routed = [0] * (L * E)
        tokens.append(len(ids))
        for t, v in enumerate(ids):
            seen[v] += 1
            for l in range(L):
                for e in range(E):
                    if gates[l][t * E + e] != 0:
                        routed[l * E + e] += 1
                        active[v] += 1
                        if l in used:
                            used[l][v * E + e] += 1
        check(f"routed.{name}", tensors["routed." + name][1], routed)
        assert tensors["routed." + name][0] == [L, E]
    check("tokens", tensors["tokens"][1], tokens)
    check("count", tensors["count"][1], seen)
    check("active", tensors["active"][1], active)
    for l in kept:
        check(f"used.{l}", tensors[f"used.{l}"][1], used[l])
    assert set(tensors) == {"tokens", "count", "active", *(f"routed.{n}" for n in names), *(f"used.{l}" for l in kept)}
    assert sum(tokens) > 0 and sum(active) > 0, "nothing was counted"


def of_dumps(stats, pairs):
    L, domains = int(load(stats)[0]["layers"]), []
    for name, path in (pair.split(":") for pair in pairs):
        dump = load(path)[1]
        domains.append((shard(name, dump["gates.0"][0][0]), [dump[f"gates.{l}"][1] for l in range(L)]))
    count(stats, domains)


def of_trace(stats, path):
    meta, trace = load(path)
    (L, N, E), flat = trace["gates"]
    starts, ids, offsets = [*trace["starts"][1], N], trace["ids"][1], trace["offsets"][1]
    assert len(ids) == N == len(trace["loss"][1]) and len(offsets) == N + 1 and offsets[-1] == len(trace["bytes"][1])
    check("places of NaN", [i for i, x in enumerate(trace["loss"][1]) if x != x], starts[:-1])
    assert list(offsets) == sorted(offsets) and json.loads(meta["sources"]) == json.loads(load(stats)[0]["domains"])
    gates = lambda a, b: [flat[(l * N + a) * E : (l * N + b) * E] for l in range(L)]
    count(stats, [(ids[a:b], gates(a, b)) for a, b in zip(starts, starts[1:])])


def of_text(path, text, pair):  # its bytes; the first window's losses from a dump's logits
    name, dump = pair.split(":")
    trace, (rows, logits) = load(path)[1], load(dump)[1]["logits"]
    ids, offsets, whole = trace["ids"][1], trace["offsets"][1], bytes(trace["bytes"][1])
    assert trace["starts"][1] == (0,) and whole[: offsets[1]] == b"<|endoftext|>"
    assert open(text, "rb").read().startswith(whole[offsets[1] :]) and len(whole) > offsets[1]
    check("ids", ids[: rows[0] + 1], shard(name, rows[0] + 1))
    for t in range(rows[0]):
        row = logits[t * rows[1] : (t + 1) * rows[1]]
        want = math.log(sum(math.exp(z - row[ids[t + 1]]) for z in row))
        assert abs(trace["loss"][1][t + 1] - want) < 1e-5 * want, (t, trace["loss"][1][t + 1], want)


def flips(log, step, pairs):
    row = next(r for r in map(json.loads, open(log)) if r["step"] == step and "lm_loss" in r)
    L, changed, entries = len(row["layer_sparsity"]), [0] * len(row["layer_sparsity"]), 0
    for before, after in (map(load, pair.split(":")) for pair in pairs):
        N, E = before[1]["gates.0"][0]
        entries += N * E
        for l in range(L):
            masks = before[1][f"gates.{l}"][1], after[1][f"gates.{l}"][1]
            changed[l] += sum((x != 0) != (y != 0) for x, y in zip(*masks))
    want = [n / entries for n in changed]
    close = lambda a, b: abs(a - b) <= 1e-8 * abs(b)
    assert all(map(close, row["layer_flip_rate"], want)) and len(row["layer_flip_rate"]) == L, (row, want)
    assert close(row["flip_rate"], sum(want) / L) and close(row["flip_count"], E * sum(want) / L), (row, want)
    assert sum(want) > 0, "nothing flipped"


mode, args = sys.argv[1], sys.argv[2:]
if mode == "stats":
    of_dumps(args[0], args[1:])
elif mode == "trace":
    of_trace(*args)
elif mode == "text":
    of_text(*args)
else:
    flips(args[0], int(args[1]), args[2:])
