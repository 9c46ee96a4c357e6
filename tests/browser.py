"""A headless Chromium, driven through chromedriver by the WebDriver protocol: JSON over HTTP."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request


def find_browser():
    """Paths of Chromium and of its driver, or None."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """For a `with` statement. Downloads go into the folder `downloads`; `profile` keeps what pages store."""

    def __init__(self, downloads, profile, width=1000, height=900, page_load="normal"):
        self.downloads, self.profile, self.size = downloads, profile, (width, height)
        self.page_load = page_load

    def __enter__(self):
        browser, driver = find_browser()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.driver = subprocess.Popen([driver, f"--port={self.port}"], stdout=subprocess.DEVNULL)
        options = {
            "binary": browser,
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--mute-audio",
                f"--user-data-dir={self.profile}",
            ]
            + [f"--window-size={self.size[0]},{self.size[1]}", "--disable-dev-shm-usage"],
        }
        deadline = time.monotonic() + 60
        while True:
            try:
                capabilities = {
                    "alwaysMatch": {
                        "goog:chromeOptions": options,
                        "goog:loggingPrefs": {"browser": "ALL"},
                        "pageLoadStrategy": self.page_load,
                    }
                }
                self.session = self.call("POST", "/session", {"capabilities": capabilities})["sessionId"]
                self.devtools("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
                return self
            except (ConnectionError, urllib.error.URLError) as error:
                if time.monotonic() > deadline or isinstance(error, urllib.error.HTTPError):
                    self.driver.kill()
                    raise
                time.sleep(0.1)

    def __exit__(self, *_):
        try:
            self.call("DELETE", f"/session/{self.session}")
        finally:
            self.driver.terminate()
            self.driver.wait()

    def call(self, method, path, body=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, path):
        """Open a file, or an address given as `str`."""
        url = path if isinstance(path, str) else path.resolve().as_uri()
        self.call("POST", f"/session/{self.session}/url", {"url": url})

    def run(self, script):
        """The value of a JavaScript expression."""
        body = {"script": f"return {script}", "args": []}
        return self.call("POST", f"/session/{self.session}/execute/sync", body)

    def wait_for(self, script, seconds=20):
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"never became true: {script}"
            time.sleep(0.05)

    def find(self, selector):
        """The path of an element under the session's."""
        body = {"using": "css selector", "value": selector}
        [element] = self.call("POST", f"/session/{self.session}/element", body).values()
        return f"/session/{self.session}/element/{element}"

    def click(self, selector):
        self.call("POST", f"{self.find(selector)}/click", {})

    def type(self, selector, text):
        """Type into a field, or give the path of a file to one for files."""
        self.call("POST", f"{self.find(selector)}/value", {"text": text})

    def drag(self, selector, start, end):
        """Press the mouse on an element, move it and let it go, at fractions of its width."""
        [x, y, width, height] = self.run(
            f"(() => {{const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}}); "
            "const box = e.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]})()"
        )
        moves = [
            {"type": "pointerMove", "x": round(x + part * width), "y": round(y + height / 2), "duration": 50}
            for part in (start, (start + end) / 2, end)
        ]
        actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        body = {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]}
        self.call("POST", f"/session/{self.session}/actions", body)

    def devtools(self, command, **parameters):
        """A command of the DevTools protocol."""
        body = {"cmd": command, "params": parameters}
        return self.call("POST", f"/session/{self.session}/goog/cdp/execute", body)

    def resize(self, width, height):
        """The size of the page, also one narrower than a window can be."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def press(self, *keys):
        """Keys as a keyboard sends them; special ones by their WebDriver code."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        body = {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}
        self.call("POST", f"/session/{self.session}/actions", body)

    def log(self):
        """Errors and warnings of the page."""
        return self.call("POST", f"/session/{self.session}/se/log", {"type": "browser"})

    def downloaded(self, pattern, seconds=60):
        """The one file that a page saved, once it is there as a whole."""
        deadline = time.monotonic() + seconds
        while True:
            if files := list(self.downloads.glob(pattern)):  # Chromium renames them when they are complete
                [path] = files
                return path
            assert time.monotonic() < deadline, f"never saved: {pattern}; there: {sorted(self.downloads.iterdir())}"
            time.sleep(0.05)

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("GET", f"/session/{self.session}/screenshot")))
