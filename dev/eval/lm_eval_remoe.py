"""
Evaluates a checkpoint with lm-evaluation-harness, at the trainer's speed.

    pip install -r dev/eval/requirements.txt
    python dev/eval/lm_eval_remoe.py --load RUN --tasks paper                # the paper's seven; the harness fetches them
    python dev/eval/lm_eval_remoe.py --load RUN --trainer ./train_remoecu --tasks winogrande,wikitext --out results.json
    python dev/eval/lm_eval_remoe.py lm_eval --model remoe --model_args load=RUN,trainer=./train_remoecu --tasks piqa

The harness makes requests of its tasks, and metrics of the answers. In between, the model type "remoe" writes the
requests to a file and has the trainer answer them: --score for log likelihoods, --generate for text. Neither PyTorch nor
an export is needed. The third form is the harness's own command, with all of its options and this model type.

    loglikelihood            {"id", "context", "continuations": [...]}, one line for all continuations of a context
    loglikelihood_rolling    {"id", "text"}
    generate_until           {"id", "context", "until": [...], "max_tokens", "temperature"}

--tasks paper has RACE in the older form that the paper's numbers belong to; paper_today has the harness's own.
--work FOLDER keeps requests and answers there: a command that was stopped goes on when it is given again.
"""
import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed ---> pip install -r dev/eval/requirements.txt")

TASKS = Path(__file__).resolve().parent / "tasks"
# in the order of the paper's columns
COLUMNS = {"arc_challenge": "ARC-c", "arc_easy": "ARC-e", "boolq": "BoolQ", "hellaswag": "HellaSwag",
           "lambada_openai": "LAMBADA", "piqa": "PIQA", "race": "RACE"}
# names that tasks have for the most tokens of an answer, the first one first
MOST_TOKENS = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"
SETTINGS = {"do_sample", "temperature", "until", "top_k", *MOST_TOKENS}


class TrainerError(Exception):
    """The trainer cannot answer; the message says why"""


@register_model("remoe")
class RemoeLM(LM):
    """A checkpoint, as the trainer reads it: a run, a checkpoint of one, or a folder in Hugging Face's layout."""

    def __init__(self, load, trainer="./train_remoe", options="", work=None, batch_size=None, max_length=None,
                 max_gen_toks=256, tokenizer=None, gpus=None, seed=None, device=None, max_batch_size=None):
        """options: more of the trainer's own, as one text. device, max_batch_size: the trainer's own business"""
        super().__init__()
        self._rank, self._world_size, self._device = 0, 1, "cpu"  # several GPUs are the trainer's business, too
        self.max_gen_toks = int(max_gen_toks)
        if batch_size == "auto" or batch_size == 1:  # the harness's defaults, which the trainer need not be slowed by
            batch_size = None
        named = {"--tokenizer": tokenizer, "--batch": batch_size, "--seq-len": max_length, "--gpus": gpus, "--seed": seed}
        self.command = [str(trainer), "--load", str(load), *shlex.split(options)]
        for name, value in named.items():
            self.command += [name, str(value)] if value is not None else []
        self._own_folder = tempfile.TemporaryDirectory(prefix="remoe-") if work is None else None
        self.work = Path(work or self._own_folder.name)

    def answers(self, option, lines):
        """The trainer's answer to each request line, in their order"""
        if not lines:
            return []
        text = "".join(json.dumps({"id": i, **line}) + "\n" for i, line in enumerate(lines))
        name = option.strip("-") + "-" + hashlib.sha256(text.encode()).hexdigest()[:16]
        requests, answers = self.work / f"{name}.requests.jsonl", self.work / f"{name}.answers.jsonl"
        self.work.mkdir(parents=True, exist_ok=True)
        requests.write_text(text)
        self.run([*self.command, option, str(requests), "--out", str(answers)])
        got = [json.loads(line) for line in answers.open(encoding="utf-8")]
        if [answer["id"] for answer in got] != list(range(len(lines))):
            raise TrainerError(f"{answers}: expected an answer to each of {len(lines)} requests, in their order")
        return got

    @staticmethod
    def run(command):
        try:
            process = subprocess.Popen(command, stdout=sys.stderr)
        except OSError as error:
            raise TrainerError(f"cannot run {command[0]}: {error.strerror} ---> make train_remoe, or name it with --trainer")
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it has the signal, too, and keeps what is complete
            raise
        if code != 0:
            raise TrainerError(f"{shlex.join(command)}: exit {code}")

    def remember(self, kind, requests, answers):
        """for the harness's --use_cache"""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers

    def loglikelihood(self, requests):
        """-> (log likelihood, is the continuation what greedy decoding gives?) each"""
        contexts = {}  # the trainer computes a context once for all of its continuations
        for i, request in enumerate(requests):
            context, continuation = request.args
            contexts.setdefault(context, []).append((i, continuation))
        lines = [{"context": context, "continuations": [continuation for _, continuation in group]}
                 for context, group in contexts.items()]
        found = [None] * len(requests)
        for group, answer in zip(contexts.values(), self.answers("--score", lines), strict=True):
            for (i, _), ll, greedy in zip(group, answer["ll"], answer["greedy"], strict=True):
                found[i] = ll, greedy
        return self.remember("loglikelihood", requests, found)

    def loglikelihood_rolling(self, requests):
        answers = self.answers("--score", [{"text": request.args[0]} for request in requests])
        return self.remember("loglikelihood_rolling", requests, [answer["ll"][0] for answer in answers])

    def generation(self, context, settings):
        """a line of --generate from what a task asks for"""
        strange = {name: value for name, value in settings.items() if name not in SETTINGS and value not in (None, False)}
        if strange.pop("top_p", 1) != 1 or strange.pop("num_beams", 1) != 1 or strange:
            raise TrainerError(f"generate_until with {settings}: the trainer knows only {', '.join(sorted(SETTINGS))}")
        until = settings.get("until") or []
        most = next((settings[name] for name in MOST_TOKENS if settings.get(name) is not None), self.max_gen_toks)
        samples = settings.get("do_sample") is not False
        return {"context": context, "until": [until] if isinstance(until, str) else list(until), "max_tokens": int(most),
                "temperature": float(settings.get("temperature") or 0) if samples else 0.0,
                "top_k": int(settings.get("top_k") or 0)}

    def generate_until(self, requests):
        answers = self.answers("--generate", [self.generation(*request.args) for request in requests])
        return self.remember("generate_until", requests, [answer["text"] for answer in answers])


