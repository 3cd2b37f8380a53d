"""Chats on the page in a browser: keyboard, stop, errors, the key, models and settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny
from browser import NEEDS_BROWSER, Chat, Keys, Page
from serving import scripted, serving

from nybble import Model, SamplingOptions
from nybble.engine import Engine, Request

pytestmark = NEEDS_BROWSER


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
        page = Page(chromium, running.url).ready()
        for by_key in (True, False):
            page.press("Count.", Keys.ENTER)
            page.until(lambda: page.all(".turn.assistant:last-child[aria-busy=true] .answer *"))
            page.look("light-writing")
            page.press(Keys.ESCAPE) if by_key else page.click("#stop")
            page.until(page.answered)
            assert "stopped" in page.find(".turn.assistant:last-child .speed").text
            running.wait(lambda: engine.stats().running == 0)
        assert page.find("#send").is_displayed()
        page.forget()


def test_an_answer_continues_while_another_conversation_is_shown(chromium: Any, default_model: Model) -> None:
    with Endless(default_model) as engine, serving(engine) as running:
        page = Page(chromium, running.url).ready()
        page.press("Count.", Keys.ENTER)
        page.until(lambda: page.all(".turn.assistant[aria-busy=true] .answer *"))
        page.click("#new")
        assert page.all(".turn") == []
        page.until(lambda: "Count." in page.find("#live").text)
        page.until(lambda: page.shown(".open-conversation") == ["Count."])
        page.click(".open-conversation")
        page.until(lambda: page.all(".turn.assistant[aria-busy=true] .answer *"))
        before = len(page.find(".answer").text)
        page.until(lambda: len(page.find(".answer").text) > before)
        page.button("Delete Count.").click()
        page.click("#confirm-yes")
        running.wait(lambda: engine.stats().running == 0)
        page.until(lambda: page.find("#send").is_displayed())
        assert page.shown(".open-conversation") == []
        page.forget()


def test_reasoning_is_folded_above_the_answer(chat: Chat, reasoning_model: Model) -> None:
    page = chat("I <b>think</b>.</think>Yes.", "Again.</think>No.", model=reasoning_model)
    page.say("Is it?")
    page.look("light-reasoning")
    assert page.find(".turn.assistant .answer > p").text == "Yes."
    thought = page.find(".turn.assistant details p")
    assert not thought.is_displayed()
    page.click(".turn.assistant summary")
    page.until(thought.is_displayed)
    assert thought.text == "I <b>think</b>."
    page.say("Really?")
    assert "<think>\nI <b>think</b>.\n</think>\n\nYes.<|im_end|>" in page.script.prompts[1]
    assert thought.is_displayed(), "an answer does not fold what the reader has unfolded"


def test_reasoning_can_be_turned_off_where_the_model_has_it(
    chat: Chat, chat_model: Model, reasoning_model: Model
) -> None:
    page = chat("Thought.</think>Yes.", "No.", model=reasoning_model)
    page.click("#open")
    page.until(page.find("#reasoning").is_displayed)
    assert page.find("#effort").is_displayed()
    page.set(reasoning="off")
    page.press(Keys.ESCAPE)
    page.say("Is it?")
    assert page.script.prompts[0].endswith("<think>\n\n</think>\n\n")
    page.set(reasoning="on", effort="high")
    page.say("Is it?")
    assert "Effort: high" in page.script.prompts[1]
    other = chat("Yes.", model=chat_model)
    other.click("#open")
    other.until(other.find("#temperature").is_displayed)
    assert not other.find("#reasoning").is_displayed()


@pytest.mark.parametrize(
    ("template", "toggle", "effort"),
    [
        ("{{ messages[0].content }} enable_thinking", False, False),
        ("{% if enable_thinking is defined and not enable_thinking %}{% endif %}", True, False),
        ("{%- if not thinking is defined %}{% set thinking = false %}{% endif %}", True, False),
        ("{{ message.thinking }}{{ message['thinking'] }}{{ m.reasoning }}", False, False),
        ('{{ "Reasoning: " + reasoning_effort }}', False, True),
    ],
)
def test_the_switches_of_reasoning_are_those_that_the_template_reads(
    chat: Chat, template: str, toggle: bool, effort: bool
) -> None:
    assert chat().module("api", "m.switches(a[0])", template) == {"toggle": toggle, "effort": effort}


def test_settings_are_kept_and_sent(page: Page) -> None:
    page.click("#open")
    page.set(system="You only say yes.", temperature=0.3, seed=7, max_tokens=3)
    page.look("light-settings")
    page.press(Keys.ESCAPE)
    page.driver.refresh()
    page.ready()
    assert page.find("#temperature").get_attribute("value") == "0.3"
    page.press("Do you?", Keys.ENTER)
    page.until(page.answered)
    assert page.find(".speed").text.startswith("3 tokens")
    assert "reached the length limit" in page.find(".speed").text


def test_only_settings_that_were_made_are_sent_and_wrong_ones_are_named(chat: Chat) -> None:
    page = chat("One.", "Two.", "Three.")
    page.say("Hi")
    assert page.script.options[0] == SamplingOptions(max_tokens=None, seed=page.script.options[0].seed)
    page.click("#open")
    page.set(temperature=0.25, top_p=0.5, min_p=0.1, repetition_penalty=1.2, top_k=7, max_tokens=99, seed=3)
    assert page.run("return document.querySelector('input[type=range][data-setting=top_p]').value") == "0.5"
    page.press(Keys.ESCAPE)
    page.say("Hi")
    sent = page.script.options[1]
    assert (sent.temperature, sent.top_p, sent.min_p, sent.repetition_penalty) == (0.25, 0.5, 0.1, 1.2)
    assert (sent.top_k, sent.max_tokens) == (7, 99)
    page.click("#open")
    page.set(temperature=9, top_k="")
    assert page.find("#temperature-fault").text == "Not used: expected a number from 0 to 2."
    page.look("light-settings-fault")
    page.press(Keys.ESCAPE)
    page.say("Hi")
    assert (page.script.options[2].temperature, page.script.options[2].top_k) == (0.8, 40)
    page.click("#open")
    page.click("#defaults")
    assert {page.find(f"#{name}").get_attribute("value") for name in ("temperature", "seed", "top_p")} == {""}


@pytest.fixture
def adapted_model(tmp_path: Path) -> Iterator[Model]:
    """The tiny model with an adapter."""
    adapters.write_peft(tmp_path / "poet", 1)
    file = tiny.write_model(tmp_path / "tiny.gguf", llama__context_length=512)
    with Model.load(file, threads=1, adapters={"poet": tmp_path / "poet"}) as model:
        yield model


def test_each_model_has_its_own_settings_and_answers_by_name(chromium: Any, adapted_model: Model) -> None:
    with Engine(adapted_model) as engine, serving(engine) as running:
        page = Page(chromium, running.url).ready()
        assert page.shown("#model option") == ["tiny", "tiny:poet"]
        page.set(max_tokens=2)
        page.say("Hi")
        assert page.find(".turn:last-child .speed").text.startswith("tiny · 2 tokens")
        choice = page.find("#model select")
        choice.send_keys("tiny:poet")
        page.until(lambda: page.find("#settings-model").get_attribute("textContent") == "tiny:poet")
        page.look("light-models")
        assert page.find("#max_tokens").get_attribute("value") == ""
        page.set(max_tokens=3)
        page.say("Hi")
        assert page.find(".turn:last-child .speed").text.startswith("tiny:poet · 3 tokens")
        page.driver.refresh()
        page.ready()
        assert page.find("#model select").get_attribute("value") == "tiny:poet"
        assert page.find("#max_tokens").get_attribute("value") == "3"
        listing = page.run("return fetch('metrics').then(r => r.text())")
        assert "/v1/chat/completions" in listing
        page.forget()


def test_models_that_are_not_loaded_are_marked_and_unknown_ones_are_an_error(chat: Chat) -> None:
    page = chat("Yes.")
    cards = '{"data": [{"id": "gone", "context_length": null, "loaded": false}, {"id": "tiny", "context_length": 9}]}'
    stub = "const real = fetch; window.fetch = (path, o) => path === 'v1/models' ? Promise.resolve(new Response("
    stub += f"'{cards}')) : new Promise(done => window.release = done).then(() => real(path, o));"
    with page.before_load(stub):
        page.until(lambda: page.shown("#model option") == ["gone (not loaded)", "tiny"])
        page.find("#prompt").send_keys("Hi", Keys.ENTER)
        page.until(lambda: page.find("#live").text == "Loading gone…")
        page.run("window.release()")
        page.until(page.answered)
        assert page.shown(".failed")[0].startswith("Error: not found: the model 'gone' does not exist")
        page.find("#model select").send_keys("tiny")
        page.button("Try again").click()
        page.run("window.release()")
        page.until(lambda: page.answered() and page.shown(".answer") == ["Yes."])
        page.complaints()  # The browser reports the 404.


def test_settings_of_earlier_versions_apply_until_they_are_changed(chat: Chat) -> None:
    page = chat("One.", "Two.")
    page.run("""localStorage.setItem("nybble.settings", '{"temperature": "0.25", "system": "", "top_k": "7"}')""")
    page.driver.refresh()
    page.ready()
    page.say("Hi")
    assert (page.script.options[0].temperature, page.script.options[0].top_k) == (0.25, 7)
    page.set(temperature="")
    page.driver.refresh()
    page.ready()
    page.say("Hi")
    assert (page.script.options[1].temperature, page.script.options[1].top_k) == (0.8, 7)


def test_the_page_asks_for_the_key(chromium: Any, chat_model: Model) -> None:
    engine, _ = scripted(chat_model, "Hello.")
    with serving(engine, api_key="s3cret") as running:
        page = Page(chromium, running.url)
        page.until(lambda: page.all("#ask[open]"))
        page.press("wrong", Keys.ENTER)
        page.until(lambda: "key is wrong" in page.find("#ask-text").text)
        page.press("schlüssel€", Keys.ENTER)
        page.until(lambda: "printable ASCII" in page.find("#ask-text").text)
        page.look("light-key")
        page.press(Keys.ESCAPE)
        page.until(lambda: page.find("#model").text == "Error: this server needs an API key")
        page.find("#prompt").send_keys("Hello", Keys.ENTER)
        page.until(lambda: page.all("#ask[open]"))
        assert page.find("#key").get_attribute("value") == ""
        page.press("s3cret", Keys.ENTER)
        page.until(page.answered)
        page.until(lambda: "Error" not in page.find("#model").text)
        assert page.shown(".answer") == ["Hello."]
        assert page.all(".failed") == []
        assert all("401" in message for message in page.complaints())
        page.forget()


def test_errors_are_shown_in_words_and_a_retry_replaces_them(chromium: Any, chat_model: Model) -> None:
    engine, script = scripted(chat_model)
    with serving(engine, max_body_bytes=8000) as running:
        page = Page(chromium, running.url).ready()
        page.say("Hello")
        assert page.shown(".failed") == ["Error: the server failed: internal server error; see the log of the server"]
        page.look("light-failed")
        script.answers.append("Here I am.")
        page.button("Try again").click()
        page.until(lambda: page.answered() and page.shown(".answer") == ["Here I am."])
        assert (page.all(".failed"), page.all(".branches")) == ([], [])
        page.say("Are you?")
        script.answers.append("Here again.")
        page.say("And now?")
        script.answers.append("I was.")
        page.button("Try again", within=".turn:nth-child(4)").click()
        page.until(lambda: page.answered() and page.shown(".answer") == ["Here I am.", "I was."])
        assert page.shown(".place") == ["2/2"], "what follows a failed answer is not lost"
        page.run("document.getElementById('prompt').value = 'x'.repeat(9000)")
        page.say("!")
        expected = "Error: this is too long for the server: the request body is larger than 8000 bytes"
        assert page.shown(".failed") == [expected]
    page.say("Still there?")
    assert page.shown(".failed")[-1] == "Error: the server cannot be reached. Is it running?"
    assert page.find("#send").is_displayed(), "the page can send again"


def test_a_stream_that_breaks_is_an_error_and_keeps_what_was_written(chat: Chat) -> None:
    page = chat("unused")
    piece = 'data: {"choices": [{"delta": {"content": "Half"}}]}\n\n'
    failed = piece + 'data: {"error": {"message": "the model tripped"}}\n\n'
    for body, words in ((piece, "the connection ended before the answer was complete"), (failed, "the model tripped")):
        page.run(
            "const real = fetch, body = arguments[0]; window.fetch = (...a) => String(a[0]).startsWith('v1/chat')"
            " ? Promise.resolve(new Response(body)) : real(...a)",
            body,
        )
        page.say("Hello")
        assert page.shown(".answer")[-1] == "Half"
        assert page.shown(".failed")[-1] == f"Error: {words}"
        assert "incomplete" in page.shown(".speed")[-1]


def test_the_view_follows_an_answer_unless_the_reader_has_scrolled_up(chat: Chat) -> None:
    page = chat("\n\n".join(f"Paragraph {i}" for i in range(200)), "Short.")
    page.say("Write much.")
    at_end = "const box = document.getElementById('scroll'); return box.scrollHeight - box.scrollTop - box.clientHeight"
    assert page.run(at_end) < 2
    assert not page.find("#latest").is_displayed()
    page.run("document.getElementById('scroll').scrollTop = 100")
    page.until(page.find("#latest").is_displayed)
    page.module("turns", "document.getElementById('scroll').scrollTop")
    page.look("light-scrolled")
    page.click("#latest")
    page.until(lambda: page.run(at_end) < 2 and not page.find("#latest").is_displayed())


def test_models_are_asked_for_again_after_a_failure(chat: Chat) -> None:
    page = chat("Hello.")
    name = page.find("#model").text
    stub = (
        "const real = fetch; let count = 0; window.fetch = (path, o) => path === 'v1/models' && !count++"
        " ? Promise.reject(new TypeError('gone')) : real(path, o);"
    )
    with page.before_load(stub):
        page.until(lambda: page.find("#model").text == "Error: the server cannot be reached. Is it running?")
        page.say("Hi")
        page.until(lambda: page.find("#model").text == name)


PRESS = """document.getElementById('prompt').dispatchEvent(
  new KeyboardEvent('keydown', {bubbles: true, cancelable: true, ...arguments[0]}))"""


@pytest.mark.parametrize("composing", [{"isComposing": True}, {"keyCode": 229}])
def test_keys_of_an_input_method_neither_send_nor_stop(chat: Chat, composing: dict[str, Any]) -> None:
    page = chat()
    page.press("kanji")
    page.run(PRESS, {"key": "Enter", **composing})
    assert page.all(".turn") == []
    page.hold_answers()
    page.press(Keys.ENTER)
    page.feed("One")
    page.run(PRESS, {"key": "Escape", **composing})
    assert page.run("return signal.aborted") is False
    page.run(PRESS, {"key": "Escape"})
    page.until(page.answered)
    assert "stopped" in page.find(".speed").text


def test_nothing_else_can_be_asked_while_an_answer_is_written(chat: Chat) -> None:
    page = chat()
    page.hold_answers()
    page.press("Hi", Keys.ENTER)
    page.feed("One")
    page.click("#new")
    assert not any(button.is_enabled() for button in page.all("#ideas button"))
    page.press("And this?", Keys.ENTER)
    assert page.find("#notice-text").text == "An answer is being written. Wait until it is complete, or stop it."
    assert page.find("#prompt").get_attribute("value") == "And this?"
    page.finish()
    page.until(lambda: all(button.is_enabled() for button in page.all("#ideas button")))
    assert not page.find("#notice").is_displayed()


@pytest.mark.parametrize(
    ("node", "facts"),
    [
        ({"content": "Yes", "end": "stop", "stats": {"tokens": 1, "speed": 0, "first": 0}}, "1 token"),
        ({"content": "Yes", "end": "length", "stats": {"tokens": 2, "speed": 3, "first": 0.5}},
         "2 tokens · 3.0 tokens/s · first token after 0.50 s · reached the length limit"),
        ({"content": "Yes", "stats": {"tokens": 2, "speed": 0, "first": 0}}, "2 tokens · incomplete"),
        ({"content": "Yes"}, ""),
        ({"content": ""}, "incomplete"),
        ({"content": "", "end": "cut", "error": "gone"}, ""),
        ({"content": "Y", "end": "cut", "error": "gone"}, "incomplete"),
    ],
)  # fmt: skip
def test_the_line_below_an_answer_says_what_is_known(chat: Chat, node: dict[str, Any], facts: str) -> None:
    assert chat().module("turns", "m.factsOf(a[0])", node) == facts
