"""Headless Chromium for tests of pages, by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

EXECUTABLE = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
)

_UNNAMED = """[...document.querySelectorAll(
  "svg, canvas, button, input, [role=option], [role=grid], [role=listbox]")]
  .filter((e) => !(e.getAttribute("aria-label") || e.labels?.[0]?.textContent.trim()
    || e.textContent.trim() || e.querySelector("title")))
  .map((e) => e.outerHTML)"""
_CONTRAST = """(() => {
  const parse = (color) => {
    const n = color.match(/[\\d.]+/g).map(Number), unit = color.startsWith("color(") ? 255 : 1;
    return [...n.slice(0, 3).map((x) => x * unit), n.length > 3 ? n[3] : 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const ground = (element) => {
    const below = element.parentElement ? ground(element.parentElement) : [255, 255, 255];
    const style = getComputedStyle(element), at = over(parse(style.backgroundColor), below);
    const tint = style.backgroundImage.match(/rgba?\\([^)]*\\)/);  // of a bar below text
    return tint ? over(parse(tint[0]), at) : at;
  };
  const light = (rgb) => rgb.map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const failed = [];
  let count = 0;
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility() || element.tagName === "SCRIPT") continue;
    const below = ground(element), color = over(parse(getComputedStyle(element).color), below);
    const [high, low] = [light(below), light(color)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    count++;
    if (ratio < 4.5) failed.push([element.outerHTML.slice(0, 90), ratio]);
  }
  return [count, failed];
})()"""


class Page:
    """One page.  `errors` collects what it writes to the console as an error, and exceptions."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._rest, self._number = b"", 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait for the `load` event."""
        self.resize(width, height)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[theme])
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def contrast(self) -> tuple[int, list[Any]]:
        """The number of elements with text, and those whose contrast with what is below is less
        than 4.5 (WCAG 2.2, 1.4.3)."""
        count, failed = self.run(_CONTRAST)
        return count, failed

    def unnamed(self) -> list[str]:
        """Pictures and controls without a label or title."""
        return self.run(_UNNAMED)

    def press(self, *keys: str) -> None:
        for key in keys:
            text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
            codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowUp": 38,
                     "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35}  # fmt: skip
            for kind in ("keyDown", "keyUp"):
                self.send(
                    "Input.dispatchKeyEvent", type=kind, key=key,
                    windowsVirtualKeyCode=codes[key], **(text if kind == "keyDown" else {}),
                )  # fmt: skip

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Click in an element, at a share of its width and height."""
        left, top, width, height = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x, r.y, r.width, r.height]; })()"
        )
        at = {"x": left + x * width, "y": top + y * height}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def send(self, method: str, **arguments: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 16)
            assert part, "Chromium has closed the pipe"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.errors.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.errors.append(str(parameters["entry"]))
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
        return message


@contextmanager
def chromium() -> Iterator[Page]:
    """A page of a new Chromium, which reads commands from descriptor 3 and answers on 4."""
    assert EXECUTABLE is not None
    read_commands, write_commands = os.pipe()
    read_answers, write_answers = os.pipe()
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        script = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
        process = subprocess.Popen(
            ["bash", "-c", script, EXECUTABLE, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            yield Page(write_commands, read_answers)
        finally:
            process.terminate()
            process.wait()
            os.close(write_commands)
            os.close(read_answers)
