"""A headless Chromium, driven through the pipe of its DevTools protocol: no driver and no package is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60.0

# The protocol is spoken through the file descriptors 3 (to the browser) and 4 (from it).
_LAUNCH = (
    "import os, sys; a, b = map(int, sys.argv[1:3]); os.dup2(a, 3); os.dup2(b, 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


def executable() -> str | None:
    """The browser's name; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """A tab.

    Attributes:
        complaints: what the browser reported: errors, warnings and exceptions.
        requested: the addresses of everything that was asked for.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.complaints: list[str] = []
        self.requested: list[str] = []

    def send(self, method: str, **parameters: Any) -> Any:
        return self._browser.send(method, self._session, **parameters)

    def open(self, path: Path) -> None:
        self.send("Page.navigate", url=path.resolve().as_uri())
        self._browser.wait_for("Page.loadEventFired", self._session)

    def evaluate(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element."""
        place = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def resize(self, width: int, height: int, scale: float = 1.0, mobile: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def pdf(self) -> bytes:
        return base64.b64decode(self.send("Page.printToPDF", printBackground=False, preferCSSPageSize=True)["data"])

    def screenshot(self, whole: bool = False) -> bytes:
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"])


class Browser:
    """The process; make it with :func:`opened`."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._buffer = b""
        self._number = 0
        self._events: list[dict[str, Any]] = []
        self._pages: dict[str, Page] = {}

    def page(self) -> Page:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        return page

    def send(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def wait_for(self, event: str, session: str) -> None:
        def here(found: dict[str, Any]) -> bool:
            return found.get("method") == event and found.get("sessionId") == session

        while not any(map(here, self._events)):
            self._next()
        self._events = [found for found in self._events if not here(found)]

    def _next(self) -> dict[str, Any]:
        """The next message; events are kept and told to their page."""
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._back, 1 << 16)
            assert data, f"the browser ended: {self._process.poll()}"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self._events.append(message)
            page = self._pages.get(message.get("sessionId", ""))
            if page is not None:
                _tell(page, message)
        return message


def _tell(page: Page, message: dict[str, Any]) -> None:
    method, about = message["method"], message["params"]
    if method == "Network.requestWillBeSent":
        page.requested.append(about["request"]["url"])
    if method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning"):
        page.complaints.append(json.dumps(about["args"]))
    if method == "Runtime.exceptionThrown":
        page.complaints.append(json.dumps(about["exceptionDetails"]))
    if method == "Log.entryAdded":
        page.complaints.append(about["entry"]["text"])


@contextmanager
def opened(profile: Path) -> Iterator[Browser]:
    """A browser that keeps what it must in the folder ``profile``."""
    name = executable()
    assert name is not None
    theirs, to = os.pipe()
    back, also = os.pipe()
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    words = [
        name, "--headless", *root, "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-gpu",
        "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", _LAUNCH, str(theirs), str(also), *words],
        pass_fds=(theirs, also), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs)
    os.close(also)
    try:
        browser = Browser(process, to, back)
        yield browser
        browser.send("Browser.close")
    finally:
        os.close(to)
        os.close(back)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
