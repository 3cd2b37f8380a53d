// The messages on the screen.

import { $, copyText, counted, iconButton, isComposing, make, textButton } from "./dom.js";
import { chip } from "./attachments.js";
import { Markdown } from "./markdown.js";
import { branches, contentOf } from "./tree.js";

/** Pixels from the end at which the view follows an answer again. */
const NEAR = 24;
/** Messages, and their characters, that are shown of a long conversation before the reader asks for more. */
const MAX_TURNS = 100, MAX_CHARACTERS = 400_000;

const ENDS = { length: "reached the length limit", stopped: "stopped", cut: "incomplete", edited: "edited" };
export const joined = parts => parts.filter(Boolean).join(" · ");

/** What is known about an answer, for the line below it. */
export function factsOf({ content, error, stats, end, model }, isNamed = false) {
  return joined([
    isNamed && model,
    stats?.tokens > 0 && counted(stats.tokens, "token"),
    stats?.speed > 0 && `${stats.speed.toFixed(1)} tokens/s`,
    stats?.first > 0 && `first token after ${stats.first.toFixed(2)} s`,
    // Without an end, the page was closed while it was written. An error says itself that there is no answer.
    !(error && !content) && ENDS[end ?? (stats || !content ? "cut" : "")],
  ]);
}

/**
 * The view of one conversation. `actions` has `choose`, `edit` and `retry`, which take a message, `namesModels()`, and
 * `closed()`, which is called when an edit is over. `edit` returns false if the message cannot be changed now.
 */
export class Log {
  constructor(actions) {
    this.actions = actions;
    this.turns = new Map();
    this.box = $("scroll");
    this.follows = true;
    this.start = null;  // The place of the first message that is shown, once there are messages.
    let before = 0;
    this.box.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.box, distance = scrollHeight - scrollTop - clientHeight;
      // Only a reader scrolls up, so the view no longer follows the answer, however small the step.
      if (scrollTop < before && distance > 2) this.follows = false;
      else if (distance < NEAR) this.follows = true;
      before = scrollTop;
      $("latest").hidden = this.follows;
    }, { passive: true });
    $("latest").onclick = () => this.toEnd();
    $("earlier").onclick = () => this.showEarlier();
  }

  /** Whether a message is being edited. */
  get isEditing() { return $("log").querySelector(".edit") !== null; }

  /** Shows the chosen branch. Turns that are shown already keep their elements. While busy, nothing can be changed. */
  show(conversation, writing, isBusy) {
    const line = branches(conversation), before = this.turns;
    this.shown = [conversation, writing, isBusy];
    if (this.start === null || this.start >= line.length) this.start = startOf(line, line.length);
    this.line = line;
    this.turns = new Map();
    for (const { shown: node, options } of line.slice(this.start)) {
      const turn = before.get(node.id) ?? new Turn(node, this.actions);
      turn.finish(node, options, node === writing, isBusy);
      this.turns.set(node.id, turn);
    }
    for (const [id, turn] of before) if (!this.turns.has(id)) turn.element.remove();
    let next = $("log").firstElementChild;
    for (const { element } of this.turns.values()) {
      if (element === next) next = next.nextElementSibling;
      else $("log").insertBefore(element, next);
    }
    $("welcome").hidden = line.length > 0;
    $("log").hidden = line.length === 0;
    $("earlier").hidden = this.start === 0;
    $("earlier").textContent = `Show earlier messages (${this.start})`;
  }

  /** Shows more of the messages before those that are shown, which keep their place on the screen. */
  showEarlier() {
    const { scrollHeight, scrollTop } = this.box, first = this.turns.values().next().value;
    this.start = startOf(this.line, this.start);
    this.show(...this.shown);
    this.box.scrollTop = this.box.scrollHeight - (scrollHeight - scrollTop);
    if (this.start === 0) first?.element.querySelector("button")?.focus({ preventScroll: true });
  }

  /** Moves the focus to a button for branches of a message: to that of this name, or to the other at an end. */
  focusBranches(node, name) {
    const buttons = [...this.turns.get(node.id).element.querySelectorAll(".branches button:not(:disabled)")];
    (buttons.find(button => button.getAttribute("aria-label") === name) ?? buttons[0])?.focus();
  }

  /** Forgets what is shown. */
  clear() {
    this.turns.clear();
    this.start = null;
    $("log").replaceChildren();
  }

  /** Shows more of a message that is being written. */
  update(node) {
    const turn = this.turns.get(node.id);
    if (!turn) return;
    const follows = this.follows;  // Growing must not count as scrolling.
    turn.write(node);
    if (follows) this.toEnd();
  }

  toEnd() {
    this.box.scrollTop = this.box.scrollHeight;
    this.follows = true;
    $("latest").hidden = true;
  }
}

const sizeOf = ({ content, reasoning }) => content.length + (reasoning?.length ?? 0);

