"""
Remakes a run's report while the run goes on, and mirrors its log to TensorBoard or Weights & Biases.

    python dev/report/follow.py runs/small-relu                        an open page reloads itself
    python dev/report/follow.py runs/small-relu --tensorboard DIR      pip install tensorboardX
    python dev/report/follow.py runs/small-relu --wandb PROJECT        pip install wandb

Ctrl-C ends it, and the last page no longer reloads itself. The report is made anew when the log, or a file of
statistics or traces beside it, has changed. A run that does not exist yet is waited for. A row is mirrored
once: a resumed run writes the steps after its checkpoint again, with the same values, and a line that is
still being written is left for the next time.
"""

import argparse
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from report import make_report, refused
from sources import Refused, number, parse_json, whole


def words():
    parser = argparse.ArgumentParser(
        description="remakes a run's report while the run goes on", allow_abbrev=False
    )
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the run's folder")
    parser.add_argument("--seconds", type=float, default=10, help="between looks at the log (default: 10)")
    parser.add_argument("--tensorboard", metavar="DIR", help="mirror the log to this folder")
    parser.add_argument("--wandb", metavar="PROJECT", help="mirror the log to this project")
    parser.add_argument("--once", action="store_true", help="look once, then end")
    return parser


# ---------------------------------------------------------------- mirrors

NO_TENSORBOARD = "--tensorboard needs tensorboardX, or torch and tensorboard\n  ---> pip install tensorboardX"
NO_WANDB = "--wandb needs wandb\n  ---> pip install wandb, then wandb login"


def flat(row):
    """-> {"lm_loss": 2.5, "layer_sparsity/0": 0.8, ...} of a row's finite numbers"""
    found = {}

    def visit(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{name}/{key}" if name else key, inner)
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                visit(f"{name}/{i}", inner)
        elif number(value) - number(value) == 0:
            found[name] = number(value)

    visit("", {key: value for key, value in row.items() if key != "step"})
    return found


class TensorBoard:
    def __init__(self, folder, name):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise Refused(NO_TENSORBOARD) from None
        try:
            self.writer = SummaryWriter(str(Path(folder) / name), flush_secs=5)
        except OSError as error:
            raise Refused(
                f"cannot write to {folder}: {error.strerror}\n  ---> name another folder with --tensorboard"
            ) from None

    def write(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    """
    a step's values go in one call, since its steps may only rise; a validation joins the row of the same
    number of steps
    """

    def __init__(self, project, name):
        try:
            import wandb
        except ImportError:
            raise Refused(NO_WANDB) from None
        self.wandb = wandb
        try:
            self.run = wandb.init(project=project, name=name)
        except Exception as error:  # wandb has errors of its own for a missing login, network or right
            raise Refused(f"wandb: {error}\n  ---> wandb login, or WANDB_MODE=offline") from None

    def write(self, step, values):
        self.run.log(values, step=step)

    def flush(self):
        pass

    def close(self):
        self.run.finish()


class Log:
    """the complete lines of a log that grows, each row once"""

    def __init__(self, path):
        self.path, self.offset, self.file, self.seen = path, 0, None, set()

    def new_rows(self):
        """-> [(steps made, values)]"""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self.file or status.st_size < self.offset:
                    self.offset = (
                        0  # a run that is resumed writes the rows before its checkpoint to a new file
                    )
                self.file = status.st_ino
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return []
        whole_lines = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole_lines)
        rows = [self.row(line) for line in whole_lines.split(b"\n")]
        return [row for row in rows if row is not None]

    def row(self, line):
        row = parse_json(line)
        step = whole(row.get("step")) if isinstance(row, dict) else None
        if step is None:
            return None
        domain = row.get("domain") if "val_loss" in row else None
        if (step, domain) in self.seen:
            return None
        self.seen.add((step, domain))
        if domain is not None:
            return step, flat({f"val_loss/{domain}": row["val_loss"]})
        return step + 1, flat(row)


def mirror(log, mirrors):
    rows = log.new_rows()
    for step, values in rows:
        for each in mirrors:
            each.write(step, values)
    for each in mirrors:
        each.flush()
    return len(rows)


# ---------------------------------------------------------------- the loop


def changes(run):
    """what the report depends on: sizes and times of the files"""
    found = []
    for name in ("log.jsonl", "stats.safetensors", "trace.safetensors"):
        try:
            status = (run / name).stat()
            found.append((name, status.st_size, status.st_mtime_ns))
        except OSError:
            pass
    return found


def make(asked, refresh):
    out = Path(asked.out) if asked.out else Path(asked.run) / "report.html"
    size = make_report([asked.run], [], [], out, shlex.join(["python", *sys.argv]), refresh)
    return f"{out}: {size / 1e6:.2f} MB"


def follow(asked, mirrors):
    run = Path(asked.run)
    log, before = Log(run / "log.jsonl"), []
    if not changes(run):
        print(f"waiting for {run / 'log.jsonl'}", flush=True)
    while True:
        now = changes(run)
        if now != before:
            before = now
            try:
                print(make(asked, max(5, int(asked.seconds))), flush=True)
            except (
                Refused
            ) as error:  # the run may mend it: its first row is not yet there, a file is half written
                print(f"waiting: {error}", flush=True)
            mirror(log, mirrors)
        time.sleep(max(0.2, asked.seconds))


def look_once(asked, mirrors):
    print(make(asked, 0))
    if mirrors:
        print(f"{mirror(Log(Path(asked.run) / 'log.jsonl'), mirrors)} rows mirrored")


def main():
    asked = words().parse_args()
    mirrors = []
    for ending in (signal.SIGTERM, signal.SIGINT):  # SIGINT too: a shell's background ignores it
        signal.signal(ending, signal.default_int_handler)
    try:
        name = Path(asked.run).resolve().name
        if asked.tensorboard:
            mirrors.append(TensorBoard(asked.tensorboard, name))
        if asked.wandb:
            mirrors.append(WeightsAndBiases(asked.wandb, name))
        (look_once if asked.once else follow)(asked, mirrors)
    except Refused as error:
        return refused(error)
    except KeyboardInterrupt:
        if changes(Path(asked.run)):
            print("\n" + make(asked, 0))
    finally:
        for each in mirrors:
            each.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
