"""
What the tests of dev/report share: counts of what held, where they write, report.py run in this process.
"""

import contextlib
import io
import sys
import traceback
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
HERE = ROOT / "build/test/report"
sys.path[:0] = [str(ROOT / "dev/report")]

counts = {"checks": 0, "failed": 0}


def check(what, ok, figure=""):
    counts["checks"] += 1
    if not ok:
        counts["failed"] += 1
        print(f"FAILED {what} {figure}", flush=True)


def near(a, b, most=1e-12):
    """relative, element by element"""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and bool((np.abs(a - b) <= most * np.maximum(np.abs(b), 1e-300)).all())


def call(*words):
    """report.py -> exit status, what it printed; in this process, since Python and plotly start slowly"""
    import report

    said = io.StringIO()
    before, sys.argv = sys.argv, ["report.py", *map(str, words)]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = report.main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        status = -1
        said.write(traceback.format_exc())
    finally:
        sys.argv = before
    return status, said.getvalue()
