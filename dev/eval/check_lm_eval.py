"""
Our scores against lm-evaluation-harness's own, of the exported model in transformers in fp32.

    pip install -r dev/eval/requirements.txt
    make train_remoe data-tools
    python dev/eval/check_lm_eval.py --tasks data/eval --tokenizer data/gpt2 --text pile_part.jsonl.zst
    python dev/eval/check_lm_eval.py --tasks data/eval --trainer ./train_remoecu_fp32 RUN ...    # these runs instead

--tasks is a folder of TASK.jsonl or TASK.jsonl.zst, as dev/eval/prepare.py writes them. Without a RUN, a small model per
router (relu, topk) is trained on the text, with GPT-2's vocabulary and contexts of 1,024 tokens. Of each model:

    TASK        of the first 200 documents: every log likelihood within 1e-3, every greedy flag equal, every choice by acc and
                acc_norm equal, and so the task's row; asked by the harness through lm_eval_remoe.py, and once more by --score
                from the file itself
    rolling     log likelihoods of whole texts, shorter and longer than the context: the same bound
    generate    greedy text, without and with stop strings: equal
    greedy      the first token of that text as a continuation, and one more: the same comparison as of a task

The harness reads the same files, through task files that are written here, and needs no network.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval  # noqa: E402
import numpy as np  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from lm_eval_remoe import RemoeLM  # noqa: E402

LIMIT = 1e-3  # nats, of a whole continuation
ROOT = Path(__file__).resolve().parents[2]
SHAPE = "--layers 2 --hidden 64 --heads 4 --kv-heads 2 --experts 8 --vocab-size 50304 --seq-len 1024"
SCHEDULE = "--batch 2 --steps 200 --lr 3e-3 --warmup-steps 20 --lambda-init 1e-3 --sample-tokens 0"

failed = 0


def verdict(what, ok, figure):
    global failed
    failed += not ok
    print(f"{'ok    ' if ok else 'FAILED'} {what:28} {figure}", flush=True)


def run(*words):
    words = [str(word) for word in words]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr}")


def train(args, here):
    """-> a run per router"""
    run("build/tokenize", "--tokenizer", args.tokenizer, "--out", here / "tokens", *args.text)
    for router in ("relu", "topk"):
        data = ("--train-data", here / "tokens/train_*.bin", "--val-data", "", "--tokenizer", args.tokenizer)
        run(args.trainer, *SHAPE.split(), *SCHEDULE.split(), "--router", router, *data, "--out", here / router)
    return [here / "relu", here / "topk"]


# ------------------------------------------------------------------------------------------------------------
# tasks


def read_documents(file, count):
    text = file.read_bytes()
    if file.suffix == ".zst":
        text = subprocess.run(["zstd", "-dc", file], capture_output=True, check=True).stdout
    return [json.loads(line) for line in text.decode().split("\n")[:count] if line]


def write_task(name, documents, folder):
    """TASK.jsonl and the harness's task file of it; a document's only choice is LAMBADA's, with its own space"""
    lines = [{"id": str(doc["id"]), "query": doc["query"], "choices": doc["choices"], "gold": doc["gold"],
              "delimiter": doc.get("delimiter", " " if len(doc["choices"]) > 1 else "")} for doc in documents]
    (delimiter,) = {line["delimiter"] for line in lines}
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = ["acc", "perplexity"] if len(lines[0]["choices"]) == 1 else ["acc", "acc_norm"]
    task = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test", "doc_to_text": "query", "target_delimiter": delimiter,
            "metric_list": [{"metric": metric} for metric in metrics]}
    if metrics[1] == "perplexity":
        task |= {"output_type": "loglikelihood", "doc_to_target": "{{choices[0]}}"}
    else:
        task |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return lines


