"""
prepare.py and lm_eval_remoe.py without a network, a model or PyTorch, in half a minute (.ci/run has it where lm_eval is).

    pip install 'lm_eval>=0.4.13'
    python dev/eval/check_tasks.py

    documents    of each of the seven tasks one made up here, whose strings were written by hand from the task's definition
    requests     what RemoeLM has the trainer asked, and which answer goes to whom; the trainer is a script that answers
                 with what it was asked, or not at all
    paper        the groups of dev/eval/tasks name tasks that the harness has; the mean of seven
"""
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = HERE.name  # before the harness looks for it
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

from lm_eval_remoe import COLUMNS, TASKS, RemoeLM, TrainerError, paper_table  # noqa: E402
from prepare import documents, harness_task, task_manager  # noqa: E402

from lm_eval.api.instance import Instance  # noqa: E402  (behind those two, which say how it is installed)

failed = 0


def verdict(what, got, want):
    global failed
    failed += got != want
    print(f"{'ok    ' if got == want else 'FAILED'} {what}")
    if got != want:
        print(f"    {got!r}\n    {want!r}")


# ------------------------------------------------------------------------------------------------------------
# documents

PROBLEMS = [
    {"question": "Who came?", "answer": "B", "options": ["Ann", "Bob", "Cy", "Di"]},
    {"question": "It was  _  .", "answer": "D", "options": ["a", "b", "c", "dark"]},
    {"question": "It rained _ .", "answer": "A", "options": ["often", "b", "c", "d"]},
    {"question": "So the end was  _  .", "answer": "C", "options": ["sad", "bad", "mad", "glad"]},
]
ARC = {"question": "What falls?", "choices": {"text": ["rain", "the sky", " a  cat"], "label": ["A", "B", "C"]}, "answerKey": "B"}
ARC_LINE = {"query": "Question: What falls?\nAnswer:", "choices": ["rain", "the sky", " a  cat"], "gold": 1, "delimiter": " "}
RACE_BEFORE = "Article: It was night.\n\nQuestion: Who came?\nAnswer: Bob\n"
RACE_AFTER = "Question: It rained _ .\nAnswer: often\nSo the end was  _  ."
RACE_LINE = {"choices": ["sad", "bad", "mad", "glad"], "gold": 2, "delimiter": " "}
# task: the data set's document, and what is to become of it
CASES = {
    "arc_challenge": (ARC, ARC_LINE),
    "arc_easy": (ARC, ARC_LINE),
    "boolq": ({"passage": "Ethanol -- It burns.", "question": "does it burn", "label": 1, "idx": 0},
              {"query": "Ethanol -- It burns.\nQuestion: does it burn?\nAnswer:", "choices": ["no", "yes"], "gold": 1,
               "delimiter": " "}),
    "hellaswag": ({"ind": 3, "activity_label": "Baking [x] bread", "ctx_a": "[header] How to bake. [title] Buy [step] FLOUR.",
                   "ctx_b": "the MAN then", "ctx": "unused", "label": "2",
                   "endings": ["  [substeps] goes  on. ", "eats [title] more", "b [a] [c]", "..   x"]},
                  {"query": "Baking bread: How to bake.. Buy FLOUR. The man then", "gold": 2, "delimiter": " ",
                   "choices": [" goes on.", "eats. more", "b ", "..  x"]}),
    "lambada": ({"text": "He said\n\nit  was a\ncat"},
                {"query": "He said\n\nit  was", "choices": [" a\ncat"], "gold": 0, "delimiter": ""}),
    "piqa": ({"goal": "Open a jar", "sol1": "Twist it. ", "sol2": " Break it", "label": 0},
             {"query": "Question: Open a jar\nAnswer:", "choices": ["Twist it. ", " Break it"], "gold": 0, "delimiter": " "}),
    "race": ({"article": "It was night.", "problems": str(PROBLEMS)},
             {"query": RACE_BEFORE + " _  .dark\n" + RACE_AFTER, **RACE_LINE}),
}


def check_documents():
    for name, (document, want) in CASES.items():
        file = Path(HERE.name) / f"{name}.jsonl"
        file.write_text(json.dumps(document) + "\n" + json.dumps(document) + "\n")
        verdict(f"documents: {name}", list(documents(harness_task(name, file))), [{"id": 0, **want}, {"id": 1, **want}])
    today = {"id": 0, "query": RACE_BEFORE + "It was dark\n" + RACE_AFTER, **RACE_LINE}
    verdict("documents: race, today's form", next(documents(harness_task("race", file, today=True))), today)


