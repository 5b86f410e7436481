"""
Checks the oracle itself, without the trainer:
- its gradients against central differences along random directions, on the fixtures' checkpoints;
- the dense model against transformers' LlamaForCausalLM loaded from the same folder, in float64;
- AdamW against torch.optim.AdamW, the learning rate and lambda against figures worked out by hand;
- float32 against float64, for the share of the tolerances that honest fp32 arithmetic takes.

    python dev/oracle/check_oracle.py [FIXTURES]
"""
import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import oracle
from compare import relative

failures = 0


def check(what, value, limit):
    global failures
    ok = value <= limit  # NaN fails
    failures += not ok
    print(f"{'ok    ' if ok else 'FAILED'} {what:58} {value:9.2e} <= {limit:.0e}")


def open_fixture(folder, dtype=torch.float64):
    args = json.loads((folder / "args.json").read_text())
    c, params = oracle.load_checkpoint(folder, dtype)
    ids, targets = oracle.rows(oracle.read_shard(folder / "shard.bin"), 0, args["batch"], args["seq_len"])
    forced = oracle.read_gates(folder / args["route_from"], c) if "route_from" in args else None
    return c, params, ids, targets, args, forced


def first_weights(c, params, ids, targets):
    """lory's weights of the first segments, which both ends of a difference must share; else None"""
    if c.router != "lory":
        return None
    with torch.no_grad():
        *_, routing = oracle.loss_of(params, c, ids, targets, 0.0)
    return routing.first_weights


def check_differences(folder):
    """d loss / d tensor along a random direction; f is piecewise constant, as the design has it. Both ends
    must decide every route alike, or the loss has a step between them."""
    c, params, ids, targets, args, forced = open_fixture(folder)
    out, _ = oracle.dump(c, params, ids, targets, args["lambda"], args["aux_coeff"], forced)
    weight = oracle.reg_weight(c, args["lambda"], args["aux_coeff"])
    rng, worst, h = torch.Generator().manual_seed(0), 0.0, 1e-5
    held = first_weights(c, params, ids, targets)
    scale = sum(float(out["grad." + n].square().sum()) for n in oracle.trained(params)) ** 0.5
    for name, t in oracle.trained(params).items():
        u = torch.randn(t.shape, generator=rng, dtype=t.dtype)
        u /= u.norm()
        ends, active = [], []
        with torch.no_grad():
            for sign in (1, -1):
                moved = params | {name: t + sign * h * u}
                *_, loss, _, routing = oracle.loss_of(moved, c, ids, targets, weight, forced, held=held)
                ends.append(float(loss))
                active.append(routing.active)
        assert all(bool((a == b).all()) for a, b in zip(*active)), "a route flipped: use a smaller h"
        got, want = float((out["grad." + name] * u).sum()), (ends[0] - ends[1]) / (2 * h)
        worst = max(worst, abs(got - want) / max(abs(want), 1e-5 * scale))
    check(f"{folder.name}: central differences, worst tensor", worst, 1e-5)


def check_contexts(folder):
    """lory: a text of one segment is one whose prompt is all of it; a shorter prompt is another function"""
    c, params, ids, *_ = open_fixture(folder)
    B, T = ids.shape
    logits = [oracle.forward(params, c, ids, contexts=contexts)[0] for contexts in (None, [T] * B, [T - 1] * B)]
    check(f"{folder.name}: a prompt of the whole text", relative(logits[1], logits[0]), 1e-12)
    check(f"{folder.name}: a shorter prompt differs", float(relative(logits[2], logits[0]) < 1e-4), 0)


