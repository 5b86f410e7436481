"""
Makes the committed fixtures: small checkpoints "made by anyone", and what the oracle says they must give.

    python dev/oracle/make_fixtures.py [--out dev/test/fixtures] [NAME ...]

A fixture is a folder:
    config.json model.safetensors   the checkpoint, random BF16 (some F32, some mixed) weights
    shard.bin                       an llm.c token shard
    args.json                       batch, seq_len, lambda, aux_coeff; route_from (a file) to force routes
    expected.safetensors            the dump, F32
    route.safetensors               only with route_from: gates.N whose nonzero places are the active sets
    replay/                         only where training is replayed from the same checkpoint and shard:
        args.json                   batch, seq_len, global_batch, steps, lr, lr_min, warmup_steps, ...
        model.safetensors optimizer.safetensors state.json    after the last step; state.json logs every step
Seeds are tried in order until every routing decision is at least MARGIN from tipping, half the tolerances are
enough for fp32, and the case shows its point (an expert that never fires, a lambda that goes both ways).
"""
import argparse
import json
import shutil
import zlib
from pathlib import Path

import torch

import oracle
from compare import well_posed

MARGIN = 1e-4

# name -> config (HF keys, over BASE), args, and what is special about its weights
BASE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 7, "vocab_size": 67, "rms_norm_eps": 1e-5, "rope_theta": 1e6}


def case(router, E=4, k=1, G=1, B=2, T=17, load_balance=True, dtype="BF16", bend=None, route=False,
         replay=None, lam=0.37, aux=0.25, jitter=0.3, S=None, **config):
    return dict(router=router, E=E, k=k, G=G, B=B, T=T, load_balance=load_balance, dtype=dtype, bend=bend,
                route=route, replay=replay, lam=lam, aux=aux, jitter=jitter, S=S, config={**BASE, **config})


def dims(d, H, KV, F, L):
    return {"hidden_size": d, "num_attention_heads": H, "num_key_value_heads": KV, "intermediate_size": F,
            "num_hidden_layers": L}


REPLAY = {"batch": 2, "seq_len": 9, "global_batch": 4, "steps": 10,
          "lr": 0.01, "lr_min": 0.001, "warmup_steps": 3, "weight_decay": 0.1, "grad_clip": 1.0,
          "lambda_init": 0.02, "alpha": 1.2, "aux_coeff": 0.05}

