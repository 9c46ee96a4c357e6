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

    def __init__(self, downloads, profile, width=1000, height=900):
        self.downloads, self.profile, self.size = downloads, profile, (width, height)

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
            "prefs": {"download.default_directory": str(self.downloads)},
        }
        deadline = time.monotonic() + 60
        while True:
            try:
                capabilities = {
                    "alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
                }
                self.session = self.call("POST", "/session", {"capabilities": capabilities})["sessionId"]
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
        self.call("POST", f"/session/{self.session}/url", {"url": path.resolve().as_uri()})

    def run(self, script):
        """The value of a JavaScript expression."""
        body = {"script": f"return {script}", "args": []}
        return self.call("POST", f"/session/{self.session}/execute/sync", body)

    def wait_for(self, script, seconds=20):
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"never became true: {script}"
            time.sleep(0.05)

    def click(self, selector):
        body = {"using": "css selector", "value": selector}
        [element] = self.call("POST", f"/session/{self.session}/element", body).values()
        self.call("POST", f"/session/{self.session}/element/{element}/click", {})

    def press(self, *keys):
        """Keys as a keyboard sends them; special ones by their WebDriver code."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        body = {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}
        self.call("POST", f"/session/{self.session}/actions", body)

    def log(self):
        """Errors and warnings of the page."""
        return self.call("POST", f"/session/{self.session}/se/log", {"type": "browser"})

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("GET", f"/session/{self.session}/screenshot")))
