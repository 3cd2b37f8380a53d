// The list of conversations: open, rename, delete, export and import.

import { $, announce, confirmed, counted, iconButton, isComposing, kept, make, notice } from "./dom.js";
import { attempted, explain } from "./storage.js";
import { fromFile, MAX_TITLE, newId, toFile } from "./tree.js";

const wide = matchMedia("(min-width: 60rem)");
/** Bytes of a file to import, which is read at once. */
const MAX_IMPORT = 200 * 1024 * 1024;

/** The list. `actions` has `open(id)`, `rename(id, title)`, `removed(id)`, where null stands for all, and `imported()`. */
export class Sidebar {
  constructor(store, actions) {
    this.store = store;
    this.actions = actions;
    this.rows = new Map();
    this.panel = $("sidebar");
    $("menu").onclick = () => (this.panel.open ? this.close(true) : this.open(true));
    $("sidebar-close").onclick = () => this.close(true);
    this.panel.onclick = event => { if (event.target === this.panel && !wide.matches) this.close(); };
    this.panel.addEventListener("close", () => this.showState());
    $("export").onclick = () => this.export();
    $("import").onclick = () => $("import-file").click();
    $("import-file").onchange = () => this.import();
    $("delete-all").onclick = () => this.removeAll();
    $("storage").textContent = store.isKept
      ? "Kept in this browser only."
      : "This browser keeps nothing: conversations last until the page is closed.";
    wide.addEventListener("change", () => this.fit());
    this.fit();
  }

  /** Next to the conversation where there is space, above it elsewhere. */
  fit() {
    this.panel.close();
    if (wide.matches && kept.get("nybble.sidebar") !== "closed") this.panel.open = true;
    this.showState();
  }

  open(byHand) {
    if (wide.matches) {
      this.panel.open = true;
      if (byHand) kept.set("nybble.sidebar", "open");
    } else {
      this.panel.showModal();
    }
    this.showState();
  }

  close(byHand) {
    this.panel.close();
    if (byHand && wide.matches) kept.set("nybble.sidebar", "closed");
    this.showState();
  }

  showState() { $("menu").setAttribute("aria-expanded", String(this.panel.open)); }

  /** Shows the list, with the conversation that is open marked. */
  async show(current = this.current) {
    this.current = current;
    const found = await attempted(() => this.store.list());
    if (!found || this.panel.querySelector(".rename")) return;  // Typing must not be interrupted.
    const focused = document.activeElement, rows = new Map(), list = $("conversations");
    for (const each of found) {
      const before = this.rows.get(each.id);
      rows.set(each.id, before?.dataset.title === each.title ? before : this.row(each));
    }
    this.rows = rows;
    const wanted = new Set(rows.values());
    for (const row of [...list.children]) if (!wanted.has(row)) row.remove();
    [...wanted].forEach((row, index) => {
      if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
    });
    for (const [id, row] of rows) {
      if (id === current) row.firstChild.setAttribute("aria-current", "true");
      else row.firstChild.removeAttribute("aria-current");
    }
    if (focused !== document.activeElement && list.contains(focused)) focused.focus();  // Its row has moved.
    $("no-conversations").hidden = found.length > 0;
    for (const name of ["export", "delete-all"]) $(name).disabled = found.length === 0;
  }

  row({ id, title }) {
    const name = title || "Untitled";
    const open = make("button", { class: "open-conversation", type: "button", title: name }, name);
    open.onclick = () => {
      if (!wide.matches) this.close();
      this.actions.open(id);
    };
    const row = make("li", { "data-title": title }, open,
      iconButton("pen", `Rename ${name}`, () => this.rename(row, id, title)),
      iconButton("bin", `Delete ${name}`, () => this.remove(id, name)));
    return row;
  }

  rename(row, id, title) {
    const field = make("input", { class: "box rename", "aria-label": "Title", maxlength: String(MAX_TITLE) });
    field.value = title;
    row.replaceChildren(field);
    this.rows.delete(id);  // The list gets a new row afterwards.
    let isOver = false;
    const end = async (isSaved, byKey = false) => {
      if (isOver) return;
      isOver = true;
      field.remove();
      if (isSaved && field.value.trim()) await this.actions.rename(id, field.value.trim());
      await this.show();
      if (byKey) this.rows.get(id)?.children[1].focus();
    };
    field.onblur = () => end(true);
    field.onkeydown = event => {
      if (isComposing(event)) return;
      if (event.key === "Escape") event.preventDefault();  // It would close the panel.
      if (event.key === "Escape" || event.key === "Enter") { event.stopPropagation(); end(event.key === "Enter", true); }
    };
    field.focus();
    field.select();
  }

  async remove(id, name) {
    if (!await confirmed(`Delete “${name}”? This cannot be undone.`, "Delete")) return;
    if (!await attempted(() => this.store.remove(id).then(() => true))) return;
    const place = [...this.rows.keys()].indexOf(id);
    announce(`${name} deleted`);
    this.actions.removed(id);
    await this.show();
    this.focusRow(place);
  }

  /** Moves a focus that was lost to the row at a place, or to the last one. */
  focusRow(place) {
    if (document.activeElement !== document.body) return;
    const rows = [...this.rows.values()];
    (rows[place] ?? rows.at(-1))?.firstChild.focus();
    if (document.activeElement === document.body) $("sidebar-close").focus();
  }

  async removeAll() {
    if (!await confirmed("Delete all conversations? This cannot be undone.", "Delete all")) return;
    if (!await attempted(() => this.store.clear().then(() => true))) return;
    announce("All conversations deleted");
    this.actions.removed(null);
    await this.show();
    this.focusRow(0);
  }

  async export() {
    const all = await attempted(() => this.store.all());
    if (!all) return;
    const text = toFile(all);
    const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    const link = make("a", { href: address, download: `nybble-conversations-${new Date().toISOString().slice(0, 10)}.json` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  }

  /** Adds the conversations of a file. One that exists already with other content becomes a copy. */
  async import() {
    const [file] = $("import-file").files;
    $("import-file").value = "";
    if (!file) return;
    try {
      if (file.size > MAX_IMPORT) throw new Error("the file is larger than 200 MiB");
      const read = fromFile(await file.text()), added = [];
      for (const each of read) {
        const own = await this.store.get(each.id);
        if (own && JSON.stringify(fromFile(toFile([own]))[0].nodes) === JSON.stringify(each.nodes)) continue;
        added.push(own || added.some(({ id }) => id === each.id) ? { ...each, id: newId() } : each);
      }
      if (added.length) await this.store.putNew(added);
      notice(`${file.name}: ${importedText(added.length, read.length - added.length)}.`);
    } catch (error) {
      notice(error instanceof DOMException ? explain(error) : `${file.name}: ${error.message}.`);
    }
    await this.show();
  }
}

/** What an import has done, in words. */
function importedText(added, existing) {
  if (!added && !existing) return "the file has no conversations";
  const others = existing && `${existing} already ${existing === 1 ? "exists" : "exist"}`;
  return [`${added ? counted(added, "conversation") : "no conversation"} imported`, others].filter(Boolean).join("; ");
}