CASES = {
    "relu": case("relu", replay=REPLAY, **dims(12, 6, 2, 7, 2)),
    "relu_no_balance": case("relu", E=2, G=2, B=1, load_balance=False, replay=REPLAY, **dims(8, 2, 2, 5, 1)),
    "relu_never_always": case("relu", T=9, bend="never_always", rope_theta=1e4, **dims(12, 2, 1, 9, 2)),
    "relu_layer_off": case("relu", E=3, B=2, T=5, bend="layer_off", **dims(12, 2, 2, 8, 3)),
    "relu_t1": case("relu", B=2, T=1, vocab_size=31, **dims(24, 1, 1, 5, 1)),
    "relu_hd24": case("relu", E=3, B=1, T=17, dtype="mixed", vocab_size=31, **dims(48, 2, 1, 7, 1)),
    "relu_hd2": case("relu", B=3, T=6, **dims(8, 4, 2, 5, 2)),
    "relu_e1": case("relu", E=1, B=2, T=7, **dims(12, 1, 1, 11, 2)),
    "relu_g3_k2": case("relu", E=3, k=2, G=3, B=2, T=8, dtype="F32", **dims(12, 3, 1, 3, 1)),
    "relu_route": case("relu", B=2, T=8, route=True, **dims(8, 2, 2, 7, 2)),
    "topk": case("topk", replay=REPLAY, **dims(12, 2, 1, 7, 1)),
    "topk_no_balance": case("topk", E=5, k=2, B=1, load_balance=False, **dims(12, 3, 3, 7, 1)),
    "topk_g3_k2": case("topk", E=3, k=2, G=3, B=2, T=8, rms_norm_eps=1e-2, **dims(12, 6, 1, 3, 2)),
    "topk_e1": case("topk", E=1, B=2, T=1, **dims(8, 2, 1, 5, 1)),
    "topk_route": case("topk", E=4, k=2, B=2, T=8, route=True, **dims(16, 4, 2, 7, 1)),
    "auxfree": case("auxfree", k=2, replay={**REPLAY, "bias_rate": 0.02}, **dims(12, 2, 1, 7, 2)),
    "auxfree_k1": case("auxfree", E=5, B=1, replay={**REPLAY, "steps": 4, "warmup_steps": 0, "bias_rate": 0.1},
                       load_balance=False, **dims(12, 3, 3, 7, 1)),
    "auxfree_g3_k2": case("auxfree", E=3, k=2, G=3, B=2, T=8, dtype="F32", **dims(12, 6, 1, 3, 2)),
    "auxfree_e1": case("auxfree", E=1, B=2, T=1, **dims(8, 2, 1, 5, 1)),
    "auxfree_route": case("auxfree", E=4, k=2, B=2, T=8, route=True, **dims(16, 4, 2, 7, 1)),
    "sparsemixer": case("sparsemixer", replay=REPLAY, **dims(12, 2, 1, 7, 2)),
    "sparsemixer_k2": case("sparsemixer", E=5, k=2, B=1, load_balance=False, jitter=0.4,
                           replay={**REPLAY, "steps": 4, "warmup_steps": 0}, **dims(12, 3, 3, 7, 1)),
    "sparsemixer_g3_k2": case("sparsemixer", E=3, k=2, G=3, B=2, T=8, dtype="F32", **dims(12, 6, 1, 3, 2)),
    "sparsemixer_e1": case("sparsemixer", E=1, B=2, T=1, **dims(8, 2, 1, 5, 1)),
    "sparsemixer_route": case("sparsemixer", E=4, k=2, B=2, T=8, route=True, jitter=0.6, **dims(16, 4, 2, 7, 1)),
    "lory": case("lory", T=16, S=8, replay={**REPLAY, "seq_len": 10, "steps": 6, "lr": 0.003}, **dims(8, 2, 1, 7, 2)),
    "lory_4": case("lory", E=5, B=3, T=12, S=3, **dims(12, 3, 3, 7, 2)),
    "lory_short": case("lory", E=3, T=17, S=5, dtype="F32", replay={**REPLAY, "steps": 4, "warmup_steps": 0},
                       **dims(8, 2, 1, 5, 2)),
    "lory_many": case("lory", E=3, B=3, T=23, S=1, **dims(8, 2, 1, 5, 1)),
    "lory_e1": case("lory", E=1, B=2, T=9, S=4, **dims(8, 2, 1, 5, 1)),
    "lory_one": case("lory", E=4, B=2, T=9, S=9, **dims(8, 2, 1, 5, 2)),
    "ec": case("ec", B=2, replay={**REPLAY, "steps": 4, "warmup_steps": 0}, **dims(8, 2, 1, 7, 1)),
    "ec_g3_k2": case("ec", E=3, k=2, G=3, B=1, T=17, **dims(12, 2, 1, 3, 2)),
    "ec_none": case("ec", E=3, B=1, T=1, **dims(8, 2, 2, 5, 1)),
    "hash": case("hash", B=2, **dims(12, 2, 1, 7, 2)),
    "hash_g3_k2": case("hash", E=3, k=2, G=3, B=1, T=17, dtype="F32", **dims(8, 4, 1, 3, 1)),
    "dense": case("dense", B=2, replay=REPLAY, **dims(12, 2, 2, 7, 1)),
    "dense_x8": case("dense", B=1, T=17, **dims(8, 2, 1, 256, 1)),
}


def config_json(x):
    c, moe = x["config"], x["router"] != "dense"
    out = {"architectures": ["RemoeForCausalLM" if moe else "LlamaForCausalLM"],
           "model_type": "remoe" if moe else "llama", "hidden_act": "silu", "tie_word_embeddings": False,
           "max_position_embeddings": 64, **c}
    if moe:
        out.update(num_experts=x["E"] * x["G"], num_experts_per_tok=x["k"] * x["G"], granularity=x["G"],
                   router=x["router"], load_balance=x["load_balance"])
    if x["router"] == "sparsemixer":
        out["router_jitter"] = x["jitter"]
    if x["router"] == "lory":
        out["segment_length"] = x["S"]
    return out


