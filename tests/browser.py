"""Chromium without a screen, spoken to through its pipe; installed from Debian where it is missing."""

import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
INSTALL = (
    "apt-get -qq update && apt-get -qq -o DPkg::Lock::Timeout=120 install -y --no-install-recommends chromium"
)


def chromium():
    """Where it is; skips in one line on a host that cannot have it."""
    if not shutil.which("chromium"):
        if os.geteuid() or not shutil.which("apt-get"):
            pytest.skip("no chromium, and this is not root of a Debian that could install it")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(
            ["bash", "-c", INSTALL], capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode:
            pytest.skip(f"chromium cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    return shutil.which("chromium")


class Browser:
    """One tab, by the DevTools protocol: messages in JSON, each ended by a zero byte."""

    def __init__(self, write, read):
        self._write, self._read = write, read
        self._buffer, self._number = b"", 0
        self.events = []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def open(self, url, width, height=900, dark=False):
        """Go to a page and wait until it is loaded with all its pictures."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)  # fmt: skip
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, script):
        """What a piece of JavaScript gives, in JSON."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self):
        """The whole page, as a PNG in base64."""
        return self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]

    @property
    def requests(self):
        """The addresses that the page asked for."""
        sent = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    @property
    def complaints(self):
        """What the console says, and what the page could not do."""
        kinds = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [event["params"] for event in self.events if event.get("method") in kinds]

    def _next(self):
        until = time.monotonic() + 60
        while b"\0" not in self._buffer:
            assert time.monotonic() < until
            more = os.read(self._read, 1 << 16)
            assert more, "chromium is gone"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser(profile):
    """A browser with an empty profile in this folder."""
    here, theirs = os.pipe(), os.pipe()
    command = [chromium(), *FLAGS, f"--user-data-dir={profile}"]
    # it reads from descriptor 3 and writes to 4
    shell = ["bash", "-c", f'exec "$@" 3<&{here[0]} 4>&{theirs[1]}', "bash", *command]
    process = subprocess.Popen(
        shell, pass_fds=(here[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(here[0])
    os.close(theirs[1])
    try:
        yield Browser(here[1], theirs[0])
    finally:
        process.terminate()
        process.wait(30)
        os.close(here[1])
        os.close(theirs[0])
