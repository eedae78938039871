#!/usr/bin/env python3
"""Look at a run's report.html in a real browser, as people do: on a desk, on a phone, in the dark; keep pictures.

    python tools/screenshot_report.py demo/run docs/images

writes report_desktop.png, report_phone.png and report_dark.png. It needs a Chromium or Chrome on PATH, which it
starts without a window and speaks to through a pipe; nothing is asked of the network.

exit codes: 0 written; 1 no browser, no report, or a page that asks for the network or is wider than its window.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--hide-scrollbars"),
    *("--disable-gpu", "--disable-extensions", "--disable-sync", "--disable-component-update", "--disable-quic"),
    *("--disable-background-networking", "--disable-dev-shm-usage", "--password-store=basic"),
)
# The browser reads commands from descriptor 3 and answers on descriptor 4.
AS_DESCRIPTORS_3_AND_4 = """
import os, sys
read, write = (os.dup(int(number)) for number in sys.argv[1:3])
for descriptor, copy in ((3, read), (4, write)):
    os.dup2(copy, descriptor)
    os.set_inheritable(descriptor, True)
os.execvp(sys.argv[3], sys.argv[3:])
"""
PATIENCE_S = 60
MEASURE = """JSON.stringify({
  wide: document.documentElement.scrollWidth, window: document.documentElement.clientWidth,
  high: document.documentElement.scrollHeight, background: getComputedStyle(document.body).backgroundColor,
  outside: [...document.querySelectorAll("main *")].filter(e => { const b = e.getBoundingClientRect();
    return b.width > 0 && b.right > document.documentElement.clientWidth + 1; })
    .slice(0, 5).map(e => e.tagName + "." + e.className) })"""


class BrowserError(Exception):
    """What the browser did not do, and what to do about it."""


@dataclass(frozen=True)
class Screen:
    """How a page is looked at."""

    name: str
    width: int
    height: int
    scale: float = 1.0
    dark: bool = False
    phone: bool = False


SCREENS = (
    Screen("desktop", 1280, 1500),
    Screen("phone", 390, 1500, phone=True),
    Screen("dark", 1280, 1500, dark=True),
)


@dataclass
class Look:
    """What was seen of a page."""

    width: int
    """Of its content, CSS pixels."""
    window: int
    """Of the window."""
    height: int
    background: str
    outside: list[str]
    """Elements that stand out at the right."""
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for, beside the page itself and what is inside it."""
    complaints: list[str] = field(default_factory=list)
    """Of the console."""
    png: bytes = b""


def find_browser() -> str | None:
    """The path of a Chromium or Chrome; None where there is none on PATH."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Browser:
    """A browser without a window, for as long as the context lasts."""

    def __init__(self, program: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dinox-browser-", ignore_cleanup_errors=True)
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        # Root, in a container say, has no sandbox; the page is our own and runs no script.
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", AS_DESCRIPTORS_3_AND_4, str(read), str(write)),
                *(program, *FLAGS, *sandbox, f"--user-data-dir={self._folder.name}", "about:blank"),
            ],
            pass_fds=(read, write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read)
        os.close(write)
        self._number, self._rest = 0, b""
        self._heard: deque[dict[str, Any]] = deque()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)  # it ends when nobody speaks to it any more
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)
        self._folder.cleanup()

    def look(self, page: Path, screen: Screen, *, picture: bool = False, open_all: bool = False) -> Look:
        """Open a file and look at it. open_all: with what can be unfolded unfolded. Raises BrowserError."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._ask(f"{domain}.enable", session)
        metrics = {"width": screen.width, "height": screen.height, "deviceScaleFactor": screen.scale}
        self._ask("Emulation.setDeviceMetricsOverride", session, **metrics, mobile=screen.phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if screen.dark else "light"}
        self._ask("Emulation.setEmulatedMedia", session, features=[scheme])
        self._heard.clear()
        self._ask("Page.navigate", session, url=page.resolve().as_uri())
        self._wait_for("Page.loadEventFired")
        if open_all:
            self._evaluate(session, "document.querySelectorAll('details').forEach(e => e.open = true)")
        seen = json.loads(self._evaluate(session, MEASURE))
        look = Look(seen["wide"], seen["window"], seen["high"], seen["background"], seen["outside"])
        if picture:
            look.png = base64.b64decode(self._ask("Page.captureScreenshot", session, format="png")["data"])
        own = page.resolve().as_uri()
        for message in self._heard:
            method, said = message.get("method"), message.get("params", {})
            if method == "Network.requestWillBeSent":
                url = said["request"]["url"]
                look.requests += [] if url == own or url.startswith("data:") else [url[:200]]
            elif method in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                look.complaints.append(json.dumps(said)[:500])
        self._ask("Target.closeTarget", targetId=target)
        return look

    def _evaluate(self, session: str, expression: str) -> Any:
        return self._ask("Runtime.evaluate", session, expression=expression, returnByValue=True)["result"].get("value")

    def _ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        with memoryview(json.dumps(message).encode() + b"\0") as content:
            sent = 0
            while sent < len(content):
                try:
                    sent += os.write(self._to, content[sent:])
                except BrokenPipeError:
                    raise BrowserError("the browser ended before it was asked: does it start in a terminal?") from None
        end_s = time.monotonic() + PATIENCE_S
        while True:
            answer = self._next(end_s)
            if answer.get("id") == number:
                if "error" in answer:
                    raise BrowserError(f"the browser refused {method}: {answer['error'].get('message')}")
                return answer["result"]
            self._heard.append(answer)

    def _wait_for(self, method: str) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not any(message.get("method") == method for message in self._heard):
            self._heard.append(self._next(end_s))

    def _next(self, end_s: float) -> dict[str, Any]:
        """The next thing that the browser says."""
        while b"\0" not in self._rest:
            left = end_s - time.monotonic()
            if left <= 0 or not select.select([self._from], [], [], left)[0]:
                raise BrowserError(f"the browser said nothing for {PATIENCE_S} s")
            block = os.read(self._from, 1 << 16)
            if not block:
                raise BrowserError("the browser ended: does it start in a terminal?")
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


def take_pictures(page: Path, folder: Path, program: str) -> list[Path]:
    """Write a picture for each of SCREENS. Raises BrowserError for a page that is not as it must be, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with Browser(program) as browser:
        for screen in SCREENS:
            look = browser.look(page, screen, picture=True)
            wrong = [*look.requests, *look.complaints, *(look.outside if look.width > look.window else [])]
            if wrong:
                raise BrowserError(f"{page} on a {screen.name}: {'; '.join(wrong[:5])}")
            path = folder / f"report_{screen.name}.png"
            path.write_bytes(look.png)
            written.append(path)
    return written


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, e.g. demo/run")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    given = parser.parse_args(arguments)
    page, program = given.run / "report.html", find_browser()
    try:
        if program is None:
            raise BrowserError(f"no browser is on PATH (looked for {', '.join(BROWSERS)})")
        if not page.is_file():
            raise BrowserError(f"{page} is not there: `make demo` makes a run in demo/run")
        for path in take_pictures(page, given.folder, program):
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
    except (BrowserError, OSError) as error:
        print(f"screenshot_report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