/** The place from which messages before `end` are shown: at least the last two. */
function startOf(line, end) {
  let start = end;
  for (let size = 0; start > 0 && end - start < MAX_TURNS; start -= 1) {
    size += sizeOf(line[start - 1].shown);
    if (size > MAX_CHARACTERS && end - start >= 2) break;
  }
  return start;
}

class Turn {
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.text = make("div", { class: "text" });
    this.foot = make("div", { class: "foot" });
    this.element = make("article", { class: `turn ${node.role}` },
      make("h2", { class: "unseen" }, node.role === "user" ? "You" : "Model"), this.text, this.foot);
    if (node.role === "user") {
      if (node.content) this.text.append(make("p", {}, node.content));
      if (node.files?.length) this.text.append(make("div", { class: "chips" }, ...node.files.map(file => chip(file))));
    } else {
      this.answer = make("div", { class: "answer" });
      this.markdown = new Markdown(this.answer);
      this.text.append(this.answer);
    }
  }

  /** Shows the text of an answer so far. */
  write(node, isComplete = false) {
    if (node.reasoning) this.think(node, isComplete);
    this.markdown.update(node.content, isComplete);
    this.written = sizeOf(node);
  }

  think(node, isComplete) {
    if (!this.thought) {
      this.thought = document.createTextNode("");
      this.summary = make("summary");
      this.text.prepend(make("details", {}, this.summary, make("p", {}, this.thought)));
    }
    this.thought.appendData(node.reasoning.slice(this.thought.length));
    const label = node.content || isComplete ? "Thoughts" : "Thinking…";
    if (this.summary.textContent !== label) this.summary.textContent = label;
  }

  /** Shows the state of a message: complete or being written, its branches, and what can be done with it. */
  finish(node, branches, isWriting, isBusy) {
    // Another tab may have written more of it.
    if (node.role === "assistant" && (!this.isComplete || this.written !== sizeOf(node))) this.write(node, !isWriting);
    this.isComplete = !isWriting;
    this.element.setAttribute("aria-busy", String(isWriting));
    this.element.querySelector(".failed")?.remove();
    if (node.error) this.foot.before(make("p", { class: "failed", role: "alert" }, `Error: ${node.error}`));
    this.foot.replaceChildren();
    if (isWriting) return;
    this.foot.append(...this.branches(node, branches, isBusy), ...this.tools(node, isBusy));
    const facts = factsOf(node, this.actions.namesModels());
    if (node.role === "assistant") this.foot.append(make("span", { class: "speed" }, facts));
  }

  branches(node, branches, isBusy) {
    if (branches.length < 2) return [];
    const index = branches.indexOf(node), name = node.role === "user" ? "version" : "answer";
    const step = (offset, picture, label) => {
      const button = iconButton(picture, `${label} ${name}`, () => this.actions.choose(branches[index + offset]));
      button.disabled = isBusy || !branches[index + offset];
      return button;
    };
    const place = make("span", { class: "place", "aria-label": `${name} ${index + 1} of ${branches.length}` }, `${index + 1}/${branches.length}`);
    return [make("span", { class: "branches", role: "group", "aria-label": `Other ${name}s` }, step(-1, "left", "Previous"), place, step(1, "right", "Next"))];
  }

  tools(node, isBusy) {
    const found = [];
    if (node.content || node.files?.length) {
      const copy = textButton("Copy", () => copyText(contentOf(node), copy));
      const edit = textButton("Edit", () => this.edit(node));
      found.push(copy, edit);
    }
    if (node.role === "assistant") found.push(textButton("Try again", () => this.actions.retry(node), "small retry"));
    for (const button of found) button.disabled = isBusy && button.textContent !== "Copy";
    return found;
  }

  /** Replaces the message by a field until the change is sent or given up. */
  edit(node) {
    const isQuestion = node.role === "user";
    const field = make("textarea", { class: "box", rows: "3", "aria-label": isQuestion ? "Edit the message" : "Edit the answer" });
    field.value = node.content;
    const close = () => {
      form.remove();
      this.text.hidden = this.foot.hidden = false;
      this.element.classList.remove("edited");
      $("prompt").focus();
      this.actions.closed();
    };
    const form = make("form", { class: "edit" }, field, make("div", { class: "edit-buttons" },
      textButton("Cancel", close, "plain"), make("button", { class: "full" }, isQuestion ? "Send" : "Save")));
    form.onsubmit = event => {
      event.preventDefault();
      if (!field.value.trim() && !node.files?.length) return;
      if (this.actions.edit(node, field.value.trim()) !== false) close();
    };
    form.onkeydown = event => {
      if (event.key === "Escape" && !isComposing(event)) { event.stopPropagation(); close(); }
      if (event.key === "Enter" && !isComposing(event) && (event.ctrlKey || event.metaKey || (isQuestion && !event.shiftKey && event.target === field))) {
        event.preventDefault();
        form.requestSubmit();
      }
    };
    this.text.hidden = this.foot.hidden = true;
    this.element.classList.add("edited");
    this.foot.before(form);
    field.focus();
  }
}