def evaluate(model, names, manager):
    results = lm_eval.simple_evaluate(model, tasks=[f"local_{name}" for name in names], task_manager=manager, bootstrap_iters=0)
    samples = {}
    for name in names:
        ordered = sorted(results["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
        samples[name] = [[answer[0] for answer in sample["resps"]] for sample in ordered]
    return samples, results["results"]


def choices_of(answers, lines):
    """-> the choice by acc and by acc_norm, each"""
    lls = [np.array([ll for ll, _ in each]) for each in answers]
    lengths = [np.array([len(choice) for choice in line["choices"]]) for line in lines]
    return [(int(ll.argmax()), int((ll / n).argmax())) for ll, n in zip(lls, lengths, strict=True)]


def compare(what, got, want, lines):
    """got, want: per document its choices' (log likelihood, greedy)"""
    pairs = [(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)]
    off = max(abs(a[0] - b[0]) for a, b in pairs)
    greedy = sum(bool(a[1]) != bool(b[1]) for a, b in pairs)
    chosen = sum(a != b for a, b in zip(choices_of(got, lines), choices_of(want, lines), strict=True))
    verdict(what, off <= LIMIT and greedy == 0 and chosen == 0,
            f"{off:8.1e} of {len(pairs)} log likelihoods; {greedy} greedy flags ({sum(bool(b[1]) for _, b in pairs)} set) and "
            f"{chosen} of {len(lines)} choices differ")


def check_tasks(name, model, theirs, tasks, folder):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    got, rows = evaluate(model, tasks, manager)
    want, their_rows = evaluate(theirs, tasks, manager)
    for task, lines in tasks.items():
        compare(f"{name}: {task}", got[task], want[task], lines)
        keys = [key for key in their_rows[f"local_{task}"] if key.startswith("acc") and "stderr" not in key]
        same = all(rows[f"local_{task}"][key] == their_rows[f"local_{task}"][key] for key in keys)
        verdict(f"{name}: {task}, row", same, ", ".join(f"{key.split(',')[0]} {rows[f'local_{task}'][key]:.4f}" for key in keys))
        scores = folder / f"{name}-{task}.scores.jsonl"
        model.run([*model.command, "--score", str(folder / f"{task}.jsonl"), "--out", str(scores)])
        answers = [json.loads(line) for line in scores.open()]
        answers = [list(zip(each["ll"], each["greedy"], strict=True)) for each in answers]
        compare(f"{name}: {task}, from its file", answers, want[task], lines)


# ------------------------------------------------------------------------------------------------------------
# whole texts


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=words, idx=i) for i, words in enumerate(arguments)]


def check_texts(name, model, theirs, texts):
    rolling = [(text,) for text in [*texts, "\n\n".join(texts), "x", ""]]
    got, want = (each.loglikelihood_rolling(requests("loglikelihood_rolling", rolling)) for each in (model, theirs))
    off = max(abs(a - b) / max(1, abs(b) / 1000) for a, b in zip(got, want, strict=True))  # 1,000 nats or more: 1e-6 of them
    verdict(f"{name}: rolling", off <= LIMIT, f"{off:8.1e} of {len(got)} texts, the longest {min(want):.1f}")
    stops = ["@@"], ["\n\n", " the"], " of"
    settings = [{"until": stop, "max_gen_toks": 24, "do_sample": False} for stop in stops]
    contexts = [text[:200].rstrip() for text in texts]
    generate = [(context, setting) for context in contexts for setting in settings]
    got, want = (each.generate_until(requests("generate_until", generate)) for each in (model, theirs))
    same = sum(a == b for a, b in zip(got, want, strict=True))
    verdict(f"{name}: generate", same == len(got), f"{same} of {len(got)} texts, {sum(map(len, got))} characters")
    for a, b in zip(got, want, strict=True):
        if a != b:
            print(f"    {a!r}\n    {b!r}")
    first = theirs.generate_until(requests("generate_until", [(context, {**settings[0], "max_gen_toks": 1}) for context in contexts]))
    length = lambda text: len(theirs.tok_encode(text))  # noqa: E731
    pairs = zip(contexts, first, strict=True)  # a first token may merge into the context's last: the harness refuses such
    generated = [(context, text) for context, text in pairs if length(context + text) > length(context)]
    pairs = [pair for context, text in generated for pair in ((context, text), (context, text + " the"))]
    got, want = (each.loglikelihood(requests("loglikelihood", pairs)) for each in (model, theirs))
    compare(f"{name}: greedy", [got], [want], [{"choices": [text for _, text in pairs]}])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of TASK.jsonl or TASK.jsonl.zst")
    parser.add_argument("--trainer", default=str(ROOT / "train_remoe"))
    parser.add_argument("--tokenizer", type=Path, help="without a RUN: folder with GPT-2's vocab.json and merges.txt")
    parser.add_argument("--text", nargs="*", type=Path, help="without a RUN: files to train on")
    parser.add_argument("--documents", type=int, default=200, help="of each task")
    parser.add_argument("--device", default="cpu", help="where transformers computes")
    args = parser.parse_args()
    if not args.runs and not (args.tokenizer and args.text):
        parser.error("name runs, or --tokenizer and --text to train on")
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        os.environ["HF_HOME"] = str(here / "cache")
        files = sorted(path for path in args.tasks.iterdir() if path.name.endswith((".jsonl", ".jsonl.zst")))
        tasks = {file.name.split(".")[0]: read_documents(file.resolve(), args.documents) for file in files}
        tasks = {name: write_task(name, documents, here) for name, documents in tasks.items()}
        texts = [line["query"] for lines in tasks.values() for line in lines[:4]]
        for path in [path.resolve() for path in args.runs] or train(args, here):
            exported = here / f"exported-{path.name}"
            run(args.trainer, "--load", path, "--export", exported)
            theirs = HFLM(pretrained=str(exported), dtype="float32", trust_remote_code=True, batch_size=8, device=args.device)
            model = RemoeLM(path, args.trainer)
            check_tasks(path.name, model, theirs, tasks, here)
            check_texts(path.name, model, theirs, texts)
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
