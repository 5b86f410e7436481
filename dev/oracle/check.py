"""
Checks a trainer from outside: random small models, checkpoints and shards, its dumps and replays against the
oracle.

    python dev/oracle/check.py [--trainer ./train_remoe] [--cases 40] [--replays 8] [--seed 0] [FIXTURE ...]

Each case is written to a temporary folder, run through the trainer's command line, and compared tensor by
tensor by ||got - want|| / ||want||: losses within 1e-6, everything else 1e-5, active sets and lambda exactly;
where the oracle has exact zeros the trainer must have them too. The column `float32` is the worst that the
oracle itself shows when it computes in float32. Models that ask for more than fp32 has are drawn again, which
the oracle alone decides (compare.py). With fixture folders given, those are run instead.
`--trainer "python dev/oracle/oracle.py"` checks this script; `--keep DIR` leaves the cases there.
"""
import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import make_fixtures as fixtures
import oracle
from compare import compare, well_posed

MARGIN = 3e-5  # routing decisions closer than this to tipping are not asked of fp32


# ----------------------------------------------------------------------------
# random cases


def random_case(r):
    """A fixtures.case: any shape that the design allows, small."""
    router = r.choice(["relu"] * 4 + ["topk"] * 2 + ["auxfree"] * 2 + ["sparsemixer"] * 2 + ["lory"] * 2 + ["ec", "hash", "dense"])
    H = r.choice([1, 2, 3, 4, 6])
    KV = r.choice([n for n in range(1, H + 1) if H % n == 0])
    d = H * r.choice([2, 4, 6, 8, 24])
    E, G = r.choice([1, 2, 3, 4, 8]), r.choice([1, 1, 2, 3])
    k, T, S = r.randint(1, min(E, 3)), r.choice([1, 2, 5, 16, 17, 33]), r.choice([1, 2, 3, 8, 16])
    k, G = (1, 1) if router == "lory" else (k, G)
    shape = fixtures.dims(d, H, KV, r.randint(1, 40), r.randint(1, 3))
    return fixtures.case(
        router, E=E, k=k, G=G, B=r.randint(1, 4), T=T, S=S,
        load_balance=r.random() < 0.7, dtype=r.choice(["BF16", "F32", "mixed"]), lam=10 ** r.uniform(-3, 0.5),
        aux=10 ** r.uniform(-2, 0), route=router in ("relu", "topk", "auxfree", "sparsemixer", "ec") and r.random() < 0.2,
        vocab_size=r.choice([5, 67, 130]), rms_norm_eps=r.choice([1e-5, 1e-6, 1e-3]),
        rope_theta=r.choice([1e6, 1e4]), **shape)


def random_replay(r, x):
    B, parts = r.randint(1, 3), r.randint(1, 3)
    steps = r.randint(2, 10)
    if x["router"] == "lory":  # which trains on two segments and more
        x["S"] = min(x["S"], 3)
    return {"batch": B, "seq_len": r.choice([4, 9, 17] if x["router"] == "lory" else [1, 4, 9, 17]), "global_batch": B * parts, "steps": steps,
            "lr": 10 ** r.uniform(-4, -2), "lr_min": 1e-5, "warmup_steps": r.randint(0, steps // 2),
            "weight_decay": r.choice([0.0, 0.01, 0.1]), "grad_clip": r.choice([0.1, 1.0]),
            "lambda_init": 10 ** r.uniform(-4, -1), "alpha": r.choice([1.2, 1.05, 2.0]), "aux_coeff": 0.05,
            "bias_rate": 10 ** r.uniform(-3, -1)}


def write_case(folder, x, args, seed):
    """The checkpoint, the shard and, where asked for, active sets to force. Weights are the seed's."""
    rng = torch.Generator().manual_seed(seed)
    c = oracle.Config(fixtures.config_json(x))
    stored = fixtures.random_weights(c, x, rng)
    used = args["steps"] * args["global_batch"] * args["seq_len"] if "steps" in args else x["B"] * x["T"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fixtures.config_json(x), indent=1))
    oracle.write_safetensors(folder / "model.safetensors", stored)
    oracle.write_shard(folder / "shard.bin", torch.randint(c.V, (used + 1,), generator=rng).numpy())
    if "route_from" in args:
        params = {n: t.double() for n, t in stored.items()}
        out, _ = dump_of(folder, c, params, {n: a for n, a in args.items() if n != "route_from"})
        routes = fixtures.forced_routes(x, c, out, rng)
        oracle.write_safetensors(folder / args["route_from"], fixtures.route_tensors(x, routes))
    (folder / "args.json").write_text(json.dumps(args, indent=1))


