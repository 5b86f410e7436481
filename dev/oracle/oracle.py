"""
The model, its gradients and its optimizer in PyTorch float64: the independent check of both trainers.

Written from the design (model contract, formats), never from the C: gradients come from autograd, tensors are
whole, nothing is fast. Takes the trainer's own options, so that it can stand in for the trainer:

    dump    oracle.py --load DIR --data SHARD --batch B --seq-len T --lambda X --dump FILE [--route-from DUMP]
    replay  oracle.py --load DIR --data SHARD --batch B --seq-len T --global-batch M --steps n --out DIR2 ...

Letters: B batch, T sequence length, N = B*T, d hidden, L layers, H heads, KV key/value heads, hd head size,
V vocabulary, E experts in all (num_experts, granularity included), k active in all, F width of one expert.
`--dtype float32` shows how far honest fp32 arithmetic is from float64. Needs torch, numpy and safetensors;
check_oracle.py needs transformers too.
"""
import argparse
import json
import math
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

torch.set_num_threads(1)  # the tensors are tiny; threads would only cost

# ----------------------------------------------------------------------------
# files


def write_safetensors(path, tensors, metadata=None):
    """Our own writer, because the library's sorts the tensors: here the file keeps the dict's order."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        place = [offset, offset + size]
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": place}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            f.write(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def write_shard(path, tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def read_shard(path):
    raw = Path(path).read_bytes()
    magic, version, count = np.frombuffer(raw, dtype="<i4", count=3)
    assert (magic, version) == (20240520, 1), f"{path} is no llm.c token shard"
    tokens = np.frombuffer(raw, dtype="<u2", offset=1024)
    assert len(tokens) == count, f"{path}: header says {count} tokens, file has {len(tokens)}"
    return torch.from_numpy(tokens.astype(np.int64))


def rows(tokens, first, count, T):
    """Rows first .. first+count-1: inputs and targets [count, T]; row r is tokens r*T .. r*T + T."""
    assert (first + count) * T + 1 <= len(tokens), "the shard is too short"
    starts = torch.arange(first, first + count)[:, None] * T + torch.arange(T)
    return tokens[starts], tokens[starts + 1]


class Config:
    """config.json with Hugging Face's keys; num_experts and num_experts_per_tok include the granularity."""

    def __init__(self, c):
        self.d, self.L, self.V = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
        self.H, self.KV = c["num_attention_heads"], c["num_key_value_heads"]
        self.hd, self.F = self.d // self.H, c["intermediate_size"]
        self.eps, self.theta = c["rms_norm_eps"], c["rope_theta"]
        self.E = c.get("num_experts", 0)  # 0: dense
        self.router = c["router"] if self.E else "dense"
        self.k, self.G = c.get("num_experts_per_tok", 0), c.get("granularity", 1)
        self.load_balance = c.get("load_balance", True)
        self.jitter = c.get("router_jitter", 0.1)
        self.S = c.get("segment_length", 256)


def is_state(name):
    """Whether a tensor is no parameter: it has no gradient and no moments, and moves by a rule of its own."""
    return name.endswith("e_score_correction_bias")


def trained(tensors):
    return {name: t for name, t in tensors.items() if not is_state(name)}


def load_checkpoint(folder, dtype=torch.float64):
    config = Config(json.loads((Path(folder) / "config.json").read_text()))
    params = {name: t.to(dtype) for name, t in load_file(str(Path(folder) / "model.safetensors")).items()}
    return config, params


def read_gates(path, config):
    """The gates of an earlier dump, whose nonzero places are the active sets for --route-from, or its draws."""
    tensors = load_file(str(path))
    if config.router == "sparsemixer":
        return [tensors[f"draws.{l}"] for l in range(config.L)]
    return [tensors[f"gates.{l}"] != 0 for l in range(config.L)]


# ----------------------------------------------------------------------------
# the model


