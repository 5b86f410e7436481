#!/usr/bin/env bash
# dev/report: what it reads, counted again; damaged and missing input; the page in a headless Chromium.
# usage: dev/test/test_report.sh [test_browser ...]       (30 s)
#        PYTHON= names a Python that has dev/report/requirements.txt, otherwise build/report/bin/python or python3 is tried
cd "$(dirname "$0")/../.." || exit 1
export PYTHONDONTWRITEBYTECODE=1
python=${PYTHON:-$(ls build/report/bin/python 2>/dev/null || echo python3)}
if ! "$python" -c 'import numpy, plotly, safetensors' 2>/dev/null; then
    echo 'report          skipped: no plotly here (pip install -r dev/report/requirements.txt)'
    exit 0
fi
exec "$python" dev/test/report/run.py "$@"
