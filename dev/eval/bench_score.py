"""
Requests per second: --score against lm-evaluation-harness with the exported model in transformers, in one call.

    pip install -r dev/eval/requirements.txt
    python dev/eval/bench_score.py --load RUN --task data/eval/hellaswag.jsonl --trainer ./train_remoecu

The harness's model is HFLM as it is, in bf16, without the time to load it. Its best batch size is searched on every 16th
document, then all of the file is scored with it. Ours is the whole command, start and loading included. They take turns,
twice. Log likelihoods are compared: both compute in bf16, so they agree to about a percent, not to a digit.
"""
import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_remoe import RemoeLM


def requests_of(documents):
    pairs = [(doc["query"], doc.get("delimiter", " ") + choice) for doc in documents for choice in doc["choices"]]
    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


def seconds(model, requests):
    """-> time and answers"""
    begin = time.perf_counter()
    answers = model.loglikelihood(requests)
    return time.perf_counter() - begin, answers


def best_batch(theirs, requests, sizes):
    """the batch size with the most requests a second; sizes that do not fit are passed over"""
    best = 0.0, sizes[0]
    for size in sizes:
        theirs.batch_size_per_gpu = size
        try:
            seconds(theirs, requests[: 2 * size])  # kernels are chosen and compiled
            rate = len(requests) / seconds(theirs, requests)[0]
        except torch.OutOfMemoryError:
            print(f"lm_eval  batch {size:4}: out of memory")
            torch.cuda.empty_cache()
            break
        print(f"lm_eval  batch {size:4} {rate:9.0f} requests/s on {len(requests)}", flush=True)
        best = max(best, (rate, size))
    return best[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="run")
    parser.add_argument("--task", required=True, type=Path, help="TASK.jsonl, as dev/eval/prepare.py writes it")
    parser.add_argument("--trainer", default="./train_remoecu")
    parser.add_argument("--options", default="", help="more options of the trainer, as one text")
    parser.add_argument("--documents", type=int, help="the first so many (default: all)")
    parser.add_argument("--batches", default="16,32,64,128,256,512", help="sizes that the harness is tried with")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    documents = [json.loads(line) for line in args.task.read_text().splitlines()][: args.documents]
    requests = requests_of(documents)
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "exported"
        subprocess.run([args.trainer, "--load", args.load, "--export", exported, "--save-dtype", "bf16"], check=True)
        theirs = HFLM(pretrained=str(exported), dtype="bfloat16", trust_remote_code=True, batch_size=1, device=args.device)
        size = best_batch(theirs, requests_of(documents[::16]), [int(word) for word in args.batches.split(",")])
        theirs.batch_size_per_gpu = size
        rates = {"lm_eval": [], "score": []}
        for _ in range(2):
            taken, want = seconds(theirs, requests)
            rates["lm_eval"].append(len(requests) / taken)
            ours = RemoeLM(args.load, args.trainer, args.options)  # with a folder of its own: no answers are there yet
            taken, got = seconds(ours, requests)
            rates["score"].append(len(requests) / taken)
            print(f"{len(requests)} requests: lm_eval, batch {size}, {rates['lm_eval'][-1]:.0f} requests/s; --score "
                  f"{rates['score'][-1]:.0f} requests/s", flush=True)
        off = [abs(a[0] - b[0]) / (1 + abs(b[0])) for a, b in zip(got, want, strict=True)]
        ratio = min(rates["score"]) / max(rates["lm_eval"])
        print(f"--score is {ratio:.2f} times lm_eval (the slower of ours over the faster of its)")
        print(f"log likelihoods: mean relative difference {sum(off) / len(off):.1e}, largest {max(off):.1e}")
        sys.exit(not math.isfinite(sum(off)) or sum(off) / len(off) > 0.02)


if __name__ == "__main__":
    main()
