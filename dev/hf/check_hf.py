"""
Loads what the trainer exports in transformers, 4 or 5, and compares it with the trainer.

    make train_remoe data-tools sample-data
    python -m venv /tmp/hf5 && /tmp/hf5/bin/pip install -r dev/hf/requirements.txt
    /tmp/hf5/bin/python dev/hf/check_hf.py [ROUTER ...]     (a minute; then the same with 'transformers<5')

A small model of each router is trained on the built-in sample; TRAINER=./train_remoecu_fp32 names another
trainer. Of each model, with nothing but the exported folder:

    logits      the trainer's --dump, ||a - b|| / ||b|| <= 1e-5, in float32 and as far as transformers goes in float64
    bf16        of the export in bf16, 3e-2
    tokenizer   AutoTokenizer's ids are build/tokenize's; also from the run's own checkpoint
    generate    greedy, with and without a cache: the trainer's --sample at --temperature 0, character by character
    save        save_pretrained, loaded again: the same weights, text and token ids; the trainer evaluates and samples it
                the same, and exports its weights bit for bit
    shards      save_pretrained in files of 100 KB each: the same of them

And, where no ROUTER is named, the oracle's fixtures: their logits, and save; and a LlamaForCausalLM that transformers has
made, in fp32, bf16 and shards: its logits are the trainer's, which trains it further; what the trainer does not compute in
such a model, it refuses with the reason.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

LIMIT, BF16_LIMIT = 1e-5, 3e-2
ROUTERS = ["relu", "topk", "auxfree", "sparsemixer", "lory", "ec", "hash", "dense"]
ROOT = Path(__file__).resolve().parents[2]
TRAINER = str(Path(os.environ.get("TRAINER", ROOT / "train_remoe")).resolve())
SAMPLE, FIXTURES = ROOT / "build/sample", ROOT / "dev/test/fixtures"
REFUSED = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "head_dim": 32}
SHAPE = "--layers 2 --hidden 64 --heads 4 --kv-heads 2 --experts 4 --granularity 2 --seq-len 64 --batch 8"
LORY = "--granularity 1 --segment-length 16"  # several segments, the last of them short in what is generated
PROMPTS = ["static inline", "The", "#include <", "", "it's  naïve"]
NEW_TOKENS = 40  # with the prompt, less than the window of 64
TEXTS = ["I'll say: they've  12345 \n\n\t x'd", "naïve café — 東京 🙂 ½ ² ß", "  before", "after   ", "\n", "a\r\nb", "\u00a0\u2003x"]

failed = 0


def verdict(what, ok, figure=""):
    global failed
    failed += not ok
    print(f"{'ok    ' if ok else 'FAILED'} {what:40} {figure}", flush=True)


def run_trainer(*words):
    words = [str(word) for word in words]
    return subprocess.run([TRAINER, *words], cwd=ROOT, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def trainer(*words):
    """-> what it printed, bytes"""
    done = run_trainer(*words)
    if done.returncode != 0:
        sys.exit(f"{' '.join(done.args)}: exit {done.returncode}\n{done.stderr.decode(errors='replace')}")
    return done.stdout


def trainer_logits(folder, shard, here, B, T):
    trainer("--load", folder, "--dump", here / "dump", "--data", shard, "--batch", B, "--seq-len", T)
    return load_file(str(here / "dump"))["logits"].double()


def load(folder, dtype):
    """Every tensor of the file must be used, and every parameter be in the file."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, trust_remote_code=True)
    off = {name: names for name, names in info.items() if names}
    assert not off, f"{folder}: {off}"
    return model.eval()


def load_tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # transformers 5 asks for it here too


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits.flatten(0, 1).double()


def shard_ids(path):
    return np.frombuffer(Path(path).read_bytes(), dtype="<u2", offset=1024).astype(np.int64)


def error(got, want):
    return float((got - want).norm() / want.norm())


def check_logits(name, folder, ids, want, dtype=torch.float64, limit=LIMIT):
    model = load(folder, dtype)
    off = error(logits_of(model, ids), want)
    verdict(name, off <= limit, f"{off:9.2e}  {type(model).__name__}, {model.dtype}")


def token_ids_of(model):
    return [source.to_dict().get(key) for source in (model.config, model.generation_config)
            for key in ("bos_token_id", "eos_token_id")]


