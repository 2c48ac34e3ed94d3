"""A page in headless Chromium, driven by real mouse and key events over the DevTools protocol; keeps what the page asks for and complains about."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import websocket  # websocket-client, which JupyterLab needs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars"]
# name -> key code and the text it types, as in the protocol's Input.dispatchKeyEvent
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Escape": (27, ""), " ": (32, " "), "ArrowUp": (38, ""), "ArrowDown": (40, "")}


# what the protocol says of an expression whose page went away while it was evaluated: a redirect, or a link that was followed
GONE = ("navigated or closed", "context was destroyed", "Cannot find context", "context with specified id")


class PageGone(Exception):
    "The page was replaced while a command ran on it."


class Browser:
    "One tab; `requests` and `messages` are those since the last `open`."

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-port=0", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file, deadline = folder / "profile" / "DevToolsActivePort", time.monotonic() + 60
        while not port_file.exists() or not port_file.read_text().count("\n"):
            assert time.monotonic() < deadline and self.process.poll() is None, "Chromium did not start"
            time.sleep(0.05)
        port = port_file.read_text().split()[0]
        with urlopen(Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT"), timeout=60) as answer:
            address = json.load(answer)["webSocketDebuggerUrl"]
        self.socket = websocket.create_connection(address, timeout=120, suppress_origin=True)
        self.numbers = itertools.count(1)
        self.loaded: set[str] = set()
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.version = self.call("Browser.getVersion")["product"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        self.call("Network.setCacheDisabled", cacheDisabled=True)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self.call("Browser.close")
        self.socket.close()
        self.process.wait(timeout=60)

    def receive(self) -> dict[str, Any]:
        message = json.loads(self.socket.recv())
        method, detail = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(detail["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(f"{detail['type']}: " + " ".join(str(a.get("value", a.get("description"))) for a in detail["args"]))
        elif method == "Runtime.exceptionThrown":
            thrown = detail["exceptionDetails"]
            self.messages.append("exception: " + thrown.get("exception", {}).get("description", thrown["text"]))
        elif method == "Log.entryAdded":
            self.messages.append(f"{detail['entry']['level']}: {detail['entry']['text']} {detail['entry'].get('url', '')}")
        elif method == "Page.lifecycleEvent" and detail["name"] == "load":
            self.loaded.add(detail["loaderId"])
        return message

    def call(self, method: str, **parameters) -> dict[str, Any]:
        "One command of the protocol, and its result."
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := self.receive()).get("id") != number:
            pass
        if any(words in message.get("error", {}).get("message", "") for words in GONE):
            raise PageGone(message["error"]["message"])
        assert "error" not in message, message
        return message["result"]

    def open(self, address: str) -> None:
        "Load a page; returns after its load event and a moment for what its scripts still ask for."
        self.loaded.clear()
        self.requests, self.messages = [], []
        went = self.call("Page.navigate", url=address)
        assert "errorText" not in went, went
        while went["loaderId"] not in self.loaded:
            self.receive()
        self.js("new Promise(done => setTimeout(done, 100))")

    def js(self, expression: str) -> Any:
        "The value of an expression on the page, awaited; on the next page, if this one goes away meanwhile."
        for _ in range(20):
            try:
                got = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
                break
            except PageGone:
                time.sleep(0.1)
        else:
            raise AssertionError(f"no page stays long enough to evaluate {expression}")
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> Any:
        "The value of an expression as soon as it is true."
        deadline = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)
        return value

    def press(self, *keys: str, shift: bool = False) -> None:
        for key in keys:
            code, text = KEYS[key]
            event = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        "One key press after another into whatever has the focus."
        for character in text:
            self.call("Input.dispatchKeyEvent", type="keyDown", key=character, text=character)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=character)

    def tab_to(self, condition: str, limit: int = 60) -> None:
        "Press Tab until the focused element `e` meets a condition."
        for _ in range(limit):
            self.press("Tab")
            if self.js(f"(e => Boolean({condition}))(document.activeElement)"):
                return
        raise AssertionError(f"Tab never reaches {condition}")

    def size(self, width: int, height: int = 900, scheme: str = "light") -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, full: bool = False) -> None:
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full, **({"clip": {
            "x": 0, "y": 0, "scale": 1, "width": self.js("innerWidth"), "height": self.js("document.documentElement.scrollHeight")}} if full else {}))
        path.write_bytes(base64.b64decode(picture["data"]))

    def elsewhere(self) -> list[str]:
        "What the page asked of other machines."
        return [url for url in self.requests if urlsplit(url).scheme not in ("data", "blob", "file", "about", "chrome-error") and urlsplit(url).hostname != "127.0.0.1"]