def check_llama(folder):
    """As transformers computes it (norms and angles in fp32), then with its fp32 spots widened to float64."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    c, params, ids, targets, args, _ = open_fixture(folder)
    out, _ = oracle.dump(c, params, ids, targets, 0.0, 0.0)
    llama = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    logits = llama(ids).logits.view(-1, c.V)
    check(f"{folder.name}: logits of LlamaForCausalLM", relative(out["logits"], logits.detach()), 1e-6)
    wide = patch.multiple(torch, float32=torch.float64, float=torch.float64)
    with wide, patch.object(torch.Tensor, "float", torch.Tensor.double):
        llama.model.rotary_emb = LlamaRotaryEmbedding(llama.config)
        logits = llama(ids).logits.view(-1, c.V)
        loss = torch.nn.functional.cross_entropy(logits, targets.reshape(-1))
    loss.backward()
    check(f"{folder.name}: the same, all in float64", relative(out["logits"], logits.detach()), 1e-10)
    check(f"{folder.name}: loss", relative(out["lm_loss"], loss.detach().view(1)), 1e-10)
    worst = max(relative(out["grad." + n], p.grad) for n, p in llama.named_parameters())
    check(f"{folder.name}: gradients, worst tensor", worst, 1e-10)


def check_adamw():
    rng = torch.Generator().manual_seed(1)
    t = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    theirs = torch.nn.Parameter(t.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.3)
    m, v = torch.zeros_like(t), torch.zeros_like(t)
    for i in range(5):
        g = torch.randn(5, 3, generator=rng, dtype=torch.float64)
        theirs.grad = g.clone()
        optimizer.step()
        # torch decays before the update, we with it: the same to the last term, p - lr*wd*p - lr*u
        oracle.adamw(t, m, v, g, i, 0.1, 0.3)
    check("AdamW against torch.optim.AdamW, 5 steps", relative(t, theirs.detach()), 1e-12)


def check_by_hand():
    o = {"lr": 1.0, "lr_min": 0.1, "warmup_steps": 2, "steps": 5}
    lrs = [oracle.learning_rate(i, o) for i in range(5)]  # progress of the cosine: 0, 1/2, 1
    off = max(abs(a - b) for a, b in zip(lrs, [0.5, 1, 1, 0.55, 0.1]))
    check("learning rate: 0.5 1 | 1 0.55 0.1", off, 1e-12)

    c = oracle.Config({"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9, "num_attention_heads": 2,
                       "num_key_value_heads": 2, "intermediate_size": 4, "rms_norm_eps": 1e-5,
                       "rope_theta": 1e6, "num_experts": 12, "num_experts_per_tok": 6, "granularity": 3,
                       "router": "relu"})
    one, a = np.float32(1), np.float32(1.2)
    equal = 2 * 10 * 6  # L * N * k_tot pairs are exactly 1 - S = k/E
    got = [oracle.next_lambda(one, a, equal + i, c, 10) for i in (-1, 0, 1)]
    wrong = sum(x != y for x, y in zip(got, [one / a, one, one * a]))
    wrong += oracle.next_lambda(np.float32(1e30), a, equal + 1, c, 10) != np.float32(1e30)
    wrong += oracle.next_lambda(np.float32(1e-30), a, equal - 1, c, 10) != np.float32(1e-30)
    check("lambda: falls, stays, rises, is kept within its range", wrong, 0)


def check_float32(folder):
    """What is stored, against float32; and that the stored routes are float32's routes too."""
    c, params, ids, targets, args, forced = open_fixture(folder, torch.float32)
    want = oracle.load_file(str(folder / "expected.safetensors"))
    out, _ = oracle.dump(c, params, ids, targets, args["lambda"], args["aux_coeff"], forced)
    assert all(bool(((out[n] != 0) == (want[n] != 0)).all()) for n in want if n.startswith("gates."))
    losses = max(relative(out[n], want[n]) for n in ["lm_loss", "reg_loss", "loss"])
    check(f"{folder.name}: float32 losses", losses, 1e-6)
    gradients = max(relative(out[n], want[n]) for n in want if "grad." in n)
    check(f"{folder.name}: float32 gradients", gradients, 1e-5)
    if (folder / "replay").exists():
        o = json.loads((folder / "replay" / "args.json").read_text())
        tokens = oracle.read_shard(folder / "shard.bin")
        p, m, v, state, _ = oracle.replay(c, params, tokens, o)
        got = p | oracle.f32(m, "exp_avg.") | oracle.f32(v, "exp_avg_sq.")
        want = oracle.load_file(str(folder / "replay" / "model.safetensors"))
        want |= oracle.load_file(str(folder / "replay" / "optimizer.safetensors"))
        check(f"{folder.name}: float32 replay", max(relative(got[n], want[n]) for n in want), 1e-5)
        same = state["lambda"] == json.loads((folder / "replay" / "state.json").read_text())["lambda"]
        check(f"{folder.name}: float32 replay, lambda", 0 if same else 1, 0)


def main():
    here = Path(__file__).resolve().parent
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else here.parent / "test" / "fixtures"
    check_adamw()
    check_by_hand()
    for folder in sorted(f for f in root.iterdir() if (f / "args.json").exists()):
        if not folder.name.startswith("sparsemixer") or folder.name == "sparsemixer_route":
            check_differences(folder)  # sparsemixer: where M = 1; else the gates' slope is not that of their values
        check_float32(folder)
        if folder.name == "lory_one":
            check_contexts(folder)
        if folder.name.startswith("dense"):
            check_llama(folder)
    print(f"{failures} failed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
