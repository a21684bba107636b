"""A Chromium to open pages in, driven through its DevTools pipe: keys, reloads, sudden death."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium to open pages in")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]


class Browser:
    """One page in a browser of its own; a profile that is given again is that of before."""

    def __init__(self, path, profile, width=1280, height=900):
        self.requests = []  # the addresses of all that was fetched
        self.count = 0
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()
        ends = [os.dup(end) for end in (to_browser, from_browser)]  # neither of them is 3 or 4

        def connect():  # Chromium reads from 3 and writes to 4
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command,
            preexec_fn=connect,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self.buffer = b""
        self.session = None
        found = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in found if target["type"] == "page")
        target = {"targetId": page["targetId"], "flatten": True}
        self.session = self.call("Target.attachToTarget", **target)["sessionId"]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Network.enable")
        self.call("Page.enable")
        self.open(path)

    def call(self, method, **parameters):
        """The answer of the browser to one command; what is fetched meanwhile is noted."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                part = os.read(self.read_end, 1 << 20)
                assert part, "the browser is gone"
                self.buffer += part
            text, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(text)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path):
        self.call("Page.navigate", url=f"file://{path}")
        self.wait("document.readyState == 'complete' && location.href.startsWith('file:')")

    def evaluate(self, script):
        """The value of a JavaScript expression, of a promise what it gives."""
        settings = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=script, **settings)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition):
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + 30
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.02)

    def press(self, key, code=""):
        """One key, as a keyboard sends it: what it writes, and where it lies."""
        text = {"text": {"Enter": "\r"}.get(key, key)} if len(key) == 1 or key == "Enter" else {}
        event = {"key": key, "code": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def kill(self):
        """End the browser and all its processes at once, as a power cut would."""
        if self.process.returncode is not None:
            return
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.write_end)
        os.close(self.read_end)


def page_faults(path, profile):
    """Open a page on a phone and in print; what is wrong with it: overflow, requests, names."""
    browser = Browser(path, profile, width=390)
    try:
        faults = browser.evaluate(FAULTS)
        browser.call("Emulation.setEmulatedMedia", media="print")
        paper = {"width": 700, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", **paper)
        faults += browser.evaluate(FAULTS)
        faults += [
            url for url in browser.requests if not url.startswith((f"file://{path}", "data:"))
        ]
    finally:
        browser.kill()
    return faults


FAULTS = """(() => {
    const all = query => [...document.querySelectorAll(query)];
    const faults = [];
    if (document.documentElement.scrollWidth > innerWidth) faults.push("wider than the window");
    if (all("script, link, iframe, [onerror]").length) faults.push("something active");
    for (const image of all("img")) {
        if (!image.alt || !image.naturalWidth) faults.push("picture " + image.alt);
        if ((image.closest(".zoom") || image).clientWidth < 160) faults.push("a small picture");
    }
    for (const head of all("th")) if (!head.scope) faults.push("no scope: " + head.textContent);
    let last = 0;
    for (const heading of all("h1, h2, h3, h4")) {
        const level = +heading.tagName[1];
        if (level > last + 1) faults.push("skips a level: " + heading.textContent);
        last = level;
    }
    return faults;
})()"""