def rmsnorm(x, w, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * w


def rope(x, theta):
    """x [B, T, heads, hd]: turns the pairs (i, i + hd/2) of position t by the angle t * theta^(-2i/hd)."""
    T, hd = x.shape[1], x.shape[3]
    freq = theta ** (-torch.arange(0, hd, 2, dtype=torch.float64) / hd)  # [hd/2]
    angle = torch.arange(T, dtype=torch.float64)[:, None] * freq  # [T, hd/2]
    cos, sin = angle.cos().to(x.dtype)[:, None, :], angle.sin().to(x.dtype)[:, None, :]
    a, b = x[..., : hd // 2], x[..., hd // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(x, p, layer, c):
    """x [B, T, d]"""
    B, T, _ = x.shape
    w = lambda name: p[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
    q = rope((x @ w("q").T).view(B, T, c.H, c.hd), c.theta)
    k = rope((x @ w("k").T).view(B, T, c.KV, c.hd), c.theta)
    v = (x @ w("v").T).view(B, T, c.KV, c.hd)
    heads = torch.arange(c.H) // (c.H // c.KV)  # query head h reads key/value head h / (H/KV)
    scores = torch.einsum("bthi,bshi->bhts", q, k[:, :, heads]) / math.sqrt(c.hd)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    out = torch.einsum("bhts,bshi->bthi", scores.masked_fill(future, -math.inf).softmax(-1), v[:, :, heads])
    return out.reshape(B, T, c.d) @ w("o").T


def largest(scores, count):
    """Membership [rows, n] of each row's `count` largest; equal scores go to the lower index."""
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)


def gap(scores, count):
    """How far the last chosen score is from the first one left out, the smallest of all rows."""
    s = scores.detach().sort(-1, descending=True).values
    return float((s[:, count - 1] - s[:, count]).min()) if 0 < count < s.shape[1] else math.inf


def rng_mix(x):
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def rng_bits(seed, stream, counter):
    return rng_mix(rng_mix(rng_mix(seed) ^ stream) ^ counter)


def uniforms(key, layer, first_token, N, k):
    """u, v [N, k] in (0, 1), by counters: whatever the ranks, the micro-batches or the order"""
    counters = range(2 * k * first_token, 2 * k * (first_token + N))
    drawn = [((rng_bits(key, layer, n) >> 41) + 0.5) * 2**-23 for n in counters]
    return torch.tensor(drawn, dtype=torch.float64).view(N, k, 2).unbind(-1)


class Routing:
    """What the routers of a micro-batch decided, layer after layer."""

    def __init__(self, seed=1234, step=0, first_token=0, contexts=None, held=None):
        self.key, self.first_token = rng_bits(seed, 0x64726177, step), first_token
        self.contexts = contexts  # lory: how many of its first tokens route each sequence; None: by segments
        self.held = held  # lory: what an earlier call has left in first_weights, to be taken for these
        self.first_weights = []  # lory: [B, E] a layer, of each sequence's first segment, without gradient
        self.draws = []  # sparsemixer: [N, E] a layer, +-(j+1) for round j's expert, minus where M = 1/3
        self.gates = []  # [N, E] a layer, 0 where not active
        self.active = []  # [N, E] bool a layer
        self.reg = 0.0  # the table's column `reg`, summed over the layers so far
        self.margin = math.inf  # distance of the nearest decision from tipping over


def sparsemixer(z, layer, c, routing, forced):
    """z [N, E] -> gates M p, whose slope is that of p; records the draws"""
    N, lone = z.shape[0], torch.arange(z.shape[0])
    u, v = uniforms(routing.key, layer, routing.first_token, N, c.k)
    free = torch.ones_like(z, dtype=torch.bool)
    gates, draws = torch.zeros_like(z), torch.zeros_like(z)
    for j in range(c.k):
        left = z.detach().masked_fill(~free, -math.inf)
        best = left.max(-1, keepdim=True).values
        slack = 2 * c.jitter * torch.maximum(left.abs(), best) - (best - left)
        candidate = free & (slack >= 0)
        p = z.masked_fill(~candidate, -math.inf).softmax(-1)
        others = free.clone().scatter(1, left.argmax(-1, keepdim=True), False)
        routing.margin = min(routing.margin, float(slack.abs().masked_fill(~others, math.inf).min()))
        if forced is None:
            reached = p.detach().cumsum(-1)
            nearest = (reached - u[:, j, None]).abs().masked_fill(~candidate, math.inf)
            routing.margin = min(routing.margin, float(nearest.min()), gap(left, 1) if c.E - j > 1 else math.inf)
            drawn = (candidate & (reached > u[:, j, None])).to(torch.int8).argmax(-1)
            third = (drawn != largest(left, 1).to(torch.int8).argmax(-1)) & (v[:, j] >= 0.25)
        else:
            drawn = (forced.abs() == j + 1).to(torch.int8).argmax(-1)
            third = forced[lone, drawn] < 0
        M = torch.where(third, 1 / 3, 1.0).to(z.dtype)
        mine = p[lone, drawn]
        gates = gates.index_put((lone, drawn), mine + ((M - 1) * mine).detach())
        draws[lone, drawn] = torch.where(third, -(j + 1.0), j + 1.0).to(z.dtype)
        free[lone, drawn] = False
    routing.draws.append(draws)
    return gates, draws != 0


def route(x, ids, p, layer, c, routing, forced):
    """x [N, d] -> gates [N, E], active [N, E]; `forced` replaces the active set, not the values."""
    N = x.shape[0]
    if c.router == "hash":
        chosen = (ids[:, None] * c.k + torch.arange(c.k)) % c.E  # [N, k]
        active = torch.zeros(N, c.E, dtype=torch.bool).scatter(1, chosen, True)
        value = torch.ones(N, c.E, dtype=x.dtype)
    else:
        z = x @ p[f"model.layers.{layer}.mlp.gate.weight"].T  # [N, E]
        value = {"relu": lambda: z, "auxfree": z.sigmoid}.get(c.router, lambda: z.softmax(-1))()
        if c.router == "sparsemixer":
            drawn, active = sparsemixer(z, layer, c, routing, forced)
            forced, margin = None, math.inf  # what was forced are the draws
        elif c.router == "relu":
            active, margin = z.detach() > 0, float(z.detach().abs().min())
        elif c.router == "topk":
            active, margin = largest(z, c.k), gap(z, c.k)
        elif c.router == "auxfree":
            score = value.detach() + p[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
            active, margin = largest(score, c.k), gap(score, c.k)
        else:  # ec: each expert takes its C tokens
            C = N * c.k // c.E
            active, margin = largest(value.T, C).T, gap(value.T, C)
        routing.margin = min(routing.margin, margin)
    if forced is not None:
        active = forced
    gates = torch.where(active, value, torch.zeros_like(value))  # relu: on the active set relu(z) = z
    if c.router == "auxfree" and c.k > 1:
        gates = gates / gates.sum(-1, keepdim=True)
    if c.router == "sparsemixer":
        gates = drawn
    f = c.E / (c.k * N) * active.sum(0).to(x.dtype)  # (Eq. 11), counts: no gradient passes
    if c.router == "relu":
        f = f if c.load_balance else torch.ones_like(f)
        routing.reg = routing.reg + (f * gates.mean(0)).sum() / c.L  # (Eq. 9, 10)
    elif c.router in ("topk", "sparsemixer") and c.load_balance:
        routing.reg = routing.reg + (f * value.mean(0)).sum()
    routing.gates.append(gates)
    routing.active.append(active)
    return gates, active


def merge_weights(h, gate, c, routing):
    """h [B, T, d] -> the weights a [B, n, E] that the experts of each segment are merged with, and its length.
    Segment s has the softmax of segment s - 1; the first its own, of which no gradient passes."""
    if routing.contexts is not None:
        means = torch.stack([text[:n].mean(0) for text, n in zip(h, routing.contexts)])
        return (means @ gate.T).softmax(-1)[:, None], h.shape[1]
    means = torch.stack([segment.mean(1) for segment in h.split(c.S, 1)], 1)  # [B, n, d]
    e = (means @ gate.T).softmax(-1)
    first = e[:, 0].detach() if routing.held is None else routing.held[len(routing.first_weights)]
    routing.first_weights.append(first)
    return torch.cat([first[:, None], e[:, :-1]], 1), c.S


def lory(h, p, layer, c, routing):
    """h [B, T, d] -> y: every segment's tokens through one expert, the merged one"""
    name = f"model.layers.{layer}.mlp."
    a, length = merge_weights(h, p[name + "gate.weight"], c, routing)
    gate_up = torch.einsum("bne,efd->bnfd", a, p[name + "experts.gate_up_proj"])
    down = torch.einsum("bne,edf->bndf", a, p[name + "experts.down_proj"])
    y = [torch.cat([swiglu(x, gate_up[b, s], down[b, s]) for s, x in enumerate(h[b].split(length))]) for b in range(len(h))]
    of_token = a.repeat_interleave(length, 1)[:, : h.shape[1]].reshape(-1, c.E)
    routing.gates.append(of_token)
    routing.active.append(torch.ones_like(of_token, dtype=torch.bool))  # all of them have a part
    return torch.stack(y)


def swiglu(x, gate_up, down):
    """x [n, d], gate_up [2F, d] (gate first), down [d, F]"""
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ down.T


def feed_forward(x, ids, p, layer, c, routing, forced):
    """x [N, d]"""
    name = f"model.layers.{layer}.mlp."
    if c.router == "dense":
        gate_up = torch.cat([p[name + "gate_proj.weight"], p[name + "up_proj.weight"]])
        return swiglu(x, gate_up, p[name + "down_proj.weight"])
    gates, active = route(x, ids, p, layer, c, routing, forced)
    y = torch.zeros_like(x)
    for e in range(c.E):
        t = active[:, e].nonzero()[:, 0]  # this expert's tokens
        out = swiglu(x[t], p[name + "experts.gate_up_proj"][e], p[name + "experts.down_proj"][e])
        y = y.index_add(0, t, gates[t, e, None] * out)
    return y


def forward(p, c, ids, forced=None, **draws):
    """ids [B, T] -> logits [N, V], Routing; draws: Routing's"""
    B, T = ids.shape
    routing = Routing(**draws)
    x = p["model.embed_tokens.weight"][ids]  # [B, T, d]
    for l in range(c.L):
        name = f"model.layers.{l}."
        x = x + attention(rmsnorm(x, p[name + "input_layernorm.weight"], c.eps), p, l, c)
        h = rmsnorm(x, p[name + "post_attention_layernorm.weight"], c.eps)
        if c.router == "lory":
            x = x + lory(h, p, l, c, routing)
        else:
            y = feed_forward(h.view(B * T, c.d), ids.reshape(-1), p, l, c, routing, forced[l] if forced else None)
            x = x + y.view(B, T, c.d)
    x = rmsnorm(x, p["model.norm.weight"], c.eps)
    return x.view(B * T, c.d) @ p["lm_head.weight"].T, routing


def loss_of(p, c, ids, targets, weight, forced=None, **draws):
    """-> lm, reg, loss = lm + weight * reg, logits, Routing; weight: lambda (relu), the coefficient (topk)"""
    logits, routing = forward(p, c, ids, forced, **draws)
    lm = torch.nn.functional.cross_entropy(logits, targets.reshape(-1))
    return lm, routing.reg, lm + weight * routing.reg, logits, routing


def reg_weight(c, lam, aux_coeff):
    return {"relu": float(np.float32(lam)), "topk": aux_coeff, "sparsemixer": aux_coeff}.get(c.router, 0.0)


def with_grad(params):
    return {name: t.detach().clone().requires_grad_(not is_state(name)) for name, t in params.items()}


def number(x):
    return float(x.detach()) if torch.is_tensor(x) else float(x)


def grad_of(t):
    return torch.zeros_like(t) if t.grad is None else t.grad


# ----------------------------------------------------------------------------
# the dump: one micro-batch forward and backward


def dump(c, params, ids, targets, lam, aux_coeff, forced=None):
    """-> the dump's tensors (in the parameters' dtype), the routing's margin"""
    p = with_grad(params)
    lm, reg, loss, logits, routing = loss_of(p, c, ids, targets, reg_weight(c, lam, aux_coeff), forced)
    loss.backward()
    N = ids.numel()
    active = sum(int(a.sum()) for a in routing.active)
    sparsity = 1 - active / (c.L * N * c.E) if c.E else 0.0
    scalars = {"lm_loss": lm, "reg_loss": reg, "loss": loss, "sparsity": sparsity}
    out = {name: torch.tensor([number(x)], dtype=torch.float64) for name, x in scalars.items()}
    if N <= 256:
        out["logits"] = logits.detach()
    for l, gates in enumerate(routing.gates):
        out[f"gates.{l}"] = gates.detach()
    for l, draws in enumerate(routing.draws):
        out[f"draws.{l}"] = draws
    for name, t in trained(p).items():
        out["grad." + name] = grad_of(t)
    return out, routing.margin


# ----------------------------------------------------------------------------
# replay: n steps of training in shard order

REPLAY_DEFAULTS = {"lr": 5e-4, "lr_min": 5e-5, "warmup_steps": None, "weight_decay": 0.01, "grad_clip": 1.0,
                   "lambda_init": 1e-8, "alpha": 1.2, "aux_coeff": 0.01, "bias_rate": 0.001}


def learning_rate(i, o):
    """Linear warm-up over W steps, then half a cosine from lr at step W to lr_min at step steps-1."""
    W = o["steps"] // 100 if o["warmup_steps"] is None else o["warmup_steps"]
    if i < W:
        return o["lr"] * (i + 1) / W
    done = (i - W) / (o["steps"] - 1 - W) if o["steps"] - 1 > W else 1.0
    return o["lr_min"] + 0.5 * (o["lr"] - o["lr_min"]) * (1 + math.cos(math.pi * done))


def adamw(t, m, v, g, i, lr, weight_decay):
    """In place; step i counts from 0. Decay only on matrices and stacks of them."""
    m.mul_(0.9).add_(0.1 * g)
    v.mul_(0.999).add_(0.001 * g * g)
    update = (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
    t.sub_(lr * (update + (weight_decay if t.dim() >= 2 else 0.0) * t))


def next_lambda(lam, alpha, active, c, n_step):
    """(Eq. 6-8) in fp32; S < 1 - k/E is active/(L N E_tot) > k/E, compared as integers."""
    E, k = c.E // c.G, c.k // c.G  # at granularity 1
    left, right = active * E, k * c.L * n_step * c.E
    if left > right:
        lam = np.float32(lam * alpha)
    elif left < right:
        lam = np.float32(lam / alpha)
    return min(max(lam, np.float32(1e-30)), np.float32(1e30))


def balance(p, loads, rate, c):
    """In place: an expert with less than its share of the step's tokens gets a larger bias. loads: [E] a layer"""
    for l, load in enumerate(loads):
        error = (load.sum() - load * c.E).sign()  # of the mean load less the expert's: integers
        p[f"model.layers.{l}.mlp.gate.e_score_correction_bias"] += rate * error


def replay(c, params, tokens, o):
    """o: batch, seq_len, global_batch, steps, any of REPLAY_DEFAULTS -> params, m, v, state, margin"""
    o = REPLAY_DEFAULTS | o
    p = with_grad(params)
    m = {name: torch.zeros_like(t) for name, t in trained(params).items()}
    v = {name: torch.zeros_like(t) for name, t in trained(params).items()}
    B, T, M = o["batch"], o["seq_len"], o["global_batch"]
    assert M % B == 0, "global batch must be whole micro-batches"
    lam, alpha, margin, log = np.float32(o["lambda_init"]), np.float32(o["alpha"]), math.inf, []
    for i in range(o["steps"]):
        active, losses, loads = 0, [], [0] * c.L
        for t in p.values():
            t.grad = None
        for first in range(i * M, (i + 1) * M, B):
            ids, targets = rows(tokens, first, B, T)
            lm, reg, loss, _, routing = loss_of(p, c, ids, targets, reg_weight(c, lam, o["aux_coeff"]),
                                                 step=i, first_token=(first - i * M) * T)
            (loss / (M // B)).backward()
            active += sum(int(a.sum()) for a in routing.active)
            loads = [load + a.sum(0) for load, a in zip(loads, routing.active)]
            losses.append([number(lm), number(reg)])
            margin = min(margin, routing.margin)
        norm = math.sqrt(sum(float(grad_of(t).square().sum()) for t in p.values()))
        scale = min(1.0, o["grad_clip"] / (norm + 1e-6))
        lr = learning_rate(i, o)
        with torch.no_grad():
            for name, t in trained(p).items():
                adamw(t, m[name], v[name], scale * grad_of(t), i, lr, o["weight_decay"])
            if c.router == "auxfree" and c.load_balance:
                balance(p, loads, o["bias_rate"], c)
        lm, reg = np.mean(losses, 0)
        sparsity = 1 - active / (c.L * M * T * c.E) if c.E else 0.0
        log.append({"step": i, "lm_loss": lm, "reg_loss": reg, "lambda": float(lam), "sparsity": sparsity,
                    "grad_norm": norm, "lr": lr})
        if c.router == "relu":
            lam = next_lambda(lam, alpha, active, c, M * T)
    state = {"step": o["steps"], "lambda": float(lam), "log": log}
    return {name: t.detach() for name, t in p.items()}, m, v, state, margin


def f32(tensors, prefix=""):
    return {prefix + name: t.to(torch.float32) for name, t in tensors.items()}


def write_replay(folder, params, m, v, state):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", f32(params), {"format": "pt"})
    write_safetensors(folder / "optimizer.safetensors", f32(m, "exp_avg.") | f32(v, "exp_avg_sq."))
    (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n")


# ----------------------------------------------------------------------------
# the command line: the trainer's own names


def main():
    a = argparse.ArgumentParser(description="float64 oracle: a dump, or a replay of n steps")
    a.add_argument("--load", required=True)
    a.add_argument("--data", "--train-data", required=True)
    a.add_argument("--batch", type=int, required=True)
    a.add_argument("--seq-len", type=int, required=True)
    a.add_argument("--aux-coeff", type=float, default=0.01)
    a.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    a.add_argument("--dump")
    a.add_argument("--lambda", dest="lam", type=float, default=1e-8)
    a.add_argument("--route-from")
    a.add_argument("--out")
    a.add_argument("--shuffle", type=int, default=0)
    a.add_argument("--global-batch", type=int)
    a.add_argument("--steps", type=int)
    for name in ["lr", "lr_min", "weight_decay", "grad_clip", "lambda_init", "alpha", "bias_rate"]:
        a.add_argument("--" + name.replace("_", "-"), type=float, default=REPLAY_DEFAULTS[name])
    a.add_argument("--warmup-steps", type=int)
    o = a.parse_args()
    c, params = load_checkpoint(o.load, getattr(torch, o.dtype))
    tokens = read_shard(o.data)
    if o.dump:
        forced = read_gates(o.route_from, c) if o.route_from else None
        ids, targets = rows(tokens, 0, o.batch, o.seq_len)
        tensors, _ = dump(c, params, ids, targets, o.lam, o.aux_coeff, forced)
        write_safetensors(o.dump, f32(tensors))
    else:
        if not (o.out and o.steps and o.global_batch) or o.shuffle:
            a.error("give --dump FILE, or --out DIR --steps n --global-batch M with --shuffle 0")
        p, m, v, state, _ = replay(c, params, tokens, vars(o))
        write_replay(o.out, p, m, v, state)


if __name__ == "__main__":
    main()
