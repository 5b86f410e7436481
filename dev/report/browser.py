"""
A headless Chromium, driven by the DevTools protocol over two pipes (--remote-debugging-pipe): JSON objects
that end with a zero byte, descriptor 3 to the browser and 4 from it. Nothing to install but the browser:
CHROMIUM names it, else the usual names are looked for.

    with Browser() as browser:
        page = browser.open(Path("report.html"), width=1280, height=900)
        page.eval("document.title")

The network is off for a page that is opened so, and what it asks of it, or writes to its console as an error,
is kept in page.trouble.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
SECONDS = 60  # for one answer
BOX = """(() => {
    const box = document.querySelector(%s).getBoundingClientRect();
    return [box.left + scrollX, box.top + scrollY, box.width, box.height];
})()"""


class BrowserError(Exception):
    pass


def find_browser():
    """-> a path, or None"""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    def __enter__(self):
        program = find_browser()
        if program is None:
            raise BrowserError(
                "no Chromium here\n  ---> apt-get install chromium, or CHROMIUM=/path/to/chrome"
            )
        self.profile = tempfile.mkdtemp(prefix="remoe-browser-")
        there, self.out = os.pipe()
        self.back, here = os.pipe()
        words = [
            program,
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={self.profile}",
            "--no-first-run",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-default-browser-check",
            "about:blank",
        ]
        if os.geteuid() == 0:
            words.insert(1, "--no-sandbox")  # Chromium has none for root

        def place_pipes():  # in two steps: a pipe's end may itself be 3 or 4
            a, b = os.dup(there), os.dup(here)
            os.dup2(a, 103), os.dup2(b, 104)
            os.dup2(103, 3), os.dup2(104, 4)

        self.process = subprocess.Popen(
            words,
            preexec_fn=place_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(there), os.close(here)
        self.count, self.buffer, self.pages = 0, b"", {}
        return self

    def __exit__(self, *_):
        try:
            self.send("Browser.close")
        except (BrowserError, OSError):
            pass
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.out), os.close(self.back)
        shutil.rmtree(self.profile, ignore_errors=True)

    def send(self, method, session=None, **parameters):
        """-> the command's result"""
        self.count += 1
        message = {
            "id": self.count,
            "method": method,
            "params": parameters,
            **({"sessionId": session} if session else {}),
        }
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        wanted, end = self.count, time.monotonic() + SECONDS
        while True:
            answer = self.receive(end)
            if answer.get("id") == wanted:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]
            self.event(answer)

    def receive(self, end):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.back], [], [], max(0, end - time.monotonic()))
            data = os.read(self.back, 1 << 16) if ready else b""
            if not data:
                raise BrowserError(
                    "the browser has ended" if ready else f"the browser did not answer in {SECONDS} s"
                )
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def event(self, message):
        page = self.pages.get(message.get("sessionId"))
        if page is not None:
            page.event(message["method"], message["params"])

    def open(self, path, width, height, scale=1, dark=False, touch=False):
        return Page(self, path, width, height, scale, dark, touch)


class Page:
    def __init__(self, browser, path, width, height, scale, dark, touch):
        self.browser, self.trouble = browser, []
        self.target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        browser.pages[self.session] = self
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=touch,
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        media = {
            "prefers-color-scheme": "dark" if dark else "light",
            "hover": "none" if touch else "hover",
            "pointer": "coarse" if touch else "fine",
        }
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": name, "value": value} for name, value in media.items()],
        )
        self.send("Page.navigate", url=Path(path).resolve().as_uri())

    def send(self, method, **parameters):
        return self.browser.send(method, self.session, **parameters)

    def close(self):
        self.browser.send("Target.closeTarget", targetId=self.target)

    def event(self, method, what):
        if method == "Runtime.exceptionThrown":
            details = what["exceptionDetails"]
            self.trouble.append(
                "exception: " + details.get("exception", {}).get("description", details.get("text", ""))
            )
        elif method == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert", "warning"):
            self.trouble.append(
                f"console.{what['type']}: "
                + " ".join(str(a.get("value", a.get("description"))) for a in what["args"])
            )
        elif method == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.trouble.append(f"log: {what['entry']['text']}")
        elif method == "Network.requestWillBeSent" and not what["request"]["url"].startswith(
            ("file:", "data:", "blob:", "about:")
        ):
            self.trouble.append(f"network: {what['request']['url']}")

    def eval(self, expression):
        """-> the value of a JavaScript expression; a promise is waited for"""
        result = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise BrowserError(
                f"{expression[:200]}: {result['exceptionDetails'].get('exception', {}).get('description')}"
            )
        return result["result"].get("value")

    def wait(self, expression, seconds=SECONDS):
        end = time.monotonic() + seconds
        while not self.eval(expression):
            if time.monotonic() > end:
                raise BrowserError(f"never true: {expression}")
            time.sleep(0.05)

    def mouse(self, x, y, kind="mouseMoved", **more):
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(x, y, kind, button="left", clickCount=1)

    def screenshot(self, path, selector=None, whole=False):
        """a PNG of an element, of the whole page, or of what is in sight"""
        clip = {}
        if selector or whole:
            box = self.eval(BOX % json.dumps(selector or "html"))
            clip = {
                "clip": {**dict(zip(("x", "y", "width", "height"), box)), "scale": 1},
                "captureBeyondViewport": True,
            }
        image = self.send("Page.captureScreenshot", format="png", **clip)["data"]
        Path(path).write_bytes(base64.b64decode(image))
