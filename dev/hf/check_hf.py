"""
Loads checkpoints in transformers and compares the logits with a dump, in float64 as far as transformers goes.

    python dev/hf/check_hf.py FIXTURE ...
    python dev/hf/check_hf.py --dump FILE --data SHARD --batch B --seq-len T CHECKPOINT

A dense checkpoint is loaded by LlamaForCausalLM from its folder, unchanged; a MoE one by AutoModelForCausalLM
from an export. ||a - b|| / ||b|| must stay within 1e-5 (transformers computes norms and angles in float32).
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging

from export_hf import export

LIMIT = 1e-5


def load(folder):
    """Every tensor of the file must be used, and every parameter be in the file."""
    if "num_experts" not in json.loads((folder / "config.json").read_text()):
        model, info = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    else:
        with tempfile.TemporaryDirectory() as out:
            export(folder, out)
            model, info = AutoModelForCausalLM.from_pretrained(
                out, dtype=torch.float64, output_loading_info=True, trust_remote_code=True)
    off = {name: names for name, names in info.items() if names}
    assert not off, f"{folder}: {off}"
    return model.eval()


def check(folder, shard, B, T, dump):
    tokens = np.frombuffer(Path(shard).read_bytes(), dtype="<u2", offset=1024).astype(np.int64)
    ids = torch.from_numpy(tokens[: B * T].reshape(B, T))
    want = load_file(str(dump))["logits"].double()  # [B*T, V]
    model = load(folder)
    with torch.no_grad():
        got = model(ids, use_cache=False).logits.view(B * T, -1)
        error = float((got - want).norm() / want.norm())
    verdict = "ok    " if error <= LIMIT else "FAILED"
    print(f"{verdict} {folder.name:24} {type(model).__name__:18} {error:9.2e}")
    return error <= LIMIT


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--dump")
    a.add_argument("--data")
    a.add_argument("--batch", type=int)
    a.add_argument("--seq-len", type=int)
    a.add_argument("folders", nargs="+", metavar="FOLDER")
    o = a.parse_args()
    logging.disable_progress_bar()
    failed = 0
    for folder in map(Path, o.folders):
        if o.dump:
            failed += not check(folder, o.data, o.batch, o.seq_len, o.dump)
            continue
        args = json.loads((folder / "args.json").read_text())
        if "route_from" in args:
            continue  # transformers routes by itself
        failed += not check(folder, folder / "shard.bin", args["batch"], args["seq_len"],
                            folder / "expected.safetensors")
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