# ----------------------------------------------------------------------------
# what the oracle says, what the trainer says


def dump_of(folder, c, params, args):
    ids, targets = oracle.rows(oracle.read_shard(folder / "shard.bin"), 0, args["batch"], args["seq_len"])
    forced = oracle.read_gates(folder / args["route_from"], c) if "route_from" in args else None
    return oracle.dump(c, params, ids, targets, args["lambda"], args["aux_coeff"], forced)


def wanted(folder, args, dtype=torch.float64):
    """-> tensors, lambda after the last step (None for a dump), margin"""
    c, params = oracle.load_checkpoint(folder, dtype)
    return wanted_of(folder, args, c, params)


def wanted_of(folder, args, c, params):
    if "steps" not in args:
        out, margin = dump_of(folder, c, params, args)
        return out, None, margin
    tokens = oracle.read_shard(folder / "shard.bin")
    p, m, v, state, margin = oracle.replay(c, params, tokens, args)
    moments = {"exp_avg." + n: t for n, t in m.items()} | {"exp_avg_sq." + n: t for n, t in v.items()}
    return p | moments, state["lambda"] if c.router == "relu" else None, margin


def options(args):
    """args.json's keys are the options' names."""
    names = [name for name in args if name != "route_from"]
    return [word for name in names for word in ("--" + name.replace("_", "-"), str(args[name]))]


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        said = (done.stderr or done.stdout)[-1500:]
        raise RuntimeError(f"exit {done.returncode}: {shlex.join(command)}\n{said}")


def checkpoint_in(out):
    """Where the trainer put its last checkpoint: under `latest`, or in the folder itself."""
    return next(f for f in [out / "latest", out] if (f / "model.safetensors").exists())


def told(trainer, folder, args, scratch):
    """-> tensors, lambda as the trainer gives them"""
    command = [*trainer, "--load", str(folder), "--data", str(folder / "shard.bin"), *options(args)]
    if "steps" not in args:
        if "route_from" in args:
            command += ["--route-from", str(folder / args["route_from"])]
        run(command + ["--dump", str(scratch / "dump.safetensors")])
        return load_file(str(scratch / "dump.safetensors")), None
    run(command + ["--shuffle", "0", "--out", str(scratch / "out")])
    last = checkpoint_in(scratch / "out")
    tensors = load_file(str(last / "model.safetensors")) | load_file(str(last / "optimizer.safetensors"))
    return tensors, json.loads((last / "state.json").read_text())["lambda"]


def same_lambda(got, want):
    return want is None or bool(np.float32(got) == np.float32(want))


def describe(folder, args):
    c = json.loads((folder / "config.json").read_text())
    G = c.get("granularity", 1)
    moe = f"E={c['num_experts'] // G} k={c['num_experts_per_tok'] // G} G={G}" if "num_experts" in c else ""
    kind = f"{c.get('router', 'dense')}{'' if c.get('load_balance', True) else '-nolb'}"
    steps = f"{args['steps']}x{args['global_batch'] // args['batch']}" if "steps" in args else "dump"
    steps += "+route" if "route_from" in args else ""
    heads = f"{c['num_attention_heads']}/{c['num_key_value_heads']}"
    return (f"{steps:10} {kind:10} {moe:14} B={args['batch']} T={args['seq_len']:<3} "
            f"L={c['num_hidden_layers']} d={c['hidden_size']:<4}H={heads} "
            f"F={c['intermediate_size']:<3} V={c['vocab_size']:<4}")


