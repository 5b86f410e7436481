"""
The page in a headless Chromium, offline: 1280 pixels wide and light, by mouse; 400 and dark, by touch. All
figures have marks, tell a value when pointed at, and follow the choices; nothing is wider than the page; the
console stays silent.
"""

import json
import re
import subprocess
import sys

import inputs
from browser import Browser, BrowserError, find_browser
from checks import HERE, ROOT, call, check

import small_png

FIGURES = [
    "stages",
    "loss",
    "sparsity",
    "validation",
    "layers",
    "load",
    "load-by-step",
    "flips",
    "stage-times",
    "speed",
    "optimizer",
    "heat",
    "layer-sparsity",
    "domains",
    "specialisation",
    "active-by-domain",
    "frequency",
    "token-experts",
    "text",
]
HELPERS = """
    window.one = (selector) => document.querySelector(selector);
    window.all = (selector, root = document) => [...root.querySelectorAll(selector)];
    window.inSight = (selector) => all(selector).filter((element) => element.offsetParent);
    const mark = ".js-line, .points path, .bars .point path, .heatmaplayer image";
    window.marks = (plot) => all(mark, plot).length;
    window.spotIn = (selector, x, y) => {
        one(selector).scrollIntoView({block: "center"});
        const box = one(selector).getBoundingClientRect();
        return [box.left + box.width * x, box.top + box.height * y];
    };
    const back = () => getComputedStyle(document.body).backgroundColor;
    window.colours = () => [back(), one("#stages .plot")._fullLayout.font.color];
"""


def place(page, selector, x=0.5, y=0.5):
    return page.eval(f"spotIn({json.dumps(selector)}, {x}, {y})")


def click(page, selector):
    page.click(*place(page, selector))


def test_browser():
    if find_browser() is None:
        print("report: the page in a browser: skipped: no Chromium here (apt-get install chromium)")
        return
    runs = inputs.write_both(HERE / "browser", steps=60)
    out = HERE / "browser.html"
    status, said = call(*runs, "--out", out)
    check("the page for the browser", status == 0, said)
    with Browser() as browser:
        for width, height, dark in ((1280, 900, False), (400, 800, True)):
            see(browser, out, width, height, dark)


def see(browser, out, width, height, dark):
    touch, where = width < 600, f"at {width}:"
    page = browser.open(out, width, height, dark=dark, touch=touch)
    page.wait("window.report && report.ready")
    page.eval(HELPERS)
    page.eval("report.drawAll().then(() => 1)")
    cards = page.eval("all('.card[id]').map((card) => card.id)")
    check(f"{where} all figures", cards == FIGURES, cards)
    plots = page.eval(
        "inSight('.plot').map((p) => [one('#' + p.id).closest('.card').id, marks(p), p.data.length])"
    )
    bare = [plot for plot in plots if plot[1] < plot[2]]
    check(f"{where} every curve, bar and map has marks", len(plots) > 30 and not bare, bare)
    see_width(page, where)
    see_hover(page, where, touch)
    see_layers(page, where)
    see_choices(page, where, dark)
    see_text(page, where)
    see_width(page, where)
    page.screenshot(HERE / f"page-{width}.png", whole=True)
    page.eval("localStorage.clear()")
    check(f"{where} no error, no network", page.trouble == [], page.trouble[:3])


def see_width(page, where):
    widths = page.eval("[innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]")
    check(f"{where} no horizontal scroll", max(widths) == widths[0], widths)


def tap(page, x, y):
    page.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    page.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])


def see_hover(page, where, touch):
    for card, mark in (
        ("stages", ".nsewdrag"),
        ("heat", ".heatmaplayer image"),
        ("domains", ".bars .point path"),
    ):
        x, y = place(page, f"#{card} .plot {mark}")
        if touch:
            tap(page, x, y)
        else:
            page.mouse(x - 3, y)
            page.mouse(x, y)
        try:
            page.wait(f"/[0-9]/.test((one('#{card} .hoverlayer') || {{}}).textContent || '')", 5)
            told = True
        except BrowserError:
            told = False
        check(f"{where} {card} tells a value", told)


