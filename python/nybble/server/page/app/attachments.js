// Text files that go with a message, as chips above the composer.

import { $, announce, icon, iconButton, make, notice } from "./dom.js";

/** Bytes of a file, and files of a message. */
const MAX_BYTES = 256 * 1024, MAX_FILES = 8;

let files = [], changed = () => {};

/** Connects the button and dropped files. `callback` runs when the files change. */
export function connectAttachments(callback) {
  changed = callback;
  $("attach").onclick = () => $("files").click();
  $("files").onchange = async () => {
    await attach([...$("files").files]);
    $("files").value = "";
    $("prompt").focus();
  };
  const form = $("form");
  document.addEventListener("dragover", event => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    form.classList.add("dropping");
  });
  document.addEventListener("dragleave", event => { if (!event.relatedTarget) form.classList.remove("dropping"); });
  document.addEventListener("drop", event => {
    form.classList.remove("dropping");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    attach([...event.dataTransfer.files]);
  });
}

/** The attached files [{name, text}], which the composer no longer has afterwards. */
export function takeFiles() {
  const taken = files;
  files = [];
  show();
  return taken;
}

export const hasFiles = () => files.length > 0;

/** Attaches files, or says why one cannot be attached. */
async function attach(chosen) {
  const faults = [];
  for (const file of chosen) {
    try {
      if (files.length >= MAX_FILES) throw new Error(`a message takes at most ${MAX_FILES} files`);
      files.push({ name: file.name, text: await textOf(file) });
      announce(`${file.name} attached`);
    } catch (error) {
      faults.push(`${file.name}: ${error.message}`);
    }
  }
  if (faults.length) notice(faults.join("; "));
  show();
}

async function textOf(file) {
  if (file.size > MAX_BYTES) throw new Error(`${size(file.size)}, expected at most ${size(MAX_BYTES)}`);
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch (error) {
    throw new Error(error instanceof TypeError ? "not a text file in UTF-8" : "cannot be read");
  }
  if (text.includes("\0")) throw new Error("not a text file");
  return text.replace(/\r\n?/g, "\n");
}

const size = bytes => (bytes < 1024 ? `${bytes} bytes` : `${Math.ceil(bytes / 1024).toLocaleString("en")} KiB`);

/** A file as a chip; with `remove`, it has a button. */
export function chip(file, remove) {
  const bytes = new TextEncoder().encode(file.text).length;
  const label = make("span", { class: "chip-name", title: file.name }, file.name);
  const shown = make("span", { class: "chip" }, icon("file"), label, make("span", { class: "chip-size" }, size(bytes)));
  if (remove) shown.append(iconButton("close", `Remove ${file.name}`, remove));
  return shown;
}

function show() {
  $("chips").replaceChildren(...files.map(file => chip(file, () => {
    files = files.filter(each => each !== file);
    show();
    $("prompt").focus();
  })));
  $("chips").hidden = files.length === 0;
  changed();
}
