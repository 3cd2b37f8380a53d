"""What the browser keeps when several tabs show the page, when it is closed early, and when storage fails."""

from __future__ import annotations

import pytest
from browser import NEEDS_BROWSER, Chat, Keys, Page

pytestmark = NEEDS_BROWSER


def titles(page: Page) -> list[str]:
    return page.shown(".open-conversation")


def opened(page: Page, title: str, answers: list[str]) -> None:
    """Opens a conversation of the list and waits for its answers."""
    page.until(lambda: title in titles(page))
    page.button(title).click()
    page.until(lambda: page.shown(".answer") == answers)


def answers(page: Page) -> list[tuple[str, str | None]]:
    """The content and end of each answer that the browser keeps."""
    nodes = [node for each in page.stored() for node in each["nodes"]]
    return [(node["content"], node.get("end")) for node in nodes if node["role"] == "assistant"]


def test_a_change_in_another_tab_is_shown(chat: Chat) -> None:
    page = chat("One.", "Two.")
    page.say("Hello")
    with page.tabs() as (first, _):
        opened(page, "Hello", ["One."])
        page.say("And here?")
        page.chosen(first).until(lambda: page.shown(".answer") == ["One.", "Two."])


def test_a_tab_with_part_of_an_answer_does_not_replace_the_whole(chat: Chat) -> None:
    page = chat("Later.")
    page.hold_answers()
    page.press("Hello", Keys.ENTER)
    page.feed("Half of ")
    page.until(lambda: answers(page) == [("Half of", None)] or answers(page) == [("Half of ", None)])
    with page.tabs() as (first, second):
        opened(page, "Hello", ["Half of"])
        assert "incomplete" in page.find(".speed").text
        page.hold_answers()
        page.press("And now?", Keys.ENTER)
        page.feed("Now ")
        page.chosen(first).feed("the answer")
        page.finish()
        page.until(lambda: ("Half of the answer", "stop") in answers(page))
        page.chosen(second).feed("this.")
        page.finish()
        page.until(lambda: page.shown(".answer") == ["Half of the answer", "Now this."])
        page.until(lambda: answers(page) == [("Half of the answer", "stop"), ("Now this.", "stop")])


def test_a_new_title_is_not_undone_by_another_tab(chat: Chat) -> None:
    page = chat("One.", "Two.")
    page.say("Hello")
    with page.tabs() as (first, second):
        opened(page, "Hello", ["One."])
        page.chosen(first).button("Rename Hello").click()
        page.press("Birds", Keys.ENTER)
        page.until(lambda: titles(page) == ["Birds"])
        page.chosen(second).until(lambda: titles(page) == ["Birds"])
        page.say("More")
        page.until(lambda: len(page.stored()[0]["nodes"]) == 4)
        assert [each["title"] for each in page.stored()] == ["Birds"]
        page.chosen(first).until(lambda: page.shown(".answer") == ["One.", "Two."])
        assert titles(page) == ["Birds"]


NEWER_TITLE = """(async () => {
  const { newConversation, add, rename, takeTitle } = await import('./page/app/tree.js');
  const store = await m.openStore(), one = newConversation('m');
  add(one, null, { role: 'user', content: 'Q' });
  one.renamed = true;  // As earlier versions kept it.
  await store.put(one);
  const other = await store.get(one.id);
  rename(other, 'First');
  rename(other, 'Second');
  await store.put(other);
  const hasTaken = await store.put(one);
  return [one.title, (await store.get(one.id)).title, hasTaken, takeTitle(other, one)];
})()"""


def test_the_later_of_two_titles_is_kept(chat: Chat) -> None:
    assert chat().module("storage", NEWER_TITLE) == ["Second", "Second", True, False]


def test_reloading_the_page_keeps_what_was_written_of_an_answer(chat: Chat) -> None:
    page = chat()
    page.hold_answers()
    page.press("Hello", Keys.ENTER)
    page.feed("First ")
    page.until(lambda: page.shown(".answer") == ["First"])
    page.feed("and last")
    page.until(lambda: page.shown(".answer") == ["First and last"])
    page.reload()
    opened(page, "Hello", ["First and last"])
    assert "incomplete" in page.find(".speed").text


