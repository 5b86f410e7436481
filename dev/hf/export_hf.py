"""
Makes a checkpoint folder loadable by transformers: the same tensors, and beside them the model's code.

    python dev/hf/export_hf.py CHECKPOINT OUT [--tokenizer DIR]

A dense checkpoint is LLaMA's already; a MoE one gets this folder's two files, and `auto_map` in config.json
by which AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True) finds them.
"""
import argparse
import json
import shutil
from pathlib import Path


def export(checkpoint, out, tokenizer=None):
    checkpoint, out, here = Path(checkpoint), Path(out), Path(__file__).resolve().parent
    config = json.loads((checkpoint / "config.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(checkpoint / "model.safetensors", out / "model.safetensors")
    if "num_experts" in config:
        config["architectures"] = ["RemoeForCausalLM"]
        config["auto_map"] = {"AutoConfig": "configuration_remoe.RemoeConfig",
                              "AutoModelForCausalLM": "modeling_remoe.RemoeForCausalLM"}
        for name in ["configuration_remoe.py", "modeling_remoe.py"]:
            shutil.copyfile(here / name, out / name)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ["vocab.json", "merges.txt"] if tokenizer else []:
        shutil.copyfile(Path(tokenizer) / name, out / name)


if __name__ == "__main__":
    a = argparse.ArgumentParser()
    a.add_argument("checkpoint")
    a.add_argument("out")
    a.add_argument("--tokenizer", help="a folder with vocab.json and merges.txt, copied too")
    o = a.parse_args()
    export(o.checkpoint, o.out, o.tokenizer)