def judge(trainer, folder, args, want, lam, verbose):
    """Prints one row of the table; -> whether it passed"""
    text = describe(folder, args)
    float32, _, _ = wanted(folder, args, torch.float32)
    honest = max(compare(float32, want), key=lambda r: r[1])[1]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            got, got_lam = told(trainer, folder, args, Path(scratch))
        except (RuntimeError, StopIteration, KeyError, OSError, subprocess.TimeoutExpired) as error:
            print(f"{text} FAILED: {error!r}", flush=True)
            return False
    rows = compare(got, want)
    losses = max((e for n, e, _ in rows if "loss" in n), default=0.0)
    lam_ok = same_lambda(got_lam, lam)
    ok = all(e <= limit for _, e, limit in rows) and lam_ok
    name, worst, _ = next(r for r in rows if "loss" not in r[0])
    print(f"{text} {losses:8.1e} {worst:8.1e} {honest:8.1e} {name if not ok or verbose else ''} "
          f"{'' if lam_ok else f'lambda {got_lam} not {lam} '}{'' if ok else 'FAILED'}", flush=True)
    if not ok or verbose:
        for name, error, limit in rows:
            if verbose or not error <= limit:
                print(f"    {error:9.2e} {'<=' if error <= limit else '> '} {limit:.0e}  {name}")
    return ok


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--trainer", default="./train_remoe", help="a command line, quoted as for a shell")
    a.add_argument("--cases", type=int, default=40)
    a.add_argument("--replays", type=int, default=8)
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--keep", help="write the cases here and leave them")
    a.add_argument("--verbose", action="store_true", help="one line a tensor")
    a.add_argument("fixtures", nargs="*", metavar="FIXTURE")
    o = a.parse_args()
    trainer, passed, total = shlex.split(o.trainer), 0, 0
    print(f"{'':79} {'losses':>8} {'worst':>8} {'float32':>8}")
    for folder in map(Path, o.fixtures):
        runs = [json.loads((folder / "args.json").read_text())]
        if (folder / "replay").exists():
            runs.append(json.loads((folder / "replay" / "args.json").read_text()))
        for args in runs:
            want, lam, _ = wanted(folder, args)
            passed += judge(trainer, folder, args, want, lam, o.verbose)
            total += 1
    root, drawn = Path(o.keep or tempfile.mkdtemp()), 0
    for number in range(0 if o.fixtures else o.cases + o.replays):
        r = random.Random(f"{o.seed} {number}")
        folder = root / f"case{number:03}"
        posed = False
        while not posed:
            drawn += 1
            x = random_case(r)
            args = {"batch": x["B"], "seq_len": x["T"], "lambda": x["lam"], "aux_coeff": x["aux"]}
            if number >= o.cases:
                args = random_replay(r, x)
            elif x["route"]:
                args["route_from"] = "route.safetensors"
            shutil.rmtree(folder, ignore_errors=True)
            write_case(folder, x, args, r.randrange(2**31))
            want, lam, margin = wanted(folder, args)
            c, params = oracle.load_checkpoint(folder)
            posed = margin >= MARGIN and well_posed(lambda p: wanted_of(folder, args, c, p)[0], params, want)
        passed += judge(trainer, folder, args, want, lam, o.verbose)
        total += 1
    if not o.keep:
        shutil.rmtree(root)
    print(f"{drawn - total} models drawn again as ill posed" if drawn else "fixtures")
    print(f"{passed} passed, {total - passed} failed")
    sys.exit(passed != total)


if __name__ == "__main__":
    main()