def generate(model, tokenizer, prompt, **settings):
    """what --sample prints: the text without the token that begins it"""
    inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **settings)[0]
    return tokenizer.decode(ids, skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------------------


def check_tokenizer(name, folder, here):
    texts = TEXTS + [json.loads(line)["text"] for line in (ROOT / "data/sample.jsonl").open()][:20]
    texts = [text for text in texts if "<|endoftext|>" not in text]  # for build/tokenize it is text, here the token
    (here / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    subprocess.run([ROOT / "build/tokenize", "--tokenizer", folder, "--out", here / "texts", "--val-fraction", "0",
                    here / "texts.jsonl"], check=True, capture_output=True)
    tokenizer = load_tokenizer(folder)
    got = [id for text in texts for id in [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]]
    want = shard_ids(here / "texts/train_000000.bin").tolist()
    special = tokenizer(tokenizer.bos_token + "x")["input_ids"][0] == tokenizer.bos_token_id == tokenizer.eos_token_id
    back = all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in texts)
    verdict(name, got == want and special and back, f"{len(want)} ids, {type(tokenizer).__name__}")


def check_generate(name, run, model, tokenizer):
    want = [trainer("--load", run, "--sample", prompt or "\n", "--temperature", 0, "--sample-tokens", NEW_TOKENS) for prompt in PROMPTS]
    for cache in (True, False):
        got = [generate(model, tokenizer, prompt or "\n", use_cache=cache) + "\n" for prompt in PROMPTS]
        same = [a == b.decode(errors="replace") for a, b in zip(got, want)]
        verdict(f"{name}, {'a' if cache else 'no'} cache", all(same), f"{sum(same)} of {len(same)} prompts")
        for a, b in zip(got, want):
            if a != b.decode(errors="replace"):
                print(f"    {a!r}\n    {b.decode(errors='replace')!r}")


def check_prompts(name, model, tokenizer):
    """lory's experts are the prompt's own, however its batch is padded, and none without a prompt"""
    texts = [tokenizer.bos_token + prompt for prompt in ["static inline int", "The"]]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    together = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    alone = [model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0] for text in texts]
    same = all(torch.equal(a[-8:], b[-8:]) for a, b in zip(together, alone))
    ids = tokenizer(texts[0], return_tensors="pt")["input_ids"]
    cache = model(ids, use_cache=True).past_key_values  # of a text that was routed by segments
    try:
        model(ids[:, -1:], None, None, cache)
        refused = False
    except ValueError:
        refused = True
    verdict(name, same and refused, "padded, alone; refused without a prompt")


def check_save(name, folder, ids, here, run=None):
    """run: a run of the sample, whose folder has a tokenizer"""
    model, saved = load(folder, torch.float32), here / f"saved-{folder.name}"
    model.save_pretrained(saved)
    if run:
        tokenizer = load_tokenizer(folder)
        tokenizer.save_pretrained(saved)
    again = load(saved, torch.float32)
    before, after = model.state_dict(), again.state_dict()
    ok = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    ok &= error(logits_of(again, ids), logits_of(model, ids)) < 1e-6 and token_ids_of(model) == token_ids_of(again)
    if run:
        other = load_tokenizer(saved)
        ok &= token_ids_of(again) == [other.eos_token_id] * 4
        ok &= all(generate(model, tokenizer, p) == generate(again, other, p) for p in PROMPTS)
        words = ["--eval", "--seq-len", 64, "--batch", 8, "--val-data", SAMPLE / "val.*.bin", "--load"]
        losses = [trainer(*words, which).split(b"|", 1)[1] for which in (run, saved)]
        words = ["--sample", "static", "--temperature", 0, "--sample-tokens", NEW_TOKENS, "--seq-len", 64, "--load"]
        texts = [trainer(*words, which) for which in (folder, saved)]  # of transformers 5 there is tokenizer.json alone
        ok &= losses[0] == losses[1] and texts[0] == texts[1]
    verdict(name, ok and same_export(folder, saved, here), f"token ids {token_ids_of(again)}")


