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
