"""
What a run left on disk, read without trust: log.jsonl, its newest checkpoint's state.json and config.json,
the statistics of --eval --stats, the traces of --eval --trace.

A row of a log that cannot be read is dropped and counted, a value that is no number is NaN: an interrupted
run has both. A file that is not what it should be raises Refused: a sentence, and the command that mends it.
"""

import json
import math
import shlex
import stat
from collections import Counter
from pathlib import Path

import numpy as np

MOST_LOG_BYTES = 4 << 30
MOST_VALUE = 1e30  # a browser draws no larger coordinates
STAGES = ["", "I", "II", "III"]


class Refused(Exception):
    """says what is wrong and, after '--->', what mends it"""


def read_bytes(path, most=MOST_LOG_BYTES):
    """a regular file's bytes: a FIFO would never end"""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"{path} is not a regular file")
        if status.st_size > most:
            raise Refused(f"{path} has {status.st_size} bytes, more than the {most} that a report reads")
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from None


def parse_json(text):
    """-> the value, or None for what is no JSON, or nested too deeply"""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_json(path):
    """-> an object, {} where there is none"""
    try:
        value = parse_json(read_bytes(path, 64 << 20))
    except Refused:
        value = None
    return value if isinstance(value, dict) else {}


def number(value):
    """-> float, NaN for all that is no number that can be drawn: null is how the log says NaN"""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if abs(value) <= MOST_VALUE else math.nan


def whole(value, least=0):
    """-> int, or None"""
    ok = isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 53
    return value if ok else None


def nested(value, depth):
    """-> an array of that many dimensions, or None"""

    def is_nested(v, d):
        return isinstance(v, list) and len(v) > 0 and (d == 1 or all(is_nested(w, d - 1) for w in v))

    def numbers(v):
        return [numbers(w) for w in v] if isinstance(v, list) else number(v)

    if not is_nested(value, depth):
        return None
    try:
        array = np.array(numbers(value), dtype=np.float64)
    except ValueError:  # ragged
        return None
    return array if array.ndim == depth else None


# ---------------------------------------------------------------- runs


