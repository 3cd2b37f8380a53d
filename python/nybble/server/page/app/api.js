// Requests to the server: the API key, errors in words, and streams of events.

import { $, kept } from "./dom.js";

const session = () => sessionStorage;

/** Keys are printable ASCII. Others cannot be sent in a header. */
const isKey = text => /^[\x20-\x7e]+$/.test(text);

/** The key that was entered in this tab, or null. */
function keyOfTab() {
  const key = kept.get("nybble.key", session);
  return key && isKey(key) ? key : null;
}

/** An error that a person can act on. */
export class ServerError extends Error {}

/** Sends a request. Asks for the API key if the server wants one, and throws errors in words. */
export async function ask(path, options = {}) {
  for (;;) {
    const key = keyOfTab();
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const answer = await fetch(path, { ...options, headers }).catch(error => {
      throw error.name === "AbortError" ? error : new ServerError("the server cannot be reached. Is it running?");
    });
    if (answer.ok) return answer;
    if (answer.status !== 401) throw await failure(answer);
    await askForKey(key, options.signal);
  }
}

let asking = null, given = () => {};

/** Calls back when a person has entered a key. */
export function onKey(callback) { given = callback; }

/** Asks for the key, once for all requests that wait for it. */
function askForKey(refused, signal) {
  const key = keyOfTab();
  if (key && key !== refused) return null;  // Another request has asked meanwhile.
  asking ??= new Promise((resolve, reject) => {
    const dialog = $("ask");
    const say = (text, isWrong) => {
      $("ask-text").textContent = text;
      $("ask-text").classList.toggle("wrong", isWrong);
    };
    if (refused) say("The key is wrong. Please try again.", true);
    else say("Enter the API key of this server. The page keeps it until this tab is closed.", false);
    $("key").value = dialog.returnValue = "";
    dialog.querySelector("form").onsubmit = event => {
      const entered = $("key").value.trim();
      if (!entered || isKey(entered)) return;
      event.preventDefault();
      say("An API key has only printable ASCII characters, and no accented ones. Please check it.", true);
    };
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      const entered = $("key").value.trim();
      if (!entered || dialog.returnValue !== "given") return reject(new ServerError("this server needs an API key"));
      kept.set("nybble.key", entered, session);
      resolve();
      given();
    }, { once: true });
  });
  return Promise.race([asking, new Promise((_, reject) => {
    signal?.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")), { once: true });
  })]);
}

/** The error of a response that is not a success, in words. */
async function failure(answer) {
  const text = await answer.text().catch(() => "");
  let message;
  try { message = JSON.parse(text).error.message; } catch { message = `status ${answer.status}`; }
  const lead = {
    404: "not found",
    413: "this is too long for the server",
    429: "the server is busy. Try again in a moment",
    503: "the server cannot answer now. Try again in a moment",
  }[answer.status] ?? (answer.status >= 500 ? "the server failed" : "the server refused the request");
  return new ServerError(`${lead}: ${message}`);
}

/** The events of a stream, parsed. A stream that ends early is an error. */
export async function* events(body) {
  const decoder = new TextDecoder();
  let held = "";
  for (const reader = body.getReader();;) {
    const { value, done } = await reader.read().catch(error => {
      throw error.name === "AbortError" ? error : new ServerError("the connection to the server broke");
    });
    if (done) throw new ServerError("the connection ended before the answer was complete");
    const lines = (held + decoder.decode(value, { stream: true })).split(/\r?\n/);
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new ServerError(found.error.message);
      yield found;
    }
  }
}

/** The cards of the models that the server has. */
export async function models() {
  return (await (await ask("v1/models")).json()).data;
}

const templates = new Map();

/** How a model can reason: whether it can be turned on and off, and whether it knows efforts. */
export async function reasoningOf(model) {
  if (!templates.get(model)) {  // It is empty until the model is loaded.
    const answer = await ask(`props?model=${encodeURIComponent(model)}`);
    templates.set(model, String((await answer.json()).chat_template ?? ""));
  }
  return switches(templates.get(model));
}

/** The switches that a chat template reads. */
export function switches(template) {
  const code = (template.match(/\{[{%][\s\S]*?[%}]\}/g) ?? []).join("\n");
  const reads = names => new RegExp(`(?<![.\\w"'])(?:${names})(?![\\w"'])`).test(code);
  return {
    toggle: reads("enable_thinking|enable_reasoning|thinking_mode|thinking|reasoning"),
    effort: reads("reasoning_effort|thinking_effort"),
  };
}