def test_an_answer_without_a_token_is_marked_as_incomplete_after_a_reload(chat: Chat) -> None:
    page = chat()
    page.hold_answers()
    page.press("Hello", Keys.ENTER)
    page.until(lambda: titles(page) == ["Hello"])
    page.reload()
    opened(page, "Hello", [""])
    assert page.find(".speed").text == "incomplete"


def test_an_answer_is_kept_while_the_tab_is_hidden(chat: Chat) -> None:
    page = chat()
    page.run("window.requestAnimationFrame = () => 0")  # As in a hidden tab.
    page.hold_answers()
    page.press("Hello", Keys.ENTER)
    page.feed("First")
    page.until(lambda: answers(page) == [("First", None)])

    def grown() -> bool:
        page.feed(".")
        return answers(page)[0][0].startswith("First..")

    page.until(grown)
    assert page.shown(".answer") == [""]
    page.finish()


def edit(page: Page, text: str) -> None:
    """Types into the form that edits the first question."""
    page.button("Edit", within=".turn.user:first-child").click()
    page.press(text)


def test_an_edit_during_an_answer_stays_until_it_can_be_sent(chat: Chat) -> None:
    page = chat("One.")
    page.say("Hello")
    page.hold_answers()
    edit(page, " and more")
    page.find("#prompt").send_keys("Other", Keys.ENTER)
    page.feed("Two.")
    page.find(".edit textarea").send_keys(Keys.ENTER)
    assert "An answer is being written" in page.find("#notice-text").text
    page.find("#prompt").send_keys("Third", Keys.ENTER)
    assert page.find("#prompt").get_attribute("value") == "Third"
    page.finish()
    page.until(lambda: not page.find("#notice").is_displayed())
    assert page.find(".edit textarea").get_attribute("value") == "Hello and more"
    page.look("light-edit-after-answer")
    page.find(".edit textarea").send_keys(Keys.ENTER)
    page.until(lambda: page.shown(".turn.user .text") == ["Hello and more"])
    page.feed("Three.")
    page.finish()
    page.until(lambda: page.shown(".answer") == ["Three."])


@pytest.mark.parametrize("key", [Keys.ESCAPE, Keys.ENTER])
def test_an_edit_stays_when_another_tab_changes_the_conversation(chat: Chat, key: str) -> None:
    page = chat("One.", "Two.", "Three.")
    page.say("Hello")
    edit(page, " there")
    with page.tabs() as (first, _):
        opened(page, "Hello", ["One."])
        page.say("More")
        page.button("Rename Hello").click()
        page.press("Birds", Keys.ENTER)
        page.chosen(first).until(lambda: titles(page) == ["Birds"])
        field = page.find(".edit textarea")
        assert field.get_attribute("value") == "Hello there"
        field.send_keys(key)
        if key == Keys.ESCAPE:
            page.until(lambda: page.shown(".answer") == ["One.", "Two."])
        else:
            page.until(lambda: page.shown(".answer") == ["Three."] and page.answered())
            page.until(lambda: len(page.stored()[0]["nodes"]) == 6)


def test_a_deleted_conversation_is_not_kept_again_by_its_answer(chat: Chat) -> None:
    page = chat()
    page.hold_answers()
    page.press("Hello", Keys.ENTER)
    page.feed("One")
    page.until(lambda: len(answers(page)) == 1)
    left = page.module(
        "storage",
        "(async () => { const store = await m.openStore(), [one] = await store.all();"
        "await store.get(one.id); await store.remove(one.id); await store.put(one); return store.all(); })()",
    )
    assert left == []
    page.until(lambda: page.all(".turn") == [])
    assert page.stored() == []


