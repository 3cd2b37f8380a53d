// The page: one conversation is shown, and at most one answer is written at a time.

import { $, announce, counted, isComposing, kept, make, notice } from "./dom.js";
import { Answer } from "./answer.js";
import { models, onKey } from "./api.js";
import { connectAttachments, hasFiles, takeFiles } from "./attachments.js";
import { connectSettings, parameters, systemPrompt, useModel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { attempted, openStore } from "./storage.js";
import { add, choose, drop, newConversation, path, rename, requestMessages, takeTitle } from "./tree.js";
import { factsOf, joined, Log } from "./turns.js";

/** Milliseconds after which an answer that is being written is kept again, and the share of the time that this may take. */
const KEEP_EVERY = 500, KEEPING = 0.1;
const BUSY = "An answer is being written. Wait until it is complete, or stop it.";

const store = await openStore();
let cards = [], model = "", conversation = newConversation(""), running = null;
let isIntroducing = false, isStale = false;

const log = new Log({ choose: show, edit, retry, closed: () => { if (isStale) follow(); }, namesModels: () => cards.length > 1 });
const sidebar = new Sidebar(store, { open, rename: renameKept, removed });

// --- Models -------------------------------------------------------------------------------------

/** Shows the models of the server, once it says which it has. */
async function introduce() {
  if (isIntroducing || cards.length) return;
  isIntroducing = true;
  try {
    cards = await models();
    if (!cards.length) throw new Error("the server lists no models");
    const wanted = conversation.model || kept.get("nybble.model");
    selectModel(cards.find(card => card.id === wanted)?.id ?? cards[0].id);
  } catch (error) {
    $("model").replaceChildren(make("span", { class: "model-name wrong" }, `Error: ${error.message}`));
  }
  isIntroducing = false;
}

/** Shows which models are loaded now. */
async function refresh() {
  const known = JSON.stringify(cards);
  cards = await models().catch(() => cards);
  if (JSON.stringify(cards) !== known && document.activeElement?.id !== "model-choice") selectModel(model);
}

function selectModel(id) {
  const card = cards.find(each => each.id === id);
  if (!card) return;
  model = id;
  useModel(card);
  document.title = `${id} - nybble`;
  if (cards.length === 1) {
    $("model").replaceChildren(make("span", { class: "model-name", title: id }, id));
    return;
  }
  const field = make("select", { id: "model-choice", "aria-label": "Model" });
  for (const each of cards) {
    const label = each.loaded === false ? `${each.id} (not loaded)` : each.id;
    field.append(new Option(label, each.id, each.id === id, each.id === id));
  }
  field.onchange = () => {
    kept.set("nybble.model", field.value);
    selectModel(field.value);
    $("model-choice").focus();
  };
  $("model").replaceChildren(field);
}

// --- Conversations --------------------------------------------------------------------------------

/** Keeps a conversation in the browser, or says why it cannot. */
async function keep(each = conversation) {
  const hasTaken = await attempted(() => store.put(each), "This conversation is not kept.");
  if (hasTaken === undefined) return;
  if (hasTaken && each === conversation) show();
  await sidebar.show(conversation.id);
}

/** Shows the conversation, with another branch if a message of it is given. */
function show(node) {
  if (node) {
    choose(conversation, node);
    keep();
  }
  const pressed = node && document.activeElement?.getAttribute("aria-label");
  log.show(conversation, running?.conversation === conversation ? running.node : null, Boolean(running));
  // The button that was pressed has been replaced.
  if (pressed) log.focusBranches(node, pressed);
}

function start() {
  conversation = newConversation(model);
  log.clear();
  show();
  sidebar.show(conversation.id);
  $("prompt").focus();
}

async function open(id) {
  const found = running?.conversation.id === id ? running.conversation : await attempted(() => store.get(id));
  if (!found) return sidebar.show();
  conversation = found;
  log.clear();
  if (cards.length > 1 && found.model) selectModel(found.model);
  show();
  log.toEnd();
  sidebar.show(id);
  if (!matchMedia("(pointer: coarse)").matches) $("prompt").focus();
}

async function renameKept(id, title) {
  const found = [running?.conversation, conversation].find(each => each?.id === id) ?? await attempted(() => store.get(id));
  if (!found) return;
  rename(found, title);
  await keep(found);
}

/** A conversation was deleted; null if all were. */
function removed(id) {
  if (running && (id === null || running.conversation.id === id)) {
    running.isForgotten = true;
    running.stop();
  }
  if (id === null || conversation.id === id) start();
}

/** Shows what another tab has changed. What is being written here remains, unless it was deleted there. */
async function follow() {
  isStale = false;
  if (running && await store.isDeleted(running.conversation.id)) {
    running.isForgotten = true;
    running.stop();
  }
  if (await store.isDeleted(conversation.id)) {
    start();
  } else if (!running && conversation.nodes.length) {
    const found = await store.get(conversation.id);
    if (found && !running && found.id === conversation.id) {
      takeTitle(conversation, found);
      if (found.updated > conversation.updated) reload(found);
    }
  }
}

/** Shows a later state of the conversation; if a message is being edited, when that is over. */
function reload(found) {
  if (log.isEditing) {
    isStale = true;
    return;
  }
  conversation = found;
  log.clear();
  show();
}

store.onchange(async () => {
  await attempted(follow);
  sidebar.show();
});

// --- Questions and answers --------------------------------------------------------------------------

function send(text, files) {
  if (running || !(text || files.length)) return;
  add(conversation, path(conversation).at(-1)?.id ?? null, { role: "user", content: text, ...(files.length ? { files } : {}) });
  answer();
}

/** A change of a question is a new branch with an answer of its own; a change of an answer is a new branch alone. */
function edit(node, text) {
  if (running) {
    notice(BUSY);
    return false;
  }
  const { role, files, parent, model: author } = node;
  add(conversation, parent, { role, content: text, ...(files ? { files } : {}), ...(author ? { model: author, end: "edited" } : {}) });
  if (role === "user") return answer();
  show();
  keep();
}

/** Another answer to the same question, which replaces one that has failed. */
function retry(node) {
  if (running) return;
  choose(conversation, conversation.nodes.find(each => each.id === node.parent));
  if (!node.content && !conversation.nodes.some(each => each.parent === node.id)) drop(conversation, node);
  answer(node.parent);
}

/** Lets the model answer a message; by default the last one. */
async function answer(parent = path(conversation).at(-1).id) {
  const own = conversation, question = own.nodes.find(node => node.id === parent);
  const messages = requestMessages(own, question, systemPrompt());
  const node = add(own, parent, { role: "assistant", content: "", model });
  own.model = model;
  const run = running = new Answer(own, node, keepSoon, progress);
  busy(true);
  if (cards.find(card => card.id === model)?.loaded === false) $("live").textContent = `Loading ${model}…`;
  show();
  log.toEnd();
  announce("Generating an answer");
  keep(own);
  run.keptAt = run.keepAfter = 0;
  await run.write({ model: model || undefined, messages, ...parameters() });
  running = null;
  own.updated = Date.now();
  busy(false);
  if (run.isForgotten) return show();
  const follows = log.follows;
  show();
  if (follows) log.toEnd();
  announce(node.error ? "The answer failed" : `Answer complete. ${factsOf(node)}`);
  await keep(own);
  if (cards.length > 1) refresh();
  else introduce();
  const field = document.activeElement;
  if (!matchMedia("(pointer: coarse)").matches && (field === document.body || field === $("stop"))) $("prompt").focus();
}

function progress(run) {
  if (run !== running) return;
  log.update(run.node);
  const { tokens, speed } = run.node.stats;
  const place = run.conversation === conversation ? "" : `in “${run.conversation.title}”`;
  $("live").textContent = joined([place, counted(tokens, "token"), speed > 0 && `${speed.toFixed(1)} tokens/s`]);
}

/** Keeps an answer that is being written: its first token, and later as often as time allows. */
async function keepSoon(run) {
  const began = performance.now();
  if (run.isForgotten || run.isKeeping || began - run.keptAt < run.keepAfter) return;
  run.isKeeping = true;
  await store.put(run.conversation, true).catch(() => {});  // The put after the answer reports a failure.
  run.isKeeping = false;
  run.keptAt = performance.now();
  run.keepAfter = Math.max(KEEP_EVERY, (run.keptAt - began) / KEEPING);
}

function busy(is) {
  for (const button of $("ideas").children) button.disabled = is;
  if (!is && $("notice-text").textContent === BUSY) $("notice").hidden = true;
  $("stop").hidden = !is;
  $("send").hidden = is;
  $("keys").hidden = is;
  if (!is) $("live").textContent = "";
}

// --- The composer -------------------------------------------------------------------------------------

function fit() {
  const box = $("prompt");
  $("send").disabled = !box.value.trim() && !hasFiles();
  if (CSS.supports("field-sizing", "content")) return;
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function submit() {
  const text = $("prompt").value.trim();
  if (!(text || hasFiles())) return;
  if (running) return notice(BUSY);
  $("prompt").value = "";
  $("notice").hidden = true;
  send(text, takeFiles());
  fit();
}

$("form").onsubmit = event => { event.preventDefault(); submit(); };
$("prompt").oninput = fit;
$("prompt").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) { event.preventDefault(); submit(); }
};
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !isComposing(event) && running && !document.querySelector("dialog:modal")) running.stop();
});
$("stop").onclick = () => { running?.stop(); $("prompt").focus(); };
$("new").onclick = start;
$("notice-close").onclick = () => { $("notice").hidden = true; $("prompt").focus(); };
$("ideas").onclick = event => { if (event.target.localName === "button") send(event.target.textContent, []); };
$("theme").onclick = () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = (root.dataset.theme ?? (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
  kept.set("nybble.theme", root.dataset.theme);
};

addEventListener("pagehide", () => { if (running && !running.isForgotten) store.putAtOnce(running.conversation).catch(() => {}); });
onKey(introduce);

connectAttachments(fit);
connectSettings();
fit();
sidebar.show();
introduce();
