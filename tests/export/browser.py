"""Chromium driven over its DevTools protocol: the page is opened as a file, without a network."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    """One page of a browser."""

    def __init__(self, write, read, timeout):
        self._write, self._read, self._timeout = write, read, timeout
        self._buffer, self._number, self._session = b"", 0, None
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")
        # Nothing may be fetched.
        self.call(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=0,
            uploadThroughput=0,
        )

    def call(self, method, **parameters):
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer.get("result", {})
            self.events.append(answer)

    def open(self, path, ready="true"):
        """Opens a file and waits until the expression is true."""
        self.call("Page.navigate", url=path.as_uri())
        self.wait(ready)

    def wait(self, expression):
        """Waits until an expression is true."""
        end = time.monotonic() + self._timeout
        while not self.value(f"Boolean({expression})"):
            if time.monotonic() > end:
                text = self.value("document.body ? document.body.innerText : ''")
                raise TimeoutError(f"{expression} was never true; the page says {text!r}")
            time.sleep(0.05)

    def value(self, expression):
        """Returns the value of an expression, waiting for a promise."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"]))
        return found["result"].get("value")

    def stroke(self, points):
        """Presses the mouse at the first point, moves it over the others, and lets it go."""
        kinds = ["mousePressed"] + ["mouseMoved"] * (len(points) - 1)
        for kind, (x, y) in zip(kinds, points, strict=True):
            self.mouse(kind, x, y)
        self.mouse("mouseReleased", *points[-1])

    def mouse(self, kind, x, y):
        """Sends one event of the mouse."""
        self.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button="left",
            buttons=0 if kind == "mouseReleased" else 1,
            clickCount=1,
        )

    def picture(self, path):
        """Writes a PNG of what is seen."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _next(self):
        end = time.monotonic() + self._timeout
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            self._buffer += os.read(self._read, 1 << 16)
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def opened_browser(folder, timeout=60):
    """Yields a `Page` of a browser of its own, whose profile is in the folder."""
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    # The protocol is spoken over the file descriptors 3 and 4.
    shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", PROGRAM, *flags, f"--user-data-dir={folder}"],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (to_browser, from_browser):
        os.close(end)
    try:
        yield Page(write, read, timeout)
    finally:
        process.kill()
        process.wait()
        for end in (write, read):
            os.close(end)
