"""
One HTML file that shows a run, or several side by side.

    pip install -r dev/report/requirements.txt
    python dev/report/report.py runs/tiny-relu                     -> runs/tiny-relu/report.html
    python dev/report/report.py runs/relu runs/topk --out both.html

What was made from a checkpoint is found in its run's folder, or named, in the order of the runs:

    ./train_remoe --load runs/relu --eval --stats runs/relu/stats.safetensors
    ./train_remoe --load runs/relu --trace runs/relu/trace.safetensors --text FILE.txt

Where something is missing the page says which command makes it. Errors: exit 1, 2 for usage.
"""

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

import needs  # noqa: F401 (before what needs it)
from sources import Refused, Run

MOST_BYTES = 6_000_000


def words():
    parser = argparse.ArgumentParser(
        description="one HTML file that shows a run, or several side by side", allow_abbrev=False
    )
    parser.add_argument("run", nargs="+", help="a run's folder: what ./train_remoe --out wrote")
    parser.add_argument(
        "--stats",
        nargs="+",
        default=[],
        metavar="FILE",
        help="of --eval --stats, one per run (default: RUN/stats.safetensors)",
    )
    parser.add_argument(
        "--trace",
        nargs="+",
        default=[],
        metavar="FILE",
        help="of --trace, one per run (default: RUN/trace.safetensors)",
    )
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the first run's folder")
    return parser


def open_file(kind, named, i, run):
    """the file named for run i, or the one in its folder, or None"""
    default = run.folder / f"{kind.__name__.lower()}.safetensors"
    path = Path(named[i]) if i < len(named) else default
    if i >= len(named) and not path.exists():
        return None
    file = kind(path)
    if run.router is not None and file.router and file.router != run.router:
        raise Refused(
            f"{path} is of a {file.router} model ({file.checkpoint}), {run.folder} is a {run.router} run"
            f"\n  ---> name --{kind.__name__.lower()} files in the order of the runs"
        )
    layers = run.layers
    if layers and layers != file.layers:
        raise Refused(
            f"{path} is of {file.layers} layers ({file.checkpoint}), {run.folder} has {layers}"
            f"\n  ---> name --{kind.__name__.lower()} files in the order of the runs"
        )
    return file


def distinct_names(folders):
    """the last parts of the paths, as many as it takes to tell them apart"""
    paths = [Path(folder).resolve().parts for folder in folders]
    for n in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-n:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise Refused("a run is named twice\n  ---> name each run once")


def open_subjects(folders, stats=(), trace=()):
    from plot import Subject, colour
    from routing_files import Stats, Trace

    for kind, files in (("--stats", stats), ("--trace", trace)):
        if len(files) > len(folders):
            raise Refused(
                f"{len(files)} files for {kind}, {len(folders)} runs\n  ---> name one per run, in their order"
            )
    subjects = []
    for i, (folder, name) in enumerate(zip(folders, distinct_names(folders))):
        run = Run(folder)
        subjects.append(
            Subject(name, colour(i), run, open_file(Stats, stats, i, run), open_file(Trace, trace, i, run))
        )
    return subjects


PAGE_BEGINS = b"<!doctype html>"


def write_whole(path, data):
    """a reader never sees half of a page; a device, or a file that is no page, is not replaced by one"""
    try:
        if path.exists() and not path.is_dir():
            if not path.is_file() or (path.stat().st_size > 0 and not path.read_bytes().startswith(PAGE_BEGINS)):
                raise Refused(f"{path} is there, and no page\n  ---> name another file with --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".report.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror}\n  ---> name another file with --out") from None


def make_report(folders, stats, trace, out, command, refresh=0):
    from page import make_page

    subjects = open_subjects(folders, stats, trace)
    html = make_page(
        subjects,
        " and ".join(s.name for s in subjects[:3]) + (" …" if len(subjects) > 3 else ""),
        command,
        refresh,
    )
    write_whole(out, html)
    return len(html)


def refused(error):
    print(f"error: {error}", file=sys.stderr)
    return 1


def main():
    asked = words().parse_args()
    out = Path(asked.out) if asked.out else Path(asked.run[0]) / "report.html"
    try:
        size = make_report(asked.run, asked.stats, asked.trace, out, shlex.join(["python", *sys.argv]))
    except Refused as error:
        return refused(error)
    print(f"{out}: {size / 1e6:.2f} MB")
    if size > MOST_BYTES:
        what = "name fewer runs, or count with --stats-layers middle"
        print(f"  ---> more than {MOST_BYTES / 1e6:.0f} MB: {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
