"""
ReMoE for transformers: LlamaForCausalLM with routed experts for its feed-forward layers, for inference.

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(EXPORTED, trust_remote_code=True)

`train_remoe --load RUN --export EXPORTED` puts this file beside a model's weights; transformers 4 and 5 run it.
Tensor names are the checkpoint's; nothing is converted. The router ec, whose experts choose among the tokens
of a batch, takes each token's k best experts while generating: the batch is not all there.
"""
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from .configuration_remoe import RemoeConfig


ROUTERS = "relu", "topk", "auxfree", "sparsemixer", "ec", "hash"


class RemoeExperts(nn.Module):
    """SwiGLU experts; gate rows first, then up rows."""

    def __init__(self, config):
        super().__init__()
        E, F, d = config.num_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, d))
        self.down_proj = nn.Parameter(torch.empty(E, d, F))

    def forward(self, x, gates, active):
        """x [N, d]; gates, active [N, E] -> sum over the active experts of gate * expert(x)"""
        y = torch.zeros_like(x)
        for e in active.any(0).nonzero()[:, 0].tolist():
            t = active[:, e].nonzero()[:, 0]
            gate, up = nn.functional.linear(x[t], self.gate_up_proj[e]).chunk(2, -1)
            out = nn.functional.linear(nn.functional.silu(gate) * up, self.down_proj[e])
            y.index_add_(0, t, gates[t, e, None].to(x.dtype) * out)
        return y


class RemoeMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router, self.E, self.k = config.router, config.num_experts, config.num_experts_per_tok
        self.jitter = config.router_jitter
        if config.router not in ROUTERS:
            raise ValueError(f"unknown router {config.router!r}: expected one of {', '.join(ROUTERS)}")
        if config.router != "hash":
            self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        if config.router == "auxfree":  # DeepSeek-V3's name for it
            bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)
            self.gate.e_score_correction_bias = bias
        self.experts = RemoeExperts(config)
        self.input_ids, self.alone = None, False  # set by RemoeModel before each forward

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

    def forward(self, x):
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
        self.post_init()

    def forward(self, input_ids=None, *args, generating=False, **kwargs):
        # The cache is past_key_values in transformers 4 and cache in 5, the fourth argument in both
        caches = [*args[2:3], kwargs.get("past_key_values"), kwargs.get("cache")]
        # a decoder layer hands its mlp the hidden states alone, so what else routing needs is put there
        for layer in self.layers:
            layer.mlp.input_ids = input_ids
            layer.mlp.alone = generating or any(cache is not None for cache in caches)
        return super().forward(input_ids, *args, **kwargs)


class RemoeForCausalLM(LlamaForCausalLM):
    config_class = RemoeConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = RemoeModel(config)
        if config.router == "auxfree":  # as in the file, whatever the weights are loaded as
            self._keep_in_fp32_modules_strict = {"e_score_correction_bias"}
        self.post_init()

    def prepare_inputs_for_generation(self, *args, **kwargs):
        # generate() asks this before each forward, with a cache and without; forward hands `generating` on
        return {**super().prepare_inputs_for_generation(*args, **kwargs), "generating": True}
