"""
Runs, statistics and traces as the trainers write them, for the tests of dev/report: small, seeded, of known
sums.

    python dev/test/report/inputs.py FOLDER        -> FOLDER/relu, FOLDER/topk, each with stats and trace
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

DOMAINS = ["arxiv", "books", "github", "stackexchange", "web", "wikipedia"]
WORDS = [
    "<|endoftext|>",
    "the",
    "Ġthe",
    "Ċ",
    "ĠF",
    "def",
    "Ġreturn",
    "(",
    ")",
    "é",
    "Ġhusband",
    "0",
    "1",
    "Spring",
    "ĠWinter",
]


def log_rows(router, steps, layers, experts, k, seed, full=True):
    """step rows in which the three stages begin at a fifth and at two fifths of the run"""
    rng = np.random.default_rng(seed)
    second, third = steps // 5, 2 * steps // 5
    for i in range(steps):
        relu = router == "relu"
        stage = 0 if not relu else 1 if i < second else 2 if i < third else 3
        aim = 1 - k / experts
        s = (
            aim
            if not relu
            else (
                0.5
                if stage == 1
                else 0.5 + (aim - 0.5) * (i - second) / max(1, third - second) if stage == 2 else aim
            )
        )
        by_layer = np.clip(
            s + 0.004 * rng.standard_normal(layers) + (0.03 * np.linspace(-1, 1, layers) if relu else 0), 0, 1
        )
        tokens = 3072
        load = rng.dirichlet(np.full(experts, 8.0), layers) * ((1 - by_layer) * experts * tokens)[:, None]
        row = {
            "step": i,
            "lm_loss": 7.6 - 4.0 * (1 - np.exp(-i / (0.4 * steps + 1))) + 0.05 * rng.standard_normal(),
            "reg_loss": 0.05,
            "lambda": (1e-8 * 1.2 ** min(i, 100)) if relu else 0,
            "sparsity": float(by_layer.mean()),
            "stage": stage,
            "layer_sparsity": by_layer.tolist(),
            "tokens_per_expert": {"min": int(load.min()), "mean": float(load.mean()), "max": int(load.max())},
            "dead_experts": int(i < 3),
            "zero_expert_tokens": int(200 * (stage == 3)),
            "active_experts": float((1 - by_layer.mean()) * experts),
            "grad_norm": float(1 + rng.random()),
            "lr": 1e-3,
            "ms": 300.0 if stage == 1 else 200.0 if stage == 2 else 100.0,
            "tok_s": 1000.0 * tokens / (300.0 if stage == 1 else 200.0 if stage == 2 else 100.0),
            "tflops": 0.2,
            "tflops_active": 0.3,
            "mem_gb": 0.5,
        }
        if full:
            row["time"] = 1764368667.0 + 0.2 * i
            if relu and i >= third + 5:
                row["stage2_step"], row["stage3_step"] = second, third
            if i % 10 == 0:
                flips = 0.03 * np.exp(-i / steps) * (1 + 0.2 * rng.random(layers))
                row.update(
                    flip_rate=float(flips.mean()),
                    flip_count=float(experts * flips.mean()),
                    layer_flip_rate=flips.tolist(),
                    layer_expert_tokens=load.astype(int).tolist(),
                )
        yield row


def write_run(
    folder,
    router="relu",
    steps=100,
    layers=3,
    experts=8,
    k=1,
    seed=0,
    full=True,
    checkpoint=True,
    val_every=20,
):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in log_rows(router, steps, layers, experts, k, seed, full):
        lines.append(json.dumps(row))
        if (row["step"] + 1) % val_every == 0 or row["step"] + 1 == steps:
            losses = {name: row["lm_loss"] + 0.2 * d for d, name in enumerate(DOMAINS)}
            losses["all"] = float(np.mean(list(losses.values())))
            lines += [
                json.dumps({"step": row["step"] + 1, "val_loss": loss, "domain": name})
                for name, loss in losses.items()
            ]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    if checkpoint:
        saved = folder / f"step_{steps:08d}"
        saved.mkdir(exist_ok=True)
        config = {
            "model_type": "remoe",
            "num_hidden_layers": layers,
            "num_experts": experts,
            "num_experts_per_tok": k,
            "granularity": 1,
            "router": router,
        }
        options = {
            "router": router,
            "steps": steps,
            "batch": 16,
            "global_batch": 16,
            "seq_len": 192,
            "train_data": "data/mine/train_*.bin",
            "val_data": "data/mine/val.*.bin",
            "lr": 0.001,
        }
        (saved / "config.json").write_text(json.dumps(config))
        (saved / "state.json").write_text(
            json.dumps(
                {
                    "step": steps,
                    "options": options,
                    "shards": [{"name": "train_000000.bin", "bytes": 10, "hash": "00"}],
                }
            )
        )
        (saved / "vocab.json").write_text(
            json.dumps(
                {**{word: i for i, word in enumerate(WORDS)}, **{f"w{i}": i for i in range(len(WORDS), 64)}}
            )
        )
    return folder


def metadata(kind, router, layers, experts, k, vocabulary, **more):
    base = {
        "format": "pt",
        "kind": kind,
        "checkpoint": "",
        "step": "100",
        "router": router,
        "experts": experts,
        "active": k,
        "granularity": 1,
        "layers": layers,
        "vocab_size": vocabulary,
        "seq_len": 192,
        **more,
    }
    return {key: str(value) for key, value in base.items()}


def write_stats(
    path,
    router="relu",
    layers=3,
    experts=8,
    k=1,
    vocabulary=64,
    domains=DOMAINS,
    tokens=4000,
    every_layer=False,
    seed=0,
):
    """counts of masks [N, L, E] that are drawn at random; -> the masks, each token's id and domain"""
    rng = np.random.default_rng(seed)
    n = tokens * len(domains)
    ids = np.minimum(rng.zipf(1.5, n) - 1, vocabulary - 1)
    where = np.repeat(np.arange(len(domains)), tokens)
    if router == "relu":
        taste = rng.dirichlet(np.full(experts, 0.5), (len(domains), layers)) * k
        mask = (
            rng.random((n, layers, experts))
            < (0.6 * taste[where] + 0.4 * k / experts) * (0.6 + 0.1 * np.log1p(ids))[:, None, None]
        )
        mask[ids == 1, :, :] = False
        mask[ids == 1, :, 2] = True  # a token that is always with expert 2
    else:
        score = rng.random((n, layers, experts)) + 0.5 * rng.random((layers, experts))
        mask = score >= np.sort(score, 2)[:, :, -k][:, :, None]
    tensors = {
        "tokens": np.full(len(domains), tokens, np.int64),
        "count": np.bincount(ids, minlength=vocabulary).astype(np.int64),
        "active": np.bincount(ids, mask.sum((1, 2)), minlength=vocabulary).astype(np.int64),
    }
    for d, name in enumerate(domains):
        tensors[f"routed.{name}"] = mask[where == d].sum(0).astype(np.int64)
    used = list(range(layers)) if every_layer else [(layers - 1) // 2]
    for l in used:
        tensors[f"used.{l}"] = np.stack(
            [np.bincount(ids, mask[:, l, e], minlength=vocabulary) for e in range(experts)], 1
        ).astype(np.int32)
    save_file(
        tensors,
        path,
        metadata(
            "stats",
            router,
            layers,
            experts,
            k,
            vocabulary,
            domains=json.dumps(domains),
            used_layers=json.dumps(used),
        ),
    )
    return mask, ids, where


TEXT = [
    "<|endoftext|>",
    "def",
    " area",
    "(",
    "r",
    ")",
    ":",
    "\n",
    "   ",
    " return",
    " 3",
    ".",
    "14",
    " *",
    " r",
    "\n",
    "\n",
    "The",
    " na",
    "\xc3",
    "\xaf",
    "ve",
    " caf\xc3",
    "\xa9",
    " <b>",
    " &",
    " is",
    " open",
    ".",
]


def write_trace(path, router="relu", layers=3, experts=8, k=1, times=4, sources=("text.txt",), seed=0):
    rng = np.random.default_rng(seed)
    pieces = [piece.encode("latin-1") for piece in TEXT] * times
    n = len(pieces)
    gates = rng.random((layers, n, experts)).astype(np.float32)
    if router == "relu":
        gates[rng.random(gates.shape) > 1.1 * k / experts] = 0
    else:
        gates[gates < np.sort(gates, 2)[:, :, -k][:, :, None]] = 0
    starts = np.linspace(0, n, len(sources) + 1).astype(np.int64)[:-1]
    loss = rng.exponential(3, n).astype(np.float32)
    loss[starts] = np.nan
    tensors = {
        "offsets": np.cumsum([0] + [len(piece) for piece in pieces]).astype(np.int64),
        "starts": starts,
        "ids": np.arange(n, dtype=np.int32) % len(TEXT),
        "loss": loss,
        "gates": gates,
        "bytes": np.frombuffer(b"".join(pieces), np.uint8).copy(),
    }
    save_file(
        tensors, path, metadata("trace", router, layers, experts, k, 64, sources=json.dumps(list(sources)))
    )


def write_both(folder, layers=3, steps=100, **more):
    folder = Path(folder)
    for seed, router in enumerate(("relu", "topk")):
        run = write_run(folder / router, router, steps, layers, seed=seed, **more)
        write_stats(run / "stats.safetensors", router, layers, seed=seed, every_layer=router == "topk")
        write_trace(run / "trace.safetensors", router, layers, seed=seed, sources=("text.txt", "books"))
    return folder / "relu", folder / "topk"


if __name__ == "__main__":
    write_both(sys.argv[1])