class Run:
    """
    rows[i]      the step rows, by ascending step; one row per step, the last one written
    validations  {domain: {step: loss}}
    options, state, config   of the newest checkpoint; {} where there is none
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.rows, self.validations = [], {}
        self.dropped, self.cut = 0, False
        self._read_checkpoint()
        self._read_log()

    def _read_log(self):
        path = self.folder / "log.jsonl"
        if not self.folder.is_dir():
            raise Refused(
                f"{self.folder} is no folder\n  ---> make train, then make report RUN=runs/tiny-relu"
            )
        if not path.exists():
            raise Refused(
                f"{self.folder} holds no log.jsonl: it is not a run's folder"
                f"\n  ---> name a folder that ./train_remoe --out wrote"
            )
        by_step = {}
        text = read_bytes(path)
        lines = text.split(b"\n")
        self.cut = lines[-1].strip() != b""  # a run that was killed, or is writing just now
        self.changed = path.stat().st_mtime
        for i, line in enumerate(lines):
            if line.strip() == b"":
                continue
            row = parse_json(line)
            step = whole(row.get("step")) if isinstance(row, dict) else None
            if step is None or ("val_loss" in row) == ("lm_loss" in row):
                self.dropped += not (self.cut and i == len(lines) - 1)
            elif "val_loss" in row:
                domain = row.get("domain")
                if isinstance(domain, str):
                    self.validations.setdefault(domain, {})[step] = number(row["val_loss"])
                else:
                    self.dropped += 1
            else:
                by_step[step] = row
        self.rows = [by_step[step] for step in sorted(by_step)]
        if not self.rows and not self.validations:
            raise Refused(
                f"{path} has no row that can be read ({self.dropped} that cannot)"
                "\n  ---> name the folder of a run that made at least one step"
            )

    def _read_checkpoint(self):
        self.checkpoint = newest_checkpoint(self.folder)
        self.state, self.config = {}, {}
        if self.checkpoint is not None:
            self.state = read_json(self.checkpoint / "state.json")
            self.config = read_json(self.checkpoint / "config.json")
        options = self.state.get("options")
        self.options = options if isinstance(options, dict) else {}

    @property
    def steps(self):
        """[n] the number of steps made when the row was written: a log counts from 0"""
        return np.array([row["step"] + 1 for row in self.rows], dtype=np.int64)

    def column(self, key):
        """[n] NaN where a row lacks it"""

        def value(row):
            for part in key.split("."):
                row = row.get(part) if isinstance(row, dict) else None
            return number(row)

        return np.array([value(row) for row in self.rows], dtype=np.float64)

    def has(self, key):
        return bool(np.isfinite(self.column(key)).any())

    def arrays(self, key, depth):
        """-> steps [m], values [m, ...]: the rows that have the key, in the shape that most of them have"""
        found = [(row["step"] + 1, nested(row[key], depth)) for row in self.rows if key in row]
        found = [(step, array) for step, array in found if array is not None]
        if not found:
            return np.zeros(0, np.int64), np.zeros((0,) * (depth + 1))
        shape = Counter(array.shape for _, array in found).most_common(1)[0][0]
        found = [(step, array) for step, array in found if array.shape == shape]
        return np.array([step for step, _ in found]), np.stack([array for _, array in found])

    @property
    def layers(self):
        return self.arrays("layer_sparsity", 1)[1].shape[-1]

    @property
    def router(self):
        name = self.config.get("router", self.options.get("router"))
        return name if isinstance(name, str) else None

    def evaluate(self, more=""):
        """the command that evaluates its newest checkpoint on its own validation data"""
        data = self.options.get("val_data")
        data = f" --val-data {shlex.quote(data)}" if isinstance(data, str) and data else ""
        return f"./train_remoe --load {shlex.quote(str(self.folder))} --eval{data}{more}"

    @property
    def stage(self):
        return np.nan_to_num(self.column("stage")).clip(0, 3).astype(np.int64)

    @property
    def target(self):
        """the sparsity that lambda steers to, 1 - k/E; None where no checkpoint tells"""
        experts, active = (whole(self.config.get(key), 1) for key in ("num_experts", "num_experts_per_tok"))
        return None if experts is None or active is None or active > experts else 1 - active / experts

    @property
    def tokens_per_step(self):
        """from the row's own speed, where no checkpoint tells"""
        sequences = whole(self.options.get("global_batch"), 1) or whole(self.options.get("batch"), 1)
        length = whole(self.options.get("seq_len"), 1)
        if sequences and length:
            return sequences * length
        tokens = self.column("tok_s") * self.column("ms") / 1000
        tokens = tokens[np.isfinite(tokens)]
        return int(round(float(np.median(tokens)))) if len(tokens) else None

    @property
    def stage_spans(self):
        """
        [(stage, first step, last step)]: a stage begins with its first row and ends where the next begins
        """
        steps, stage = self.steps, self.stage
        firsts = sorted((int(steps[stage == s][0]), s) for s in (1, 2, 3) if (stage == s).any())
        ends = [first - 1 for first, _ in firsts[1:]] + ([int(steps[-1])] if len(steps) else [])
        return [(s, first, last) for (first, s), last in zip(firsts, ends)]

    @property
    def settled(self):
        """steps of the stages I and II; None where stage III was not reached"""
        sparse = self.steps[self.stage == 3]
        return int(sparse[0]) - 1 if len(sparse) else None


def newest_checkpoint(folder):
    """-> the step_* folder of the most steps that has a config.json, or None"""
    try:
        found = [path for path in folder.glob("step_*") if (path / "config.json").is_file()]
    except OSError:
        found = []
    return max(found, key=lambda path: path.name, default=None)


# ---------------------------------------------------------------- tokens


def byte_of_unicode():
    """GPT-2's table: vocab.json writes each byte as a printable character"""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{chr(byte): byte for byte in kept}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


def read_vocabulary(folder):
    """-> {id: bytes}, {} where the folder has no vocab.json that can be read"""
    table = byte_of_unicode()
    words = {}
    for text, id in read_json(folder / "vocab.json").items() if folder is not None else ():
        if whole(id) is not None:
            known = all(c in table for c in text) and not text.startswith("<|")
            words[id] = bytes(table[c] for c in text) if known else text.encode(errors="replace")
    return words


def token_text(words, id):
    """a token as a reader can see it: spaces and control characters shown, bytes that are no text as \\xE2"""
    if id not in words:
        return f"#{id}"
    text = words[id].decode("utf-8", errors="backslashreplace")
    shown = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(shown.get(c, c if c.isprintable() else f"\\x{ord(c):02X}") for c in text)
