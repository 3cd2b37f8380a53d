"""The chat page in a browser: Debian's chromium with chromium-driver, and selenium of the group `page`.

The tests are skipped if one of them is missing. `NYBBLE_SCREENSHOTS=FOLDER` saves screenshots.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, scripted, serving

from nybble import Model, SamplingOptions
from nybble.engine import Engine, Request

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install --group page")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs a browser: apt install chromium chromium-driver"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium's own sockets
]

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


@pytest.fixture(scope="module")
def server(default_model: Model) -> Iterator[Running]:
    with Engine(default_model) as engine, serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in ("--headless=new", "--no-sandbox", "--window-size=1200,850", f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "WARNING"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        yield driver
        driver.quit()


class Page:
    """The page, operated as a person does."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return found

    def until(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, 60, poll_frequency=0.02).until(lambda _: condition())

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def answered(self) -> bool:
        return bool(self.all(".turn.assistant:last-child[aria-busy=false] .foot"))

    def set(self, **settings: object) -> None:
        """Changes settings and sends the `input` events of a person."""
        for name, value in settings.items():
            self.driver.execute_script(
                "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
                "e.dispatchEvent(new Event('input', {bubbles: true}))", name, str(value),
            )  # fmt: skip

    def look(self, name: str) -> None:
        if folder := os.environ.get("NYBBLE_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def page(chromium: Any, server: Running) -> Iterator[Page]:
    made = Page(chromium, server.url)
    made.until(lambda: made.find("#model").text == "tiny")
    yield made
    chromium.execute_script("localStorage.clear(); sessionStorage.clear()")
    assert made.complaints() == []


def test_a_chat_works_by_keyboard_alone(page: Page) -> None:
    page.look("light-welcome")
    page.set(temperature=0, max_tokens=40)
    page.press("What is the", Keys.SHIFT, Keys.ENTER, Keys.NULL, "capital of France?", Keys.ENTER)
    page.until(page.answered)
    assert page.find(".turn.user .text").text == "What is the\ncapital of France?"
    assert "Paris" in page.find(".turn.assistant .text").text
    assert "tokens/s" in page.find(".turn.assistant .speed").text
    assert "complete" in page.find("#status").get_attribute("textContent")
    page.press("And of Italy?", Keys.ENTER)
    page.until(lambda: len(page.all(".turn.assistant")) == 2 and page.answered())
    page.look("light-chat")
    assert page.driver.switch_to.active_element.get_attribute("id") == "prompt"


class Endless(Engine):
    """An engine whose answers do not end by themselves."""

    def submit(self, prompt: Any, options: SamplingOptions | None = None, **overrides: Any) -> Request:
        ends = dict.fromkeys(self.model.tokenizer.eos_ids, float("-inf"))
        return super().submit(prompt, options, **{**overrides, "logit_bias": ends})


def test_escape_and_the_button_stop_an_answer_and_free_its_slot(chromium: Any, default_model: Model) -> None:
    with Endless(default_model) as engine, serving(engine) as running:
        page = Page(chromium, running.url)
        for stop in (lambda: page.press(Keys.ESCAPE), lambda: page.find("#stop").click()):
            page.press("Count.", Keys.ENTER)
            page.until(lambda: page.all(".turn.assistant:last-child[aria-busy=true] .text *"))
            page.look("light-writing")
            stop()
            page.until(page.answered)
            assert "stopped" in page.find(".turn.assistant:last-child .speed").text
            running.wait(lambda: engine.stats().running == 0)
        assert page.find("#send").is_displayed()


def test_answers_are_rendered_as_text_never_as_markup(page: Page) -> None:
    evil = "<img src=x onerror=alert(1)> `code` **bold**\n```html\n<script>alert(2)</script>\n```\n"
    evil += "- one\n- two\n<b>no</b>"
    script = (
        "const log = document.getElementById('log'); log.hidden = false; log.replaceChildren(...render(arguments[0]))"
    )
    page.driver.execute_script(script, evil)
    assert page.all("#log img, #log script, #log b") == []
    assert [found.text for found in page.all("#log strong, #log p code, #log li")] == ["code", "bold", "one", "two"]
    assert page.find("#log pre").text == "<script>alert(2)</script>"
    assert "<img src=x onerror=alert(1)>" in page.find("#log").text


def test_reasoning_is_folded_above_the_answer(chromium: Any, reasoning_model: Model) -> None:
    engine, script = scripted(reasoning_model, "I <b>think</b>.</think>Yes.", "Again.</think>No.")
    with serving(engine) as running:
        page = Page(chromium, running.url)
        page.press("Is it?", Keys.ENTER)
        page.until(page.answered)
        page.look("light-reasoning")
        assert page.find(".turn.assistant .text > p").text == "Yes."
        thought = page.find(".turn.assistant details p")
        assert not thought.is_displayed()
        page.find(".turn.assistant summary").click()
        page.until(thought.is_displayed)
        assert thought.text == "I <b>think</b>."
        page.find("#prompt").send_keys("Really?", Keys.ENTER)
        page.until(lambda: len(page.all(".turn.assistant")) == 2 and page.answered())
    assert "<think>\nI <b>think</b>.\n</think>\n\nYes.<|im_end|>" in script.prompts[1]


def test_settings_are_kept_and_sent(page: Page) -> None:
    page.find("#open").click()
    page.set(system="You only say yes.", temperature=0.3, seed=7, max_tokens=3)
    page.look("light-settings")
    page.press(Keys.ESCAPE)
    page.driver.refresh()
    page.until(lambda: page.find("#model").text == "tiny")
    assert page.find("#temperature").get_attribute("value") == "0.3"
    page.press("Do you?", Keys.ENTER)
    page.until(page.answered)
    assert page.find(".speed").text.startswith("3 tokens")
    assert "reached the length limit" in page.find(".speed").text


def test_the_page_fits_light_and_dark_themes_and_phones(page: Page) -> None:
    def background() -> str:
        return str(page.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))

    page.set(temperature=0, max_tokens=150)
    page.press("Write a Python function that adds two numbers, in a code block.", Keys.ENTER)
    page.until(page.answered)
    light = background()
    page.find("#theme").click()
    assert background() != light
    page.look("dark-chat")
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        for theme in ("phone-dark", "phone-light"):
            page.look(theme)
            page.find("#theme").click()
        wide = page.driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= PHONE["width"]
        page.find("#open").click()
        page.look("phone-settings")
        page.press(Keys.ESCAPE)
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_asks_for_the_key(chromium: Any, default_model: Model) -> None:
    with Engine(default_model) as engine, serving(engine, api_key="s3cret") as running:
        page = Page(chromium, running.url)
        page.until(lambda: page.all("#ask[open]"))
        page.press("wrong", Keys.ENTER)
        page.until(lambda: "key is wrong" in page.find("#ask-text").text)
        page.look("light-key")
        page.press("s3cret", Keys.ENTER)
        page.until(lambda: page.find("#model").text == "tiny")
        page.set(max_tokens=2)
        page.find("#prompt").send_keys("Hello", Keys.ENTER)
        page.until(page.answered)
        assert page.all(".failed") == []
    page.find("#prompt").send_keys("Still there?", Keys.ENTER)
    page.until(lambda: page.all(".turn:last-child .failed"))
    page.look("light-failed")
