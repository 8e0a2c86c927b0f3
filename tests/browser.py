"""Chromium without a window, driven over two pipes by its DevTools protocol: no package is needed for that."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.kit import LIMIT_S

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WHERE = next(filter(None, map(shutil.which, PROGRAMS)), "")


class Browser:
    """One page at a time. `requests` has the addresses of everything that it asked for."""

    def __init__(self, profile: Path) -> None:
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        arguments = [*sandbox, "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-gpu"]
        arguments += [
            "--no-first-run",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
        ]
        # Chromium reads the descriptor 3 and writes the descriptor 4.
        script = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, WHERE, *arguments], pass_fds=(commands, answers), stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.logged: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._send("Browser.close", {})
        try:
            self._process.wait(LIMIT_S)
        finally:
            self._process.kill()
            os.close(self._in)
            os.close(self._out)

    def _send(self, method: str, parameters: dict[str, Any]) -> None:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session and not method.startswith("Browser."):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")

    def _next(self) -> Any:
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], LIMIT_S)[0], "Chromium does not answer"
            read = os.read(self._in, 1 << 20)
            assert read, "Chromium has ended"
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        event = json.loads(message)
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        if event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.logged.append(json.dumps(event["params"]))
        return event

    def call(self, method: str, **parameters: Any) -> Any:
        self._send(method, parameters)
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str, width: int, height: int = 800, scheme: str = "light") -> None:
        """`width` and `height` in CSS pixels; `scheme`: the colours that the user prefers, light or dark."""
        self.requests, self.logged = [], []
        preferred = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=preferred)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self._send("Page.navigate", {"url": url})
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """A PNG of what is visible."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
