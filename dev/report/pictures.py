"""
The README's pictures, of real runs: cards of their report, as a headless Chromium draws them.

    python dev/report/pictures.py runs/relu runs/topk --out dev/doc/pictures       (needs Chromium: browser.py)

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
MOST_BYTES = 300_000 # together
TEXT_HEIGHT = 13 * 25 + 21 # whole lines


def words():
    parser = argparse.ArgumentParser(description="the README's pictures, of real runs", allow_abbrev=False)
    parser.add_argument("run", nargs="+", help="folders of runs, each with stats.safetensors and trace.safetensors")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--layer", type=int, metavar="l", help="of domains and experts (default: the middle one; of the text the busiest)")
    parser.add_argument("--text", default="", metavar="NAME", help="source of the trace to show (default: its first)")
    parser.add_argument("--dark", action="store_true")
    return parser


def set_up(page, layer):
    """the page as for a picture: nothing that scrolls or is to be clicked"""
    page.wait("window.report && report.ready")
    page.eval("""(() => {
        const style = document.createElement("style");
        style.textContent = ".bar, header, .modebar, .missing, .text { display: none !important } body { background: none } .card { margin: 0; border-radius: 0; border: 0 }"
            + ".readers { grid-template-columns: 1fr 1fr } .tokens { max-height: HEIGHTpx; overflow: hidden }";
        document.head.append(style);
    })()""".replace("HEIGHT", str(TEXT_HEIGHT)))
    page.eval(f"report.chooseLayers([{layer}])")


def take(page, out):
    page.eval("report.drawAll().then(() => 1)")
    for name in ("stages", "domains"):
        if page.eval(f"!!document.querySelector('#{name} .plot')"):
            page.screenshot(out / f"{name}.png", f"#{name}")


def take_text(page, out, layers, name, layer):
    """both shades of the first run, one beside the other"""
    if not page.eval("!!document.getElementById('coloured')"):
        return
    page.eval(f"report.chooseLayers({list(range(layers))})")
    page.eval(f"report.pictureOfText({json.dumps(name)}, {json.dumps(layer)})")
    page.screenshot(out / "text.png", "#text")


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
            take(page, out)
            take_text(page, out, layers, asked.text, asked.layer)
    made = sorted(out.glob("*.png"))
    for path in made:
        path.write_bytes(smaller(path.read_bytes()))
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
        return refused(f"cannot write to {asked.out}: {error.strerror}\n  ---> name another folder with --out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
