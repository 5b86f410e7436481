"""
ReMoE for transformers: LlamaForCausalLM with routed experts for its feed-forward layers, for inference.

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(EXPORTED, trust_remote_code=True)

`train_remoe --load RUN --export EXPORTED` puts this file beside a model's weights; transformers 4 and 5 run it.
Tensor names are the checkpoint's; nothing is converted. The router ec, whose experts choose among the tokens
of a batch, takes each token's k best experts while generating: the batch is not all there. The router lory merges
experts by segments of a text, as in training; while generating it merges them for the prompt, once, and the text
goes on with these. A cache that is passed along with a prompt is taken to mean the same.
"""
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from .configuration_remoe import RemoeConfig


ROUTERS = "relu", "topk", "auxfree", "sparsemixer", "lory", "ec", "hash"


class RemoeExperts(nn.Module):
    """SwiGLU experts; gate rows first, then up rows."""

    def __init__(self, config):
        super().__init__()
        E, F, d = config.num_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, d))
        self.down_proj = nn.Parameter(torch.empty(E, d, F))

    def merge(self, a):
        """a [E] -> the weights of one expert: their sum, weighed by a, rounded once"""
        return [torch.tensordot(a, w.to(a.dtype), 1).to(w.dtype) for w in (self.gate_up_proj, self.down_proj)]

    def forward(self, x, gates, active):
        """x [N, d]; gates, active [N, E] -> sum over the active experts of gate * expert(x)"""
        y = torch.zeros_like(x)
        for e in active.any(0).nonzero()[:, 0].tolist():
            t = active[:, e].nonzero()[:, 0]
            out = swiglu(x[t], self.gate_up_proj[e], self.down_proj[e])
            y.index_add_(0, t, gates[t, e, None].to(x.dtype) * out)
        return y


def swiglu(x, gate_up, down):
    gate, up = nn.functional.linear(x, gate_up).chunk(2, -1)
    return nn.functional.linear(nn.functional.silu(gate) * up, down)


class RemoeMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router, self.E, self.k = config.router, config.num_experts, config.num_experts_per_tok
        self.jitter, self.S = config.router_jitter, config.segment_length
        if config.router not in ROUTERS:
            raise ValueError(f"unknown router {config.router!r}: expected one of {', '.join(ROUTERS)}")
        if config.router != "hash":
            self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        if config.router == "auxfree":  # DeepSeek-V3's name for it
            bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)
            self.gate.e_score_correction_bias = bias
        self.experts = RemoeExperts(config)
        self.input_ids, self.alone = None, False  # set by RemoeModel before each forward
        self.prompt, self.goes_on, self.merged = None, False, None  # lory: the first two likewise

    def route(self, x):
        """x [N, d] -> gates, active [N, E]"""
        if self.router == "hash":
            ids = self.input_ids.reshape(-1, 1)
            chosen = (ids * self.k + torch.arange(self.k, device=ids.device)) % self.E
            active = torch.zeros(len(ids), self.E, dtype=torch.bool, device=ids.device)
            active = active.scatter(1, chosen, True)
            return active.to(x.dtype), active
        z = self.gate(x)
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        if self.router == "relu":
            active = (z > 0) | ~z.isfinite()  # a router that has broken shows, instead of looking sparse
            return z.where(active, 0), active
        if self.router == "auxfree":  # the bias chooses, the scores weigh
            s = z.sigmoid()
            active = largest(s + self.gate.e_score_correction_bias, self.k)
            s = s.where(active, 0)
            return s / s.sum(-1, keepdim=True) if self.k > 1 else s, active
        if self.router == "sparsemixer":
            return self.best_of_rounds(z)
        p = z.softmax(-1)
        if self.router == "topk" or self.alone:
            return p, largest(z, self.k)
        return p, largest(p.T, p.shape[0] * self.k // self.E).T

    def best_of_rounds(self, z):
        """What training draws: each round its likeliest expert, among the candidates near it"""
        free, gates = torch.ones_like(z, dtype=torch.bool), torch.zeros_like(z)
        for _ in range(self.k):
            left = z.masked_fill(~free, float("-inf"))
            best, chosen = left.amax(-1, keepdim=True), largest(left, 1)
            candidate = best - left <= 2 * self.jitter * torch.maximum(left.abs(), best)
            p = left.masked_fill(~candidate, float("-inf")).softmax(-1)
            gates, free = p.where(chosen, gates), free & ~chosen
        return gates, ~free

    def forward_merged(self, x):
        """x [B, T, d]: each text with its prompt's experts, or by segments, each with those of the one before"""
        if self.goes_on:
            if self.merged is None:
                raise ValueError("lory goes on after a prompt that came with a cache: use generate(), or pass past_key_values "
                                 "along with the prompt")
            return torch.stack([swiglu(text, *expert) for text, expert in zip(x, self.merged)])
        z = self.gate(x)
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        if self.prompt is not None:
            z = z[:, : self.prompt.shape[1]]
            means = [text[mask].mean(0) for text, mask in zip(z, self.prompt)]
            self.merged = [self.experts.merge(mean.softmax(-1)) for mean in means]
            return torch.stack([swiglu(text, *expert) for text, expert in zip(x, self.merged)])
        self.merged = None
        e = torch.stack([part.mean(1) for part in z.split(self.S, 1)], 1).softmax(-1)  # [B, n, E]
        a = torch.cat([e[:, :1], e[:, :-1]], 1)
        parts = x.split(self.S, 1)
        return torch.cat([torch.stack([swiglu(text, *self.experts.merge(weights)) for text, weights in zip(part, a[:, s])])
                          for s, part in enumerate(parts)], 1)

    def forward(self, x):
        if self.router == "lory":
            return self.forward_merged(x)
        flat = x.reshape(-1, x.shape[-1])  # [N, d]
        return self.experts(flat, *self.route(flat)).view_as(x)


def largest(scores, count):
    """Membership of each row's `count` largest; equal scores go to the lower index."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)


class RemoeModel(LlamaModel):
    config_class = RemoeConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = RemoeMoE(config)
        self.prompt_length = None  # of the text that is generated, if it is known
        self.post_init()

    def prompt_of(self, tokens, generating, mask):
        """Which of the first tokens [B, n] are the prompts'; mask: 0 where a text is padded"""
        n = self.prompt_length if generating and self.prompt_length else tokens.shape[1]
        prompt = torch.ones(tokens.shape[0], n, dtype=torch.bool, device=tokens.device)
        return prompt & mask[:, :n].bool() if torch.is_tensor(mask) and mask.dim() == 2 else prompt

    def forward(self, input_ids=None, *args, generating=False, **kwargs):
        # The cache is past_key_values in transformers 4 and cache in 5, the fourth argument in both
        caches = [*args[2:3], kwargs.get("past_key_values"), kwargs.get("cache")]
        tokens = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        mask = args[0] if args else kwargs.get("attention_mask")
        alone = generating or any(cache is not None for cache in caches)
        goes_on = any(cache is not None and cache.get_seq_length() > 0 for cache in caches)
        prompt = self.prompt_of(tokens, generating, mask) if alone and not goes_on and tokens is not None else None
        # a decoder layer hands its mlp the hidden states alone, so what else routing needs is put there
        for layer in self.layers:
            layer.mlp.input_ids = input_ids
            layer.mlp.alone, layer.mlp.prompt, layer.mlp.goes_on = alone, prompt, goes_on
        return super().forward(input_ids, *args, **kwargs)


class RemoeForCausalLM(LlamaForCausalLM):
    config_class = RemoeConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = RemoeModel(config)
        if config.router == "auxfree":  # as in the file, whatever the weights are loaded as
            self._keep_in_fp32_modules_strict = {"e_score_correction_bias"}
        self.post_init()

    def generate(self, inputs=None, *args, **kwargs):
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        self.model.prompt_length = ids.shape[1] if ids is not None else None
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        # generate() asks this before each forward, with a cache and without; forward hands `generating` on
        return {**super().prepare_inputs_for_generation(*args, **kwargs), "generating": True}