def tensor_shapes(c, moe, router):
    """name -> shape; c is an oracle.Config"""
    shapes = {"model.embed_tokens.weight": (c.V, c.d), "lm_head.weight": (c.V, c.d)}
    shapes["model.norm.weight"] = (c.d,)
    for l in range(c.L):
        name = f"model.layers.{l}."
        shapes |= {name + n + "_layernorm.weight": (c.d,) for n in ["input", "post_attention"]}
        out_rows = {"q": c.H * c.hd, "k": c.KV * c.hd, "v": c.KV * c.hd, "o": c.d}
        shapes |= {name + f"self_attn.{n}_proj.weight": (r, c.d) for n, r in out_rows.items()}
        if moe:
            shapes[name + "mlp.experts.gate_up_proj"] = (c.E, 2 * c.F, c.d)
            shapes[name + "mlp.experts.down_proj"] = (c.E, c.d, c.F)
            if router != "hash":
                shapes[name + "mlp.gate.weight"] = (c.E, c.d)
            if router == "auxfree":
                shapes[name + "mlp.gate.e_score_correction_bias"] = (c.E,)
        else:
            shapes |= {name + f"mlp.{n}_proj.weight": (c.F, c.d) for n in ["gate", "up"]}
            shapes[name + "mlp.down_proj.weight"] = (c.d, c.F)
    return shapes


def random_weights(c, x, rng):
    """In stored types. Scales differ from tensor to tensor; the tensors' order is shuffled. Wider models
    get smaller weights, or attention saturates and float32 is off by more than 1e-5 whoever computes it."""
    names = tensor_shapes(c, x["router"] != "dense", x["router"])
    order = torch.randperm(len(names), generator=rng).tolist()
    params = {}
    for name, shape in (list(names.items())[i] for i in order):
        w = torch.randn(shape, generator=rng, dtype=torch.float64)
        scale = (0.1 + 0.2 * float(torch.rand(1, generator=rng))) * min(1, 16 / c.d) ** 0.5
        w = 1 + 0.2 * w if "norm" in name else scale * w
        if "embed" in name:
            w = 2 * w  # tokens that differ route differently
        if x["bend"]:
            bend(w, name, x["bend"], rng)
        half = {"BF16": 1.0, "F32": 0.0, "mixed": 0.5}[x["dtype"]]
        bf16 = float(torch.rand(1, generator=rng)) < half
        params[name] = w.to(torch.bfloat16 if bf16 else torch.float32)
    return params


def bend(w, name, how, rng):
    """Coordinate 0 of the residual stream stays large and positive: a constant for router rows to read."""
    if "embed" in name:
        w[:, 0] = 3 + 0.1 * w[:, 0]
    elif "norm" in name:
        w.abs_()
    elif "mlp.gate" in name and how == "never_always":
        w[0, 0], w[-1, 0] = -3, 3
    elif "layers.1.mlp.gate" in name and how == "layer_off":
        w[:, 0] = -3


def forced_routes(x, c, out, rng):
    """Active sets that are not the router's own: relu drops a third of it; topk takes any k experts. sparsemixer's
    draws are other tokens', with M = 1: there the gates' slope is that of their values."""
    active = []
    if x["router"] == "sparsemixer":
        return [out[f"draws.{l}"].roll(1, 0).abs() for l in range(c.L)]
    for g in [out[f"gates.{l}"] for l in range(c.L)]:
        noise = torch.rand(g.shape, generator=rng)
        keep = (g != 0) & (noise < 0.67) if x["router"] == "relu" else oracle.largest(noise, c.k)
        active.append(keep)
    return active


def shows_its_point(x, c, out):
    """Whether the case is what its name says."""
    fired = [(out[f"gates.{l}"] != 0) for l in range(c.L)] if c.E else []
    if x["bend"] == "never_always":
        return all(not f[:, 0].any() and bool(f[:, -1].all()) for f in fired)
    if x["bend"] == "layer_off":
        return not fired[1].any() and fired[0].any() and fired[2].any()
    if x["router"] == "sparsemixer" and c.E > 1 and not x["route"]:  # all kinds of draws
        return all(bool((out[f"draws.{l}"] < 0).any() and (out[f"draws.{l}"] > 0).any()) for l in range(c.L))
    if x["router"] == "relu" and x["route"]:
        return all(bool((out[f"gates.{l}"] >= 0).all()) for l in range(c.L))  # as relu has it
    if x["router"] == "relu":
        some_token_has_none = any(bool((~f.any(1)).any()) for f in fired)
        return all(bool(f.any()) for f in fired) and (c.E > 4 or x["T"] == 1 or some_token_has_none)
    return True