def paper_table(results):
    """The paper's columns of what was evaluated, in percent, with standard errors; None unless all seven were"""
    found = {}
    for task, metrics in results["results"].items():
        task = "race" if task == "race_v2" else task
        if task in COLUMNS:
            found[task] = 100 * metrics["acc,none"], 100 * metrics["acc_stderr,none"]
    if found.keys() != COLUMNS.keys():
        return None
    rows = [[*COLUMNS.values(), "Avg."],
            [f"{found[task][0]:.2f}" for task in COLUMNS] + [f"{sum(acc for acc, _ in found.values()) / len(found):.2f}"],
            [f"+-{found[task][1]:.2f}" for task in COLUMNS] + [""]]
    return "\n".join("".join(f"{cell:>10}" for cell in row) for row in rows)


def evaluate(words):
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="a run, a checkpoint of one, or an exported folder")
    parser.add_argument("--trainer", default="./train_remoe", help="the program that answers: ./train_remoecu on a GPU")
    parser.add_argument("--options", default="", help="more options of the trainer, as one text: '--gpus 2 --batch 64'")
    parser.add_argument("--tasks", default="paper", help="names of the harness's tasks, with commas; paper, paper_today")
    parser.add_argument("--num_fewshot", type=int, help="solved documents before each (default: the task's)")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--include_path", help="a folder with more task files")
    parser.add_argument("--work", help="folder that keeps requests and answers")
    parser.add_argument("--out", help="file for all results, as JSON")
    args = parser.parse_args(words)
    model, tasks = RemoeLM(args.load, args.trainer, args.options, args.work), args.tasks.split(",")
    manager = TaskManager(include_path=[str(TASKS), *([args.include_path] if args.include_path else [])])
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        sys.exit(f"error: no task {unknown[0]} ---> lm_eval ls tasks lists them; your own: --include_path FOLDER")
    results = lm_eval.simple_evaluate(model, tasks=tasks, num_fewshot=args.num_fewshot, limit=args.limit,
                                      task_manager=manager, log_samples=False)
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=2, default=handle_non_serializable) + "\n")
    print(make_table(results))
    print(paper_table(results) or "")


def main():
    if sys.argv[1:2] == ["lm_eval"]:  # the harness's own command, which knows this model type now
        from lm_eval.__main__ import cli_evaluate

        del sys.argv[1]
        cli_evaluate()
        return
    evaluate(sys.argv[1:])


if __name__ == "__main__":
    try:
        main()
    except TrainerError as error:
        sys.exit(f"error: {error}")
