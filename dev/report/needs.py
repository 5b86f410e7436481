"""What dev/report needs beside Python itself, said in a sentence before anything else imports it."""

import sys

try:
    import numpy  # noqa: F401
    import plotly  # noqa: F401
    import safetensors  # noqa: F401
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed\n  ---> pip install -r dev/report/requirements.txt")