def replay_shows_its_point(state, grad_clip):
    """Lambda goes both ways, and the clip bites in some steps and not in others."""
    lams = [s["lambda"] for s in state["log"]] + [state["lambda"]]
    ups, downs = (sum(sign * (b - a) > 0 for a, b in zip(lams, lams[1:])) for sign in (1, -1))
    clipped = sum(s["grad_norm"] > grad_clip for s in state["log"])
    moves = len(set(lams)) == 1 or (ups > 0 and downs > 0)
    return moves and 0 < clipped < len(state["log"])


def attempt(x, seed, folder):
    """Writes the fixture and returns True, or returns False where the seed does not do."""
    rng = torch.Generator().manual_seed(seed)
    c = oracle.Config(config_json(x))
    stored = random_weights(c, x, rng)
    params = {n: t.to(torch.float64) for n, t in stored.items()}
    B, T, r = x["B"], x["T"], x["replay"]
    used = r["steps"] * r["global_batch"] * r["seq_len"] if r else 0
    count = max(B * T, used) + 1  # not one token to spare
    tokens = torch.randint(c.V, (count,), generator=rng)
    ids, targets = oracle.rows(tokens, 0, B, T)
    routes = None
    dump = lambda p: oracle.dump(c, p, ids, targets, x["lam"], x["aux"], routes)
    out, margin = dump(params)
    if x["route"]:
        routes = forced_routes(x, c, out, rng)
        out, margin = dump(params)
    if margin < MARGIN or not shows_its_point(x, c, out) or not well_posed(lambda p: dump(p)[0], params, out):
        return False
    trained = None
    if r:
        # the clip is put where it bites in about half the steps
        *_, state, _ = oracle.replay(c, params, tokens, {**r, "grad_clip": 1e9})
        norms = sorted(s["grad_norm"] for s in state["log"])
        r = {**r, "grad_clip": round(norms[len(norms) // 2], 2)}
        *trained, state, margin = oracle.replay(c, params, tokens, r)
        if margin < MARGIN or not replay_shows_its_point(state, r["grad_clip"]):
            return False
    write_fixture(folder, x, stored, tokens, out, routes)
    if trained:
        oracle.write_replay(folder / "replay", *trained, state)
        (folder / "replay" / "args.json").write_text(json.dumps(r, indent=1) + "\n")
    return True


def route_tensors(x, routes):
    what = "draws" if x["router"] == "sparsemixer" else "gates"
    return {f"{what}.{l}": active.to(torch.float32) for l, active in enumerate(routes)}


def write_fixture(folder, x, stored, tokens, out, routes):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(x), indent=1) + "\n")
    oracle.write_safetensors(folder / "model.safetensors", stored)
    oracle.write_shard(folder / "shard.bin", tokens.numpy())
    oracle.write_safetensors(folder / "expected.safetensors", oracle.f32(out))
    args = {"batch": x["B"], "seq_len": x["T"], "lambda": x["lam"], "aux_coeff": x["aux"]}
    if routes:
        oracle.write_safetensors(folder / "route.safetensors", route_tensors(x, routes))
        args["route_from"] = "route.safetensors"
    (folder / "args.json").write_text(json.dumps(args, indent=1) + "\n")


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--out", default=str(Path(__file__).resolve().parent.parent / "test" / "fixtures"))
    a.add_argument("names", nargs="*", metavar="NAME")
    o = a.parse_args()
    total = 0
    for name, x in CASES.items():
        if o.names and name not in o.names:
            continue
        folder = Path(o.out) / name
        first = zlib.crc32(name.encode()) % 100000  # its own, so that adding a case changes no other
        seed = next((s for s in range(first, first + 1000) if attempt(x, s, folder)), None)
        assert seed is not None, f"{name}: no seed of 1000 does"
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        total += size
        print(f"{name:20} seed {seed:6} {size:8} bytes", flush=True)
    print(f"{'all':20} {'':11} {total:8} bytes")


if __name__ == "__main__":
    main()
