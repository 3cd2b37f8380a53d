// The list of conversations: open, rename, delete, export and import.

import { $, announce, confirmed, iconButton, kept, make, notice } from "./dom.js";
import { explain } from "./storage.js";
import { fromFile, newId, toFile } from "./tree.js";

const wide = matchMedia("(min-width: 60rem)");
/** Bytes of a file to import, which is read at once. */
const MAX_IMPORT = 200 * 1024 * 1024;

/** The list. `actions` has `open(id)`, `rename(id, title)`, `removed(id)`, where null stands for all, and `imported()`. */
export class Sidebar {
  constructor(store, actions) {
    this.store = store;
    this.actions = actions;
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
    const found = await this.store.list();
    if (this.panel.querySelector(".rename")) return;  // Typing must not be interrupted.
    $("conversations").replaceChildren(...found.map(each => this.row(each)));
    $("no-conversations").hidden = found.length > 0;
    for (const name of ["export", "delete-all"]) $(name).disabled = found.length === 0;
  }

  row({ id, title }) {
    const name = title || "Untitled";
    const open = make("button", { class: "open-conversation", type: "button", title: name }, name);
    if (id === this.current) open.setAttribute("aria-current", "true");
    open.onclick = () => {
      if (!wide.matches) this.close();
      this.actions.open(id);
    };
    const row = make("li", {}, open,
      iconButton("pen", `Rename ${name}`, () => this.rename(row, id, title)),
      iconButton("bin", `Delete ${name}`, () => this.remove(id, name)));
    return row;
  }

  rename(row, id, title) {
    const field = make("input", { class: "box rename", "aria-label": "Title", maxlength: "120" });
    field.value = title;
    row.replaceChildren(field);
    let isOver = false;
    const end = async isSaved => {
      if (isOver) return;
      isOver = true;
      field.remove();
      if (isSaved && field.value.trim()) await this.actions.rename(id, field.value.trim());
      await this.show();
    };
    field.onblur = () => end(true);
    field.onkeydown = event => {
      if (event.key === "Escape") event.preventDefault();  // It would close the panel.
      if (event.key === "Escape" || event.key === "Enter") { event.stopPropagation(); end(event.key === "Enter"); }
    };
    field.focus();
    field.select();
  }

  async remove(id, name) {
    if (!await confirmed(`Delete “${name}”? This cannot be undone.`, "Delete")) return;
    await this.store.remove(id);
    announce(`${name} deleted`);
    this.actions.removed(id);
    await this.show();
  }

  async removeAll() {
    if (!await confirmed("Delete all conversations? This cannot be undone.", "Delete all")) return;
    await this.store.clear();
    announce("All conversations deleted");
    this.actions.removed(null);
    await this.show();
  }

  async export() {
    const text = toFile(await this.store.all());
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
      notice(`${file.name}: ${added.length} of ${read.length} conversations imported${added.length < read.length ? "; the others exist already" : ""}.`);
    } catch (error) {
      notice(error instanceof DOMException ? explain(error) : `${file.name}: ${error.message}.`);
    }
    await this.show();
  }
}
