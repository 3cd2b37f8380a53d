"""The chat page in a browser: Debian's chromium with chromium-driver, and selenium of the group `page`.

Modules that import this are skipped if one of them is missing. `NYBBLE_SCREENSHOTS=FOLDER` saves screenshots.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install --group page")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

__all__ = ["NEEDS_BROWSER", "Chat", "Keys", "Page", "launched"]

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NEEDS_BROWSER = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs a browser: apt install chromium chromium-driver"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium's own sockets
]


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """A browser without a window, with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,800", f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "WARNING"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        yield driver
        driver.quit()


STREAM = """
const real = window.realFetch ??= window.fetch;
window.fetch = (path, options) => {
  if (!String(path).startsWith("v1/chat")) return real(path, options);
  let out;
  const body = new ReadableStream({ start: controller => { out = controller; } });
  const write = data => out.enqueue(new TextEncoder().encode(`data: ${data}\\n\\n`));
  window.feed = content => write(JSON.stringify({ choices: [{ delta: { content } }] }));
  window.finish = () => { write('{"choices": [{"delta": {}, "finish_reason": "stop"}]}'); write("[DONE]"); };
  window.signal = options.signal;
  options.signal.addEventListener("abort", () => out.error(new DOMException("stopped", "AbortError")));
  return Promise.resolve(new Response(body));
};
"""


class Page:
    """The page, operated as a person does."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url
        self.script: Any = None
        """The scripted engine behind the page, if there is one."""
        driver.get(url)
        self.complaints()  # Those of another page.

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return found

    def shown(self, selector: str) -> list[str]:
        """The visible text of each element, read at one moment."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].map(e => e.localName === 'option' ? e.textContent"
            " : e.checkVisibility() ? e.innerText.trim().replace(/\\n+/g, '\\n') : '')"
        )
        return list(self.run(script, selector))

    def until(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, 60, poll_frequency=0.02).until(lambda _: condition())

    def ready(self) -> Page:
        """Waits for the model's name, which the page asks for when everything else is in place."""
        self.until(lambda: self.find("#model").text != "")
        return self

    def reload(self) -> None:
        self.driver.refresh()
        self.ready()

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def button(self, name: str, within: str = "") -> Any:
        """The visible button of this name or accessible name; the last one."""
        found = [each for each in self.all(f"{within} button") if each.is_displayed() and name in names(each)]
        assert found, f"found no button {name!r} in {[names(each) for each in self.all(f'{within} button')]}"
        return found[-1]

    def answered(self) -> bool:
        return bool(self.all(".turn.assistant:last-child[aria-busy=false] .foot"))

    def say(self, text: str) -> None:
        """Sends a message and waits for the answer."""
        count = len(self.all(".turn"))
        self.find("#prompt").send_keys(text, Keys.ENTER)
        self.until(lambda: len(self.all(".turn")) > count and self.answered())

    def set(self, **settings: object) -> None:
        """Changes settings and sends the `input` events of a person."""
        for name, value in settings.items():
            self.run(
                "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
                "e.dispatchEvent(new Event('input', {bubbles: true}))", name, str(value),
            )  # fmt: skip

    def run(self, script: str, *arguments: Any) -> Any:
        """The result of a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def module(self, name: str, script: str, *arguments: Any) -> Any:
        """The result of an expression about a module of the page, `m`, and arguments, `a`."""
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1], a = [...arguments].slice(0, -1);"
            f"import('./page/app/{name}.js').then(async m => done([true, await ({script})]))"
            ".catch(e => done([false, `${e.name}: ${e.message}`]));",
            *arguments,
        )
        assert found[0], found[1]
        return found[1]

    def chosen(self, handle: str) -> Page:
        """The page in the tab of this handle, which the driver then operates."""
        self.driver.switch_to.window(handle)
        return self

    @contextlib.contextmanager
    def tabs(self) -> Iterator[tuple[str, str]]:
        """The handles of this tab and of another one, which is chosen and shows the same page until the end."""
        first = str(self.driver.current_window_handle)
        self.driver.switch_to.new_window("tab")
        second = str(self.driver.current_window_handle)
        try:
            self.driver.get(self.url)
            self.ready()
            yield first, second
        finally:
            self.chosen(second).driver.close()
            self.chosen(first)

    @contextlib.contextmanager
    def before_load(self, script: str) -> Iterator[None]:
        """Loads the page again with a script that runs before those of the page, and does so until the end."""
        added = self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
        try:
            self.driver.refresh()
            yield
        finally:
            self.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)

    def hold_answers(self) -> None:
        """Replaces the server for answers, which `feed` writes and `finish` completes."""
        self.run(STREAM)

    def feed(self, text: str) -> None:
        """Writes more of the answer that is held."""
        self.until(lambda: self.run("return typeof feed === 'function'"))
        self.run("feed(arguments[0])", text)

    def finish(self) -> None:
        self.run("finish()")
        self.until(lambda: self.find("#send").is_displayed())

    def stored(self) -> list[dict[str, Any]]:
        """The conversations that the browser keeps."""
        return list(self.module("storage", "m.openStore().then(store => store.all())"))

    @contextlib.contextmanager
    def screen(self, width: int, height: int) -> Iterator[None]:
        """The size of another screen."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def look(self, name: str) -> None:
        if folder := os.environ.get("NYBBLE_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def copied(self) -> str:
        """The text in the clipboard."""
        return str(self.run("return navigator.clipboard.readText()"))

    def allow_clipboard(self) -> None:
        """Lets the page write to the clipboard, and the test read it."""
        permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        self.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)

    def complaints(self) -> list[str]:
        """What the browser has logged since the last call: errors, and breaches of the page's policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def forget(self) -> None:
        """Removes everything that the browser keeps for the page."""
        self.driver.get("about:blank")
        origin = {"origin": self.url, "storageTypes": "all"}
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", origin)


def names(button: Any) -> tuple[str, str]:
    """The text of a button and its accessible name."""
    return str(button.text), str(button.get_attribute("aria-label"))


Chat = Callable[..., Page]
"""Opens the page of a server that gives these answers, one after another."""
