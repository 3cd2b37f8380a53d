// Elements, icons, dialogs, and small values that the browser keeps.

export const $ = id => document.getElementById(id);

/** An element. Strings among its children become text, never markup. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** An icon of the sprite in index.html. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg"), use = document.createElementNS(space, "use");
  picture.setAttribute("class", "line-art");
  picture.setAttribute("viewBox", "0 0 24 24");
  picture.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  picture.append(use);
  return picture;
}

/** A button with an icon, whose name assistive technology reads. */
export function iconButton(name, label, onclick) {
  const button = make("button", { class: "icon small-icon", type: "button", title: label, "aria-label": label }, icon(name));
  button.onclick = onclick;
  return button;
}

/** A button with a short text. */
export function textButton(text, onclick, kind = "small") {
  const button = make("button", { class: kind, type: "button" }, text);
  button.onclick = onclick;
  return button;
}

/** A number with its noun. */
export const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** Whether a key belongs to an input method, which composes a character. Safari has only the code. */
export const isComposing = event => event.isComposing || event.keyCode === 229;

/** Copies a text and says so on the button for a moment. */
export async function copyText(text, button) {
  const before = button.dataset.name ?? button.textContent;
  button.dataset.name = before;
  const isCopied = await navigator.clipboard?.writeText(text).then(() => true, () => false) || copiedByCommand(text);
  button.textContent = isCopied ? "Copied" : "Not allowed";
  announce(isCopied ? "Copied" : "The browser does not allow copying");
  setTimeout(() => { button.textContent = before; }, 1500);
}

/** Copies a text without `navigator.clipboard`, which exists on secure origins only. */
function copiedByCommand(text) {
  const focused = document.activeElement, field = make("textarea", { class: "unseen", readonly: "" });
  field.value = text;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isCopied;
}

/** Tells users of screen readers what has happened. */
export function announce(text) { $("status").textContent = text; }

/** Shows a message above the composer until it is closed. */
export function notice(text) {
  $("notice-text").textContent = text;
  $("notice").hidden = false;
}

/** Asks in a dialog; true if the person agrees. */
export function confirmed(question, verb) {
  const dialog = $("confirm");
  $("confirm-text").textContent = question;
  $("confirm-yes").textContent = verb;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise(resolve => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Small values by name. A browser may refuse storage; then values last as long as the page. */
const memory = new Map();
export const kept = {
  get(name, where = () => localStorage) {
    try { return where().getItem(name) ?? memory.get(name) ?? null; } catch { return memory.get(name) ?? null; }
  },
  set(name, value, where = () => localStorage) {
    memory.set(name, value);
    try { where().setItem(name, value); } catch { /* It remains in memory. */ }
  },
};