def same_export(folder, saved, here):
    """What the trainer reads of `saved`, however that is laid out, is the weights of `folder`, bit for bit."""
    again = here / f"again-{saved.name}"
    trainer("--load", saved, "--export", again)
    return (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def check_shards(name, folder, here):
    saved = here / f"shards-{folder.name}"
    load(folder, torch.float32).save_pretrained(saved, max_shard_size="100KB")
    files = len(list(saved.glob("model-*.safetensors")))
    verdict(name, files > 1 and same_export(folder, saved, here), f"{files} files")


def check_router(router, here):
    run, plain, bf16 = here / f"run-{router}", here / router, here / f"{router}-bf16"
    trainer(*SHAPE.split(), *(LORY.split() if router == "lory" else []), "--router", router, "--steps", 100, "--lr", 3e-3, "--lambda-init", 1e-2, "--out", run,
            "--sample-tokens", 0)
    trainer("--load", run, "--export", plain)
    trainer("--load", run, "--export", bf16, "--save-dtype", "bf16")
    shard = SAMPLE / "val.c.bin"
    want = trainer_logits(run, shard, here, 2, 64)
    ids = torch.from_numpy(shard_ids(shard)[:128].reshape(2, 64))
    if router != "sparsemixer":  # whose dump has drawn, as in training
        check_logits(f"{router}: logits", plain, ids, want)
        check_logits(f"{router}: logits", plain, ids, want, torch.float32)
        check_logits(f"{router}: bf16", bf16, ids, want, "auto", BF16_LIMIT)
    if router == "dense":
        check_logits(f"{router}: the run's checkpoint itself", run / "latest", ids, want)
        model = LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32, trust_remote_code=False).eval()
        off, tokenizer = error(logits_of(model, ids), want), AutoTokenizer.from_pretrained(plain, trust_remote_code=False)
        verdict(f"{router}: without trust_remote_code", off <= LIMIT and tokenizer("a")["input_ids"] != [], f"{off:9.2e}")
    check_tokenizer(f"{router}: tokenizer", plain, here)
    check_tokenizer(f"{router}: tokenizer of the run's checkpoint", run / "latest", here)
    check_generate(f"{router}: generate", run, load(plain, torch.float32), load_tokenizer(plain))
    if router == "lory":
        check_prompts(f"{router}: prompts", load(plain, torch.float32), load_tokenizer(plain))
    check_save(f"{router}: save", plain, ids, here, run)
    check_shards(f"{router}: shards", plain, here)


def llama(here, name, dtype=torch.float32, shard_size="5GB", **settings):
    """A model that transformers has made, random, saved where the trainer may find it."""
    torch.manual_seed(7)
    shape = dict(vocab_size=2048, hidden_size=96, intermediate_size=200, num_hidden_layers=3, num_attention_heads=6,
                 num_key_value_heads=2, max_position_embeddings=64)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **settings})).to(dtype)
    model.save_pretrained(here / name, max_shard_size=shard_size)


def check_foreign(here):
    shard = SAMPLE / "val.c.bin"
    ids = torch.from_numpy(shard_ids(shard)[:128].reshape(2, 64))
    for name, dtype, size in (("whole", torch.float32, "5GB"), ("shards", torch.float32, "300KB"), ("bf16", torch.bfloat16, "5GB")):
        llama(here, f"llama-{name}", dtype, size, rms_norm_eps=1e-6, rope_theta=5e4)
        want = trainer_logits(here / f"llama-{name}", shard, here, 2, 64)
        check_logits(f"LlamaForCausalLM, {name}: logits", here / f"llama-{name}", ids, want)
    words = "--steps 2 --seq-len 64 --batch 8 --sample-tokens 0 --out".split()
    trainer("--load", here / "llama-shards", *words, here / "run-llama")
    trainer("--load", here / "run-llama", "--export", here / "trained")
    verdict("LlamaForCausalLM, shards: trained further", type(load(here / "trained", torch.float32)) is LlamaForCausalLM)
    for setting, value in REFUSED.items():
        llama(here, f"refused-{setting}", **{setting: value})
        done = run_trainer("--load", here / f"refused-{setting}", "--export", here / "never")
        said = done.stderr.decode()
        verdict(f"LlamaForCausalLM, {setting}: refused", done.returncode == 1 and setting in said and "---> " in said,
                said.split("\n")[0].split("config.json")[-1])


def check_fixture(folder, here):
    args = json.loads((folder / "args.json").read_text())
    if "route_from" in args or folder.name.startswith("sparsemixer"):
        return  # transformers routes by itself, and draws nothing
    B, T = args["batch"], args["seq_len"]
    out = here / f"fixture-{folder.name}"
    trainer("--load", folder, "--export", out)
    ids = torch.from_numpy(shard_ids(folder / "shard.bin")[: B * T].reshape(B, T))
    check_logits(f"{folder.name}: logits", out, ids, load_file(str(folder / "expected.safetensors"))["logits"].double())
    check_save(f"{folder.name}: save", out, ids, here)


def main():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as here:
        for router in sys.argv[1:] or ROUTERS:
            check_router(router, Path(here))
        for folder in sorted(path.parent for path in FIXTURES.glob("*/args.json")) if not sys.argv[1:] else []:
            check_fixture(folder, Path(here))
        if not sys.argv[1:]:
            check_foreign(Path(here))
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
