"""
The README's pictures, of real runs: cards of their report, as a headless Chromium draws them.

    python dev/report/pictures.py runs/relu runs/topk --out dev/doc/pictures     (needs Chromium)

    stages.png       loss, lambda and S of the first run, the stages shaded
    domains.png      what each expert of one layer gets of each domain, all runs
    text.png         tokens shaded by their number of experts, and by which experts
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from browser import Browser, BrowserError
from report import make_report, refused
from small_png import smaller
from sources import Refused

WIDTH, SCALE = 860, 1.6
MOST_BYTES = 300_000  # together
TEXT_HEIGHT = 12 + 13 * 25  # whole lines


def words():
    parser = argparse.ArgumentParser(description="the README's pictures, of real runs", allow_abbrev=False)
    parser.add_argument(
        "run", nargs="+", help="folders of runs, each with stats.safetensors and trace.safetensors"
    )
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument(
        "--layer",
        type=int,
        metavar="l",
        help="of domains and experts (default: the middle one; of the text the busiest)",
    )
    parser.add_argument(
        "--text", default="", metavar="NAME", help="source of the trace to show (default: its first)"
    )
    parser.add_argument("--dark", action="store_true")
    return parser


STYLE = f"""
    header, .bar, .modebar, .missing, .text {{ display: none !important }}
    body {{ background: none }}
    .card {{ margin: 0; border: 0; border-radius: 0 }}
    .grid {{ grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)) }}
    .readers {{ grid-template-columns: 1fr 1fr }}
    .scale {{ flex-wrap: nowrap; white-space: nowrap; font-size: 0.7rem; gap: 7px }}
    .tokens {{ max-height: {TEXT_HEIGHT}px; overflow: hidden; padding-bottom: 0 }}
"""


def set_up(page, layer):
    """the page as for a picture: nothing that scrolls or is to be clicked"""
    page.eval(
        f"document.head.append(Object.assign(document.createElement('style'), {{textContent: `{STYLE}`}}))"
    )
    page.eval(f"report.chooseLayers([{layer}])")


def take(page, name, card, out):
    """a card's picture, in a palette; nothing where the report has no such figure"""
    path = out / f"{name}.png"
    if page.eval(f"!!document.querySelector('#{card} .plot, #{card} .reader')"):
        page.screenshot(path, f"#{card}")
        path.write_bytes(smaller(path.read_bytes()))
        return [path]
    print(
        f"no {path.name}: the runs have nothing to show of it\n  ---> make report, which says what is missing"
    )
    return []


def take_all(page, asked, layers, out):
    page.eval("report.drawAll().then(() => 1)")
    made = take(page, "stages", "stages", out) + take(page, "domains", "domains", out)
    page.eval(f"report.chooseLayers({list(range(layers))})")
    page.eval(f"report.pictureOfText({json.dumps(asked.text)}, {json.dumps(asked.layer)})")
    return made + take(page, "text", "text", out)


def pictures(asked):
    out = Path(asked.out)
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "report.html"
        make_report(asked.run, [], [], html, shlex.join(["python", *sys.argv]))
        with Browser() as browser:
            page = browser.open(html, WIDTH, 1000, SCALE, asked.dark)
            page.wait("window.report && report.ready")
            layers = page.eval("report.data.layers")
            layer = (layers - 1) // 2 if asked.layer is None else asked.layer
            if not 0 <= layer < layers:
                raise Refused(f"--layer {layer}: the runs have {layers} layers\n  ---> 0 to {layers - 1}")
            out.mkdir(parents=True, exist_ok=True)
            set_up(page, layer)
            made = take_all(page, asked, layers, out)
    size = sum(path.stat().st_size for path in made)
    print(f"{out}: {', '.join(path.name for path in made)}, {size} bytes")
    if size > MOST_BYTES:
        raise Refused(f"the pictures have {size} bytes, more than {MOST_BYTES}\n  ---> name fewer runs")


def main():
    asked = words().parse_args()
    try:
        pictures(asked)
    except (Refused, BrowserError) as error:
        return refused(error)
    except OSError as error:
        return refused(
            f"cannot write to {asked.out}: {error.strerror}\n  ---> name another folder with --out"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
