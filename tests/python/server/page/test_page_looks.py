"""How the page fits screens and themes, in a browser, and what assistive technology finds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from browser import NEEDS_BROWSER, Chat, Keys, Page
from test_page_markdown import DOCUMENT

from nybble import Model

pytestmark = NEEDS_BROWSER

SCREENS = {"desktop": (1280, 800), "phone": (390, 844), "narrow": (320, 640)}

LONG = (
    DOCUMENT
    + "\n\n"
    + "Averyveryverylongwordwithoutspaces" * 20
    + "\n\n| "
    + " | ".join(f"column {i}" for i in range(12))
)
LONG += " |\n|" + "---|" * 12 + "\n|" + " value |" * 12 + "\n\n```sh\n" + "a long command line " * 20 + "\n```\n"


def background(page: Page) -> str:
    return str(page.run("return getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_fits_the_screen_in_both_themes(chat: Chat, reasoning_model: Model, screen: str) -> None:
    with_thoughts = f"First I think about it.\n\nThen more.</think>{LONG}"
    page = chat(with_thoughts, with_thoughts, model=reasoning_model)
    width, height = SCREENS[screen]
    with page.screen(width, height):
        for theme in ("light", "dark"):
            page.driver.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {
                    "features": [
                        {"name": "prefers-color-scheme", "value": theme},
                        {"name": "prefers-reduced-motion", "value": "reduce"},
                    ]
                },
            )
            page.driver.refresh()
            page.ready()
            page.look(f"{screen}-{theme}-empty")
            page.say("Show me everything that you have, and a long question that takes more than one line.")
            page.click("summary")
            for place, top in (("end", "1e9"), ("start", "0"), ("middle", "600")):
                page.run(f"document.getElementById('scroll').scrollTop = {top}")
                page.look(f"{screen}-{theme}-{place}")
            assert page.run("return document.documentElement.scrollWidth") <= width
            assert (
                page.run("const box = document.getElementById('scroll'); return box.scrollWidth - box.clientWidth") == 0
            )
            outside = page.run(
                "const wide = e => e.closest('.wide, pre, .unseen, .sprite, #sidebar, #settings');"
                "return [...document.querySelectorAll('#page *')].filter(e => e.checkVisibility() && !wide(e)"
                " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
            )
            assert outside == []
            page.click("#open")
            page.until(page.find("#effort").is_displayed)
            page.look(f"{screen}-{theme}-settings")
            assert page.run("const d = document.getElementById('settings'); return d.scrollWidth - d.clientWidth") == 0
            page.press(Keys.ESCAPE)
            if screen != "desktop":
                page.click("#menu")
                page.look(f"{screen}-{theme}-list")
                page.until(lambda: len(page.shown(".open-conversation")) > 0)
                page.click(".open-conversation")
                assert not page.find("#sidebar").is_displayed(), "the drawer closes"
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_theme_is_the_browsers_until_it_is_switched_and_then_kept(chat: Chat) -> None:
    page = chat()
    light = background(page)
    page.click("#theme")
    dark = background(page)
    assert dark != light
    page.driver.refresh()
    assert background(page) == dark
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    assert background(page) == dark


def test_the_list_is_a_column_that_can_be_closed_on_wide_screens(chat: Chat) -> None:
    page = chat()
    assert page.find("#sidebar").is_displayed()
    page.click("#menu")
    assert not page.find("#sidebar").is_displayed()
    page.driver.refresh()
    page.ready()
    assert not page.find("#sidebar").is_displayed()
    assert page.find("#menu").get_attribute("aria-expanded") == "false"
    page.click("#menu")
    assert page.find("#sidebar").is_displayed()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_placeholders_have_the_contrast_of_quiet_text(chat: Chat, theme: str) -> None:
    page = chat()
    page.run("document.documentElement.dataset.theme = arguments[0]", theme)
    quiet = page.run("return getComputedStyle(document.getElementById('storage')).color")
    for field in ("system", "top_p", "max_tokens", "prompt"):
        style = f"getComputedStyle(document.getElementById('{field}'), '::placeholder')"
        assert page.run(f"return [{style}.color, {style}.opacity]") == [quiet, "1"]


NAMES = """
const shown = [...document.querySelectorAll('button, input, textarea, select, a')];
return shown.filter(e => {
  const label = e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim();
  return !label;
}).map(e => e.outerHTML.slice(0, 100));
"""


def test_each_control_has_a_name_and_headings_are_in_order(chat: Chat) -> None:
    page = chat(DOCUMENT, "Second")
    page.say("Hello")
    page.button("Try again").click()
    page.until(lambda: page.shown(".place") == ["2/2"])
    page.button("Previous answer").click()
    assert page.driver.switch_to.active_element.get_attribute("aria-label") == "Next answer", "focus is not lost"
    assert page.run(NAMES) == []
    levels = page.run("return [...document.querySelectorAll('#page :is(h1,h2,h3,h4,h5,h6)')].map(e => +e.localName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    log: Any = page.find("#log")
    assert (log.get_attribute("role"), log.get_attribute("aria-live")) == ("log", "polite")
    page.click("#open")
    inside = "return document.getElementById('settings').contains(document.activeElement)"
    assert page.run(inside)
    page.press(Keys.ESCAPE)
    assert page.driver.switch_to.active_element.get_attribute("id") == "open", "focus returns to the button"


def test_the_page_sends_no_request_to_another_host(chat: Chat) -> None:
    page = chat(DOCUMENT)
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.refresh()
    page.ready()
    page.say("Hello")
    requested = page.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(requested) > 10
    assert all(name.startswith(f"{page.url}/") for name in requested)
