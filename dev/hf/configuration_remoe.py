"""The configuration of a ReMoE checkpoint: LLaMA's, and how its experts are routed."""
from transformers.models.llama.configuration_llama import LlamaConfig


class RemoeConfig(LlamaConfig):
    model_type = "remoe"

    num_experts: int = 8  # in all, granularity included
    num_experts_per_tok: int = 1  # nominal, granularity included
    granularity: int = 1
    router: str = "relu"  # or topk, auxfree, sparsemixer, lory, ec, hash
    router_jitter: float = 0.1  # sparsemixer: how far below the best a candidate may be
    segment_length: int = 256  # lory: tokens that have the same merged expert
    load_balance: bool = True  # concerns training alone