def see_layers(page, where):
    panels, lines = "inSight('#domains .panel').length", "all('#layers .js-line').length"
    before = page.eval(panels), page.eval(lines)
    click(page, "#choose-layers button[data-n='1']")
    page.wait(f"{lines} < {before[1]}", 5)
    after = page.eval(panels), page.eval(lines)
    check(
        f"{where} a layer is left out",
        (before[0], after[0]) == (6, 4) and after[1] == before[1] - 2,
        (before, after),
    )
    click(page, "#choose-layers button[data-n='1']")
    page.wait(f"{lines} == {before[1]}", 5)
    for n in (0, 1, 2):
        click(page, f"#choose-layers button[data-n='{n}']")
    check(f"{where} the last layer stays", page.eval(panels) == 2, page.eval(panels))
    page.eval("report.chooseLayers([0, 1, 2])")


def see_choices(page, where, dark):
    click(page, "#choose-steps button[data-log='1']")
    check(f"{where} logarithmic steps", page.eval("one('#stages .plot')._fullLayout.xaxis.type") == "log")
    lines = "all('#stages .js-line').length"
    before = page.eval(lines)
    click(page, "#stages .legend button")
    page.wait(f"{lines} == {before} - 1", 5)
    click(page, "#stages .legend button")
    seen = page.eval("colours()")
    check(f"{where} the reader's colours", (int(seen[0].split("(")[1].split(",")[0]) < 60) == dark, seen)
    click(page, "#theme")
    other = page.eval("colours()")
    check(f"{where} the switch", other[0] != seen[0] and other[1] != seen[1], (seen, other))
    click(page, "#theme")
    check(f"{where} and back", page.eval("colours()") == seen)


def see_text(page, where):
    tokens = page.eval("all('#coloured .tokens span').length")
    check(f"{where} tokens of both runs", tokens == 116, tokens)
    shades = set()
    for shade in ("count", "expert", "loss"):
        click(page, f"#shade button[data-shade='{shade}']")
        shades.add(page.eval("all('#coloured .tokens span')[5].style.background"))
    check(f"{where} three shades", len(shades) == 3, shades)
    click(page, "#coloured .tokens span[data-t='5']")
    told = page.eval("one('#tip').textContent")
    gates = re.search(r"token 5, id 5.*relu: loss [0-9.]+.*layer.*topk: loss", told, re.DOTALL)
    check(f"{where} a token tells its gates", gates and not page.eval("one('#tip').hidden"), told)
    page.eval("scrollBy(0, 5)")
    press(page, "ArrowRight")
    told = page.eval("one('#tip').textContent")
    check(f"{where} the next token, scrolled or not", "token 6," in told, told)
    press(page, "Escape")
    check(f"{where} and it goes", page.eval("one('#tip').hidden"))


def press(page, key):
    page.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)


def test_odd_pages():
    """what damage.py made pages of is drawn, too"""
    runs = [HERE / name for name in ("one", "val", "nan", "kinds", "huge", "hostile", "bad-state", "long-1")]
    runs = [run for run in runs if run.exists()]
    if find_browser() is None or not runs:
        return
    with Browser() as browser:
        for words in [runs[:1], runs[1:2], runs]:
            name, out = words[0].name if len(words) == 1 else "all of them", HERE / "odd.html"
            check(f"a page of {name}", call(*words, "--out", out)[0] == 0)
            page = browser.open(out, 400, 800)
            page.wait("window.report && report.ready")
            page.eval("report.drawAll().then(() => 1)")
            width = page.eval("document.documentElement.scrollWidth")
            check(
                f"{name}: no error, no scroll", page.trouble == [] and width == 400, (page.trouble[:2], width)
            )
            page.close()


def test_pictures():
    """the README's, of the same runs, in a palette and small"""
    if find_browser() is None:
        return
    out = HERE / "pictures"
    words = [str(HERE / "browser" / name) for name in ("relu", "topk")]
    command = [sys.executable, "dev/report/pictures.py", *words, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    made = {path.name: path.read_bytes() for path in out.glob("*")} if out.exists() else {}
    check(
        "pictures",
        done.returncode == 0 and sorted(made) == ["domains.png", "stages.png", "text.png"],
        done.stderr,
    )
    sizes = [len(data) for data in made.values()]
    palettes = [dict(small_png.chunks(data)) for data in made.values()]
    check("pictures: not empty, small", sizes and min(sizes) > 5000 and sum(sizes) < 300_000, sizes)
    check("pictures: of a palette", all(len(parts[b"PLTE"]) > 3 * 16 for parts in palettes))


TESTS = [test_browser, test_odd_pages, test_pictures]
