"""
The seven tasks' documents in files that --score and dev/eval/zero_shot.sh read, with the harness's exact strings.

    pip install -r dev/eval/requirements.txt
    python dev/eval/prepare.py --out data/eval                                      # all seven; the harness fetches them
    python dev/eval/prepare.py --out data/eval hellaswag=hellaswag_val.jsonl        # this one, from the publisher's file

One file per task, a document per line:

    {"id": 7, "query": "Question: ...\\nAnswer:", "choices": ["...", ...], "gold": 2, "delimiter": " "}

A choice is scored as delimiter + choice after the query. LAMBADA's only choice, the last word, brings its own space.
Query and choices are taken from the requests that lm-evaluation-harness itself makes of the task, so nothing is said twice
here. RACE is the paper's form (dev/eval/tasks/race_v2.py); with --today it is the harness's own.

TASK=FILE is a file of the data set's own fields, JSON Lines, and needs no network:

    arc_challenge, arc_easy    question, choices {"text": [...], "label": [...]}, answerKey
    boolq                      passage, question, label           (SuperGLUE's passage, which begins with the title)
    hellaswag                  activity_label, ctx_a, ctx_b, endings, label
    lambada                    text
    piqa                       goal, sol1, sol2, label
    race                       article, problems                  (as EleutherAI/race has them: problems is a text)
"""
import argparse
import functools
import json
import sys
from pathlib import Path

try:
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed ---> pip install -r dev/eval/requirements.txt")

TASKS = Path(__file__).resolve().parent / "tasks"
# a file's name, and the harness's task
NAMES = {"arc_challenge": "arc_challenge", "arc_easy": "arc_easy", "boolq": "boolq", "hellaswag": "hellaswag",
         "lambada": "lambada_openai", "piqa": "piqa", "race": "race_v2"}


@functools.cache
def task_manager():
    return TaskManager(include_path=str(TASKS))  # it reads thousands of task files


def harness_task(name, file=None, today=False):
    spec = "race" if name == "race" and today else NAMES[name]
    if file is not None:  # the task as it is, with other documents: the harness lets a group's members differ
        spec = {"group": "prepare",
                "task": [{"task": spec, "dataset_path": "json", "dataset_name": None, "training_split": None,
                          "validation_split": None, "test_split": "test", "dataset_kwargs": {"data_files": {"test": str(file)}}}]}
    (found,) = task_manager().load([spec])["tasks"].values()
    return found


def documents(task):
    """-> a line per document, of the requests that the harness makes of it"""
    for i, doc in enumerate(task.eval_docs):
        requests = task.construct_requests(doc, task.doc_to_text(doc), metadata=(None, i, 1))
        if task.OUTPUT_TYPE == "loglikelihood":  # LAMBADA
            query, choice = requests.args
            yield {"id": i, "query": query, "choices": [choice], "gold": 0, "delimiter": ""}
            continue
        delimiter, choices = task.config.target_delimiter, task.doc_to_choice(doc)
        query = requests[0].args[0]
        if [request.args for request in requests] != [(query, delimiter + choice) for choice in choices]:
            raise ValueError(f"{task.config.task}, document {i}: its requests are not one query with choices")
        yield {"id": i, "query": query, "choices": choices, "gold": int(task.doc_to_target(doc)), "delimiter": delimiter}


def prepare(name, folder, file=None, today=False):
    lines = list(documents(harness_task(name, file, today)))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{path}: {len(lines)} documents, {sum(len(line['choices']) for line in lines)} requests")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(NAMES), metavar="TASK[=FILE]", help=f"{', '.join(NAMES)}; default: all")
    parser.add_argument("--out", required=True, type=Path, help="folder for TASK.jsonl")
    parser.add_argument("--today", action="store_true", help="RACE in the harness's present form, not the paper's")
    args = parser.parse_args()
    for word in args.tasks:
        name, _, file = word.partition("=")
        if name not in NAMES:
            sys.exit(f"error: no task {name} ---> one of {', '.join(NAMES)}")
        if file and not Path(file).is_file():
            sys.exit(f"error: no file {file}")
        prepare(name, args.out, file or None, args.today)


if __name__ == "__main__":
    main()