# ------------------------------------------------------------------------------------------------------------
# requests

# a trainer whose answers tell what it was asked
TRAINER = """#!{python}
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = open(options["--out"], "w")
for line in open(options.get("--score") or options["--generate"]):
    asked = json.loads(line)
    if "continuations" in asked:
        texts = [asked["context"] + "|" + continuation for continuation in asked["continuations"]]
        answer = {{"ll": [-len(text) - asked["id"] / 8 for text in texts], "greedy": ["y" in text for text in texts]}}
    elif "text" in asked:
        answer = {{"ll": [-len(asked["text"])]}}
    else:
        answer = {{"text": json.dumps([asked[key] for key in ("context", "until", "max_tokens", "temperature", "top_k")])}}
    if options["--load"] != "short" or asked["id"] == 0:
        out.write(json.dumps({{"id": asked["id"], **answer}}) + "\\n")
sys.exit(options["--load"] == "bad")
"""


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=words, idx=i) for i, words in enumerate(arguments)]


def complaint(load, trainer):
    try:
        RemoeLM(load, trainer).loglikelihood(requests("loglikelihood", ("a", " b"), ("c", " d")))
    except TrainerError as error:
        return str(error)
    return ""


def check_requests():
    trainer = Path(HERE.name) / "trainer"
    trainer.write_text(TRAINER.format(python=sys.executable))
    trainer.chmod(0o755)
    model = RemoeLM("run", trainer)
    pairs = ("a", " x"), ("bb", " y"), ("a", " long"), ("", "é\n"), ("bb", " y")  # the first context comes again
    verdict("requests: loglikelihood", model.loglikelihood(requests("loglikelihood", *pairs)),
            [(-4.0, False), (-5.125, True), (-7.0, False), (-3.25, False), (-5.125, True)])
    verdict("requests: a line per context", len(list(model.work.glob("score-*.requests.jsonl"))[0].read_text().splitlines()), 3)
    verdict("requests: none", model.loglikelihood([]), [])
    verdict("requests: loglikelihood_rolling",
            model.loglikelihood_rolling(requests("loglikelihood_rolling", ("four",), ("fifty",))), [-4, -5])
    settings = [{"until": ["\n", "."], "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}, {"until": "."}, {},
                {"max_new_tokens": 9, "do_sample": True, "temperature": 0.7, "top_k": 3, "top_p": 1.0, "num_beams": 1}]
    want = [["a", ["\n", "."], 5, 0.0, 0], ["a", ["."], 256, 0.0, 0], ["a", [], 256, 0.0, 0], ["a", [], 9, 0.7, 3]]
    got = model.generate_until(requests("generate_until", *(("a", each) for each in settings)))
    verdict("requests: generate_until", [json.loads(text) for text in got], want)
    verdict("requests: the trainer's options", RemoeLM("run", "t", "--gpus 2", batch_size=8, max_length=64).command,
            "t --load run --gpus 2 --batch 8 --seq-len 64".split())
    refused = ("bad", trainer, "exit 1"), ("short", trainer, "an answer to each of 2"), ("run", "none", "cannot run")
    for load, program, words in refused:
        verdict(f"requests: {words}", words in complaint(load, program), True)


# ------------------------------------------------------------------------------------------------------------
# the paper's table


def check_paper():
    manager = task_manager()
    for group, race in (("paper", "race_v2"), ("paper_today", "race")):
        members = next(path for path in TASKS.glob(f"{group}.yaml")).read_text().split("task:")[1].split("agg")[0]
        names = [line.strip(" -") for line in members.strip().splitlines()]
        verdict(f"paper: {group}", [names, all(name in manager.all_subtasks for name in names), group in manager.all_groups],
                [[*list(COLUMNS)[:6], race], True, True])
    names = [*list(COLUMNS)[:6], "race_v2"]
    results = {"results": {name: {"acc,none": 0.1 * i, "acc_stderr,none": 0.01} for i, name in enumerate(names)}}
    verdict("paper: mean of seven", paper_table(results).splitlines()[1].split(),
            ["0.00", "10.00", "20.00", "30.00", "40.00", "50.00", "60.00", "30.00"])
    del results["results"]["piqa"]
    verdict("paper: not of six", paper_table(results), None)


def main():
    check_documents()
    check_requests()
    check_paper()
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
