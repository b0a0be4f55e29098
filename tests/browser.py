"""A real browser for the tests: headless Chromium over the pipe of its DevTools protocol, standard library only."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60.0
CODES = {
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Enter": 13, "Tab": 9,
    "/": 191, "?": 191, "j": 74, "k": 75,
}  # fmt: skip
TEXTS = {"Enter": "\r", "/": "/", "?": "?", "j": "j", "k": "k"}


def find_browser() -> str | None:
    """The path of a Chromium or Chrome; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser process with an empty profile; messages are JSON that ends in a zero byte."""

    def __init__(self, binary: str, profile: Path) -> None:
        theirs_in, self.write_end = os.pipe()
        self.read_end, theirs_out = os.pipe()
        # out of the way of 3 and 4, where the browser wants them
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
        actions = [
            *((os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)),
            (os.POSIX_SPAWN_DUP2, high[0], 3),
            (os.POSIX_SPAWN_DUP2, high[1], 4),
        ]
        arguments = [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = os.posix_spawn(binary, arguments, os.environ, file_actions=actions, setpgroup=0)
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.number, self.rest = 0, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of one command; events that come meanwhile are kept."""
        number = self.send(method, session, parameters)
        while (answer := self.read()).get("id") != number:
            self.keep(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def keep(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event.get("method") == "Page.javascriptDialogOpening":  # the page waits until it is closed
            self.send("Page.handleJavaScriptDialog", event["sessionId"], {"accept": False})

    def send(self, method: str, session: str | None, parameters: dict[str, Any]) -> int:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        os.write(self.write_end, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        return self.number

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not select.select([self.read_end], [], [], PATIENCE)[0]:
                raise TimeoutError(f"expected an answer of the browser within {PATIENCE:.0f} s; got none.")
            if not (data := os.read(self.read_end, 1 << 20)):
                raise ConnectionError("expected an answer of the browser; it has ended.")
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self.call("Browser.close")
        for end in (self.write_end, self.read_end):
            os.close(end)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


class Tab:
    """One page of a browser: what a reader can do with it, and what it did."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def events(self, method: str) -> list[dict[str, Any]]:
        """The parameters of this tab's events of one kind, so far."""
        return [
            event["params"]
            for event in self.browser.events
            if event.get("method") == method and event.get("sessionId") == self.session
        ]

    def open(self, page: Path | str, fragment: str = "") -> None:
        """Load a file or an address and wait until this document is loaded.

        The answer to the command comes before the browser has changed documents; an expression that is evaluated
        meanwhile is lost with the old one. So each step waits for the load event of its own document.
        """
        for url in ("about:blank", (page if isinstance(page, str) else page.as_uri()) + fragment):
            started = self.call("Page.navigate", url=url)
            if "errorText" in started:
                raise RuntimeError(f"expected a page at {url}; the browser says {started['errorText']}.")
            loaded = {"loaderId": started["loaderId"], "name": "load"}
            while not any(loaded.items() <= event.items() for event in self.events("Page.lifecycleEvent")):
                self.browser.keep(self.browser.read())

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, its promise awaited; an exception there is one here."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", str(found)))
        return found["result"].get("value")

    def until(self, condition: str) -> Any:
        """Wait in the page until a condition holds, and return its value."""
        look = f"const value = {condition}; if (value) resolve(value); else setTimeout(look, 10);"
        return self.js(f"new Promise((resolve) => {{ const look = () => {{ {look} }}; look(); }})")

    def press(self, key: str) -> None:
        """A key, as the keyboard gives it."""
        about = {"key": key, "windowsVirtualKeyCode": CODES[key], "code": key if len(key) > 1 else "Slash"}
        text = {"text": TEXTS[key]} if key in TEXTS else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def window(
        self, width: int, height: int = 900, dark: bool = False, scale: float = 1, media: str = "screen"
    ) -> None:
        """The size of the page in CSS pixels, what the reader's system prefers, and whether it is printed."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **sizes)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def picture(self, path: Path, between: tuple[str, str] | None = None) -> None:
        """Write what the window shows; or the page from the top of one element to the end of another."""
        options: dict[str, Any] = {}
        if between is not None:
            self.js("document.documentElement.style.scrollbarWidth = 'none'")  # as in the picture
            ends = f"[{json.dumps(between[0])}, {json.dumps(between[1])}].map((s) => document.querySelector(s))"
            width, top, bottom = self.js(
                f"(([a, b]) => [innerWidth, a.getBoundingClientRect().top, b.getBoundingClientRect().bottom])({ends})"
            )
            room = min(top, 12)
            clip = {"x": 0, "y": top - room, "width": width, "height": bottom - top + room + 4, "scale": 1}
            options = {"clip": clip, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"]))

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
