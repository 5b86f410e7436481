"""
dev/report, three ways: its numbers against counts made in the plainest way (figures.py); damaged, foreign and
missing input, which must give a page or a sentence and exit 1, never a traceback (damage.py); the page in a
browser (pages.py).

    dev/test/test_report.sh [test_browser ...]
"""

import shutil
import sys
import traceback

from checks import HERE, check, counts
import damage
import figures
import pages


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    for test in [*figures.TESTS, *damage.TESTS, *pages.TESTS]:
        if sys.argv[1:] and test.__name__ not in sys.argv[1:]:
            continue
        try:
            test()
        except Exception:
            check(test.__name__, False, traceback.format_exc())
    failed = counts["failed"]
    print(f"report          {'FAILED' if failed else 'ok'} {counts['checks']} checks, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
