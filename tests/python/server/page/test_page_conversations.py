"""Conversations that the browser keeps: the list, branches, files, export and import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import NEEDS_BROWSER, Chat, Keys, Page

pytestmark = NEEDS_BROWSER


def titles(page: Page) -> list[str]:
    return page.shown(".open-conversation")


def test_conversations_are_kept_listed_renamed_and_deleted(chat: Chat) -> None:
    page = chat("One.", "Two.", "Three.")
    assert page.find("#no-conversations").is_displayed()
    page.say("First question")
    page.click("#new")
    page.say("Second question, " + "which is much too long for a title " * 3)
    page.until(lambda: len(titles(page)) == 2)
    assert titles(page)[0].endswith("…")
    page.reload()
    page.until(lambda: len(titles(page)) == 2)
    assert page.all(".turn") == []
    page.button("First question").click()
    page.until(lambda: page.shown(".answer") == ["One."])
    assert page.find("[aria-current=true]").text == "First question"
    page.look("light-list")

    page.button("Rename First question").click()
    page.press("Birds", Keys.ENTER)
    page.until(lambda: "Birds" in titles(page))
    page.button("Rename Birds").click()
    page.press("Cats", Keys.ESCAPE)
    page.until(lambda: "Birds" in titles(page))
    page.say("Third question")
    page.until(lambda: titles(page)[0] == "Birds")
    assert page.script.prompts[2].count("question") == 2, "the model receives the conversation"

    page.button("Delete Birds").click()
    page.look("light-confirm")
    page.press(Keys.ENTER)
    assert len(titles(page)) == 2, "the first button gives up"
    page.button("Delete Birds").click()
    page.click("#confirm-yes")
    page.until(lambda: len(titles(page)) == 1 and page.all(".turn") == [])
    page.click("#delete-all")
    page.click("#confirm-yes")
    page.until(lambda: titles(page) == [])
    page.reload()
    assert page.find("#no-conversations").is_displayed()
    assert not page.find("#export").is_enabled()


def test_editing_a_question_makes_a_branch_with_its_own_answer(chat: Chat) -> None:
    page = chat("A1", "A2", "B1", "B2")
    page.say("Question A")
    page.say("More on A")
    page.button("Edit", within=".turn.user:first-child").click()
    field = page.find(".edit textarea")
    assert field.get_attribute("value") == "Question A"
    page.look("light-edit")
    page.press(Keys.CONTROL, "a", Keys.NULL, "Question B", Keys.ENTER)
    page.until(lambda: page.answered() and page.shown(".answer") == ["B1"])
    assert page.shown(".turn.user .text") == ["Question B"]
    assert page.find(".place").text == "2/2"
    page.say("More on B")
    assert page.script.prompts[3].count("Question A") == 0

    page.button("Previous version").click()
    page.until(lambda: page.shown(".answer") == ["A1", "A2"])
    assert page.shown(".turn.user .text") == ["Question A", "More on A"]
    page.reload()
    page.click(".open-conversation")
    page.until(lambda: page.shown(".answer") == ["A1", "A2"])
    page.button("Next version").click()
    page.until(lambda: page.shown(".answer") == ["B1", "B2"])
    page.look("light-branches")
    assert not page.button("Next version").is_enabled()


def test_another_answer_and_an_edited_answer_are_branches(chat: Chat) -> None:
    page = chat("First", "Second", "After")
    page.say("Question")
    page.button("Try again").click()
    page.until(lambda: page.answered() and page.shown(".answer") == ["Second"])
    assert page.shown(".place") == ["2/2"]
    page.button("Edit", within=".turn.assistant").click()
    page.press(Keys.CONTROL, "a", Keys.NULL, "My own words", Keys.ENTER, "and more")
    page.button("Save").click()
    page.until(lambda: page.shown(".place") == ["3/3"])
    page.say("Next")
    assert "My own words\nand more<|im_end|>" in page.script.prompts[2]
    page.button("Previous answer").click()
    page.until(lambda: page.shown(".answer") == ["Second"])
    page.button("Edit", within=".turn.assistant").click()
    page.press("never", Keys.ESCAPE)
    assert page.shown(".answer") == ["Second"]


def test_text_files_go_into_the_message_and_others_are_refused(chat: Chat, tmp_path: Path) -> None:
    page = chat("I see.", "Again.")
    files = {"notes.txt": b"line one\r\nline ```` two\n", "photo.png": b"\x89PNG\x00\xff", "zero.txt": b"a\x00b"}
    for name, content in {**files, "big.txt": b"x" * (256 * 1024 + 1), "fits.txt": b"y" * 100}.items():
        (tmp_path / name).write_bytes(content)
    page.find("#files").send_keys(
        "\n".join(str(tmp_path / name) for name in ("notes.txt", "photo.png", "zero.txt", "big.txt"))
    )
    page.until(lambda: page.find("#notice").is_displayed())
    assert page.find("#notice-text").text == (
        "photo.png: not a text file in UTF-8; zero.txt: not a text file; big.txt: 257 KiB, expected at most 256 KiB"
    )
    page.find("#files").send_keys(str(tmp_path / "fits.txt"))
    page.until(lambda: page.shown("#chips .chip-name") == ["notes.txt", "fits.txt"])
    page.look("light-files")
    page.button("Remove fits.txt").click()
    page.say("What is this?")
    assert page.shown(".turn.user .chip-name") == ["notes.txt"]
    assert not page.find("#chips").is_displayed()
    expected = "What is this?\n\nFile notes.txt:\n`````\nline one\nline ```` two\n`````<|im_end|>"
    assert expected in page.script.prompts[0]
    page.button("Edit", within=".turn.user").click()
    page.press(Keys.CONTROL, "a", Keys.NULL, "And now?", Keys.ENTER)
    page.until(lambda: page.answered() and page.shown(".answer") == ["Again."])
    assert expected.replace("What is this?", "And now?") in page.script.prompts[1], "the file stays with the message"


def downloaded(page: Page, folder: Path) -> Path:
    """The file that the button Export saves."""
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    page.click("#export")
    return Path(page.until(lambda: next(folder.glob("nybble-conversations-*.json"), None)))


def test_conversations_are_exported_and_imported(chat: Chat, tmp_path: Path) -> None:
    page = chat("A", "B", "C")
    page.say("Birds?")
    page.button("Try again").click()
    page.until(lambda: page.shown(".place") == ["2/2"])
    page.click("#new")
    page.say("Cats?")
    page.until(lambda: len(titles(page)) == 2)
    file = downloaded(page, tmp_path)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert (content["format"], content["version"]) == ("nybble-conversations", 1)
    assert [each["title"] for each in content["conversations"]] in (["Birds?", "Cats?"], ["Cats?", "Birds?"])

    page.find("#import-file").send_keys(str(file))
    page.until(lambda: "no conversation imported; 2 already exist." in page.find("#notice-text").text)
    page.button("Delete Cats?").click()
    page.click("#confirm-yes")
    page.until(lambda: titles(page) == ["Birds?"])
    page.find("#import-file").send_keys(str(file))
    page.until(lambda: len(titles(page)) == 2)
    page.until(lambda: "1 conversation imported; 1 already exists." in page.find("#notice-text").text)
    page.click("#delete-all")
    page.click("#confirm-yes")
    page.until(lambda: titles(page) == [])
    page.find("#import-file").send_keys(str(file))
    page.until(lambda: len(titles(page)) == 2)
    page.button("Birds?").click()
    page.until(lambda: page.shown(".answer") == ["B"] and page.shown(".place") == ["2/2"])
    for each in content["conversations"]:
        each["nodes"][0]["content"] = "Changed"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content), encoding="utf-8")
    page.find("#import-file").send_keys(str(changed))
    page.until(lambda: len(titles(page)) == 4)


NODE: dict[str, Any] = {"id": "n1", "parent": None, "role": "user", "content": "Hi", "created": 1}
GOOD: dict[str, Any] = {
    "id": "c1",
    "title": "T",
    "created": 1,
    "updated": 2,
    "model": "m",
    "nodes": [NODE],
    "chosen": {"": "n1"},
}


def file_of(**changes: Any) -> str:
    return json.dumps({"format": "nybble-conversations", "version": 1, "conversations": [{**GOOD, **changes}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the file is not valid JSON"),
        ("[]", 'format must be "nybble-conversations"'),
        ('{"format": "nybble-conversations", "version": 2}', "version: found 2, expected 1"),
        ('{"format": "nybble-conversations", "version": 1}', "conversations: expected a list"),
        (file_of(id="../x"), 'conversations[0].id: found "../x", expected an id of up to 64 characters'),
        (file_of(title=3), "conversations[0].title: found 3, expected a string"),
        (file_of(updated="now"), 'conversations[0].updated: found "now", expected milliseconds since 1970'),
        (file_of(nodes={}), "conversations[0].nodes: found {}, expected a list"),
        (file_of(nodes=[7]), "conversations[0].nodes[0]: expected an object"),
        (file_of(nodes=[{**NODE, "role": "system"}]), 'conversations[0].nodes[0].role: found "system"'),
        (file_of(nodes=[{**NODE, "role": "assistant"}]), "cannot follow one of the same role"),
        (file_of(nodes=[{**NODE, "parent": "n1"}]), '.parent: "n1" is not an earlier message'),
        (file_of(nodes=[{**NODE, "id": "__proto__"}]), 'nodes[0].id: found "__proto__"'),
        (file_of(nodes=[NODE, NODE]), 'nodes[1].id: "n1" occurs twice'),
        (file_of(nodes=[{**NODE, "files": [{"name": "x"}]}]), "nodes[0].files[0].text: missing, expected a string"),
        (
            file_of(nodes=[{**NODE, "stats": {"tokens": -1}}]),
            "nodes[0].stats.tokens: found -1, expected a number of 0 or more",
        ),
        (file_of(chosen={"": "n2"}), 'chosen: "n2" does not follow ""'),
        (file_of(chosen={"n1": "n1"}), 'chosen: "n1" does not follow "n1"'),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(chat: Chat, text: str, message: str) -> None:
    page = chat()
    with pytest.raises(AssertionError) as caught:
        page.module("tree", "m.fromFile(a[0])", text)
    assert message in str(caught.value)


def test_imported_text_does_not_act(chat: Chat, tmp_path: Path) -> None:
    page = chat()
    evil = "<img src=x onerror=act()>"
    answer = {**NODE, "id": "n2", "parent": "n1", "role": "assistant", "error": evil, "reasoning": evil, "model": evil}
    question = {**NODE, "content": evil, "files": [{"name": evil, "text": evil}], "onload": evil}
    file = tmp_path / "evil.json"
    file.write_text(
        file_of(title=evil, model=evil, nodes=[question, {**answer, "content": evil}], chosen={}), encoding="utf-8"
    )
    page.run("window.acted = 0; window.act = () => { acted += 1; }")
    page.find("#import-file").send_keys(str(file))
    page.until(lambda: titles(page) == [evil])
    page.click(".open-conversation")
    page.until(lambda: page.shown(".answer") == [evil])
    assert (page.all("img"), page.run("return acted")) == ([], 0)


def branch(contents: list[str]) -> str:
    """A file with one conversation, whose messages have these contents."""
    nodes = [
        {
            **NODE,
            "id": f"n{i}",
            "parent": f"n{i - 1}" if i else None,
            "role": ("user", "assistant")[i % 2],
            "content": text,
        }
        for i, text in enumerate(contents)
    ]
    chosen = {each["parent"] or "": each["id"] for each in nodes}
    return file_of(title="T" * 500, nodes=nodes, chosen=chosen)


def test_the_end_of_a_long_conversation_is_shown_first(chat: Chat, tmp_path: Path) -> None:
    page = chat("Yes.")
    file = tmp_path / "long.json"
    file.write_text(branch([f"Message {i}" for i in range(250)]), encoding="utf-8")
    page.find("#import-file").send_keys(str(file))
    page.until(lambda: titles(page) == ["T" * 119 + "…"])
    page.click(".open-conversation")
    page.until(lambda: len(page.all(".turn")) == 100)
    top = "return document.querySelectorAll('.turn')[arguments[0]].getBoundingClientRect().top"
    page.run("document.getElementById('scroll').scrollTop = 0")
    before = page.run(top, 0)
    assert page.find("#earlier").text == "Show earlier messages (150)"
    page.click("#earlier")
    page.until(lambda: len(page.all(".turn")) == 200)
    assert abs(page.run(top, 100) - before) < 2, "what was read stays in place"
    page.say("More?")
    assert len(page.all(".turn")) == 202
    page.click("#earlier")
    page.until(lambda: len(page.all(".turn")) == 252)
    assert not page.find("#earlier").is_displayed()
    assert page.shown(".turn .text")[0] == "Message 0"


def test_long_messages_are_shown_a_few_at_a_time(chat: Chat, tmp_path: Path) -> None:
    page = chat()
    file = tmp_path / "long.json"
    file.write_text(branch(["word " * 30_000] * 8), encoding="utf-8")
    page.find("#import-file").send_keys(str(file))
    page.until(lambda: len(titles(page)) == 1)
    page.click(".open-conversation")
    page.until(lambda: len(page.all(".turn")) == 2)
    page.click("#earlier")
    page.until(lambda: len(page.all(".turn")) == 4)


def test_a_full_storage_is_reported_and_the_conversation_continues(chat: Chat) -> None:
    page = chat("One.", "Two.")
    page.run("IDBObjectStore.prototype.put = () => { throw new DOMException('full', 'QuotaExceededError'); }")
    page.say("Hello")
    page.until(lambda: "no space left" in page.find("#notice-text").text)
    page.look("light-full")
    page.say("And again")
    assert page.shown(".answer") == ["One.", "Two."]
    assert titles(page) == []


def test_a_browser_that_keeps_nothing_still_has_conversations(chat: Chat) -> None:
    page = chat("One.")
    block = "Object.defineProperty(window, 'indexedDB', { get() { throw new DOMException('no', 'SecurityError'); } });"
    block += (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    with page.before_load(block):
        page.ready()
        assert "keeps nothing" in page.find("#storage").text
        page.say("Hello")
        page.until(lambda: titles(page) == ["Hello"])
        page.click("#new")
        page.button("Hello").click()
        page.until(lambda: page.shown(".answer") == ["One."])
        page.click("#theme")


def test_a_question_without_an_answer_goes_with_the_next_one(chat: Chat) -> None:
    page = chat()
    conversation = page.module(
        "tree",
        "(() => { const c = m.newConversation('m'); let last = null;"
        "for (const [role, content] of a[0]) last = m.add(c, last?.id ?? null, { role, content });"
        "return m.requestMessages(c, last, 'Be kind.'); })()",
        [["user", "lost"], ["assistant", ""], ["user", "asked"], ["assistant", "said"], ["user", "now"]],
    )  # fmt: skip
    assert [each["content"] for each in conversation] == ["Be kind.", "lost\n\nasked", "said", "now"]
