"""A headless Chromium, driven over a pipe in the DevTools protocol: no other package, no port, no network.

For the tests of the report and for the README's picture of it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --disable-background-networking "
    "--disable-component-update --hide-scrollbars --force-device-scale-factor=1 --remote-debugging-pipe"
).split()

WIRED = """
import fcntl, os, sys
orders, answers = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(orders, 3)
os.dup2(answers, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads its orders from descriptor 3 and answers on 4; this puts ours there and becomes it."""

SECONDS = 60.0
"""How long an answer or a page may take."""


def installed() -> str | None:
    """The browser of this machine, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One window.

    Attributes:
        events: everything the pages said on their own, in order: (method, parameters).
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._count, self._session, self._rest = 0, "", b""

    def __enter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [str(installed()), *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        wired = [sys.executable, "-c", WIRED, str(theirs_in), str(theirs_out), *command]
        self._process = subprocess.Popen(wired, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(SECONDS)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One order and its result; what else arrives meanwhile is kept in `events`.

        Raises:
            RuntimeError: the browser refused, or has gone.
        """
        self._count += 1
        order = {"id": self._count, "method": method, "params": parameters}
        order |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(order).encode() + b"\0")
        while (message := self._read()).get("id") != self._count:
            self.events.append((message.get("method", ""), message.get("params", {})))
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        result: dict[str, Any] = message["result"]
        return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not (more := os.read(self._in, 1 << 16)):
                raise RuntimeError("the browser has gone")
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, media: str = "") -> None:
        """Opens a page and waits until its charts are drawn.

        Args:
            width, height: of the window, in CSS pixels; 500 and less is a phone, which has touch and no mouse.
            dark: what the reader's system prefers.
            media: "print" for paper.
        """
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width <= 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + SECONDS
        while not self.run("document.documentElement?.dataset.drawn || ''"):
            if time.monotonic() > end:
                raise RuntimeError(f"{path.name} was not drawn within {SECONDS:.0f} s")
            time.sleep(0.1)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page; a promise is waited for.

        Raises:
            RuntimeError: it threw.
        """
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(str(done["exceptionDetails"].get("exception", {}).get("description", "it threw")))
        return done["result"].get("value")

    def press(self, key: str) -> None:
        """One key, down and up, as a keyboard sends it."""
        code = {"Tab": 9, "Enter": 13}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
        self.call("Runtime.evaluate", expression="0")

    def move(self, x: float, y: float) -> None:
        """The mouse, to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        """The left button, once."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, *, whole: bool = False) -> bytes:
        """The window, or the whole page, as PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(taken["data"])