TWO_TABS = """(async () => {
  const { newConversation, add, drop } = await import('./page/app/tree.js');
  const store = await m.openStore(), one = newConversation('m');
  const question = add(one, null, { role: 'user', content: 'Q' });
  const lost = add(one, question.id, { role: 'assistant', content: '' });
  await store.put(one);
  const other = await store.get(one.id);
  drop(one, lost);
  add(one, question.id, { role: 'assistant', content: 'from one' });
  await store.put(one);
  add(other, question.id, { role: 'assistant', content: 'from the other' });
  await store.put(other);
  await store.put(one);
  const kept = await store.get(one.id), deleted = [await store.isDeleted(one.id)];
  await (await m.openStore()).remove(one.id);
  deleted.push(await store.isDeleted(one.id));
  return [kept.nodes.map(node => node.content), deleted];
})()"""


def test_messages_that_two_tabs_add_are_both_kept(chat: Chat) -> None:
    contents, deleted = chat().module("storage", TWO_TABS)
    assert sorted(contents) == ["Q", "from one", "from the other"], "the empty answer was replaced"
    assert deleted == [False, True]


def test_settings_of_two_tabs_are_both_kept(chat: Chat) -> None:
    page = chat("One.")
    with page.tabs() as (first, second):
        page.set(system="From the second tab")
        page.chosen(first).until(lambda: page.find("#system").get_attribute("value") == "From the second tab")
        page.set(temperature=0.5)
        page.chosen(second).until(lambda: page.find("#temperature").get_attribute("value") == "0.5")
        assert page.find("#system").get_attribute("value") == "From the second tab"
        kept = page.run("return Object.values(JSON.parse(localStorage.getItem('nybble.models')))")
        assert kept == [{"system": "From the second tab", "temperature": "0.5"}]


def test_failures_of_the_storage_are_reported(chat: Chat) -> None:
    page = chat("One.", "Two.")
    page.say("Hello")
    page.until(lambda: titles(page) == ["Hello"])
    page.run(
        "window.unhandled = []; addEventListener('unhandledrejection', e => unhandled.push(String(e.reason)));"
        "IDBDatabase.prototype.transaction = () => { throw new DOMException('It is closing.', 'InvalidStateError'); }"
    )
    expected = "The browser's storage failed: It is closing."

    def reported() -> str:
        page.until(lambda: page.find("#notice").is_displayed())
        text = str(page.find("#notice-text").text)
        page.click("#notice-close")
        return text

    page.click("#export")
    assert reported() == expected
    page.click("#delete-all")
    page.click("#confirm-yes")
    assert reported() == expected
    page.button("Delete Hello").click()
    page.click("#confirm-yes")
    assert reported() == expected
    page.click("#new")
    assert reported() == expected, "the list"
    page.click(".open-conversation")
    assert reported() == expected
    page.say("And now?")
    assert reported() == f"{expected} This conversation is not kept."
    assert page.shown(".answer") == ["Two."]
    assert (titles(page), page.run("return unhandled")) == (["Hello"], [])


def test_the_focus_stays_in_the_list_when_it_changes(chat: Chat) -> None:
    page = chat("1", "2", "3", "4")
    for text in ("Ants", "Birds", "Cats"):
        page.click("#new")
        page.say(text)
    page.until(lambda: titles(page) == ["Cats", "Birds", "Ants"])

    def focused() -> str:
        return str(page.run("const e = document.activeElement; return e.getAttribute('aria-label') ?? e.textContent"))

    page.button("Rename Ants").click()
    page.press("Dogs", Keys.ENTER)
    page.until(lambda: focused() == "Rename Dogs")
    page.press(Keys.ENTER)
    page.press(Keys.ESCAPE)
    page.until(lambda: focused() == "Rename Dogs")
    page.button("Delete Birds").send_keys(Keys.ENTER)
    page.find("#confirm-yes").send_keys(Keys.ENTER)
    page.until(lambda: titles(page) == ["Cats", "Dogs"] and focused() == "Dogs")
    with page.tabs() as (first, second):
        opened(page, "Dogs", ["1"])
        page.chosen(first).run("document.querySelectorAll('.open-conversation')[1].focus()")
        page.chosen(second).say("More")
        page.chosen(first).until(lambda: titles(page) == ["Dogs", "Cats"])
        assert focused() == "Dogs"
