// Conversations in the browser: IndexedDB, or memory where the browser refuses it.
//
// Two stores: `conversations` by id, and `summaries` {id, title, updated} for the list, which needs no messages.

import { notice } from "./dom.js";
import { isOwn, takeTitle } from "./tree.js";

const summaryOf = ({ id, title, updated }) => ({ id, title, updated });
const latestFirst = (a, b) => b.updated - a.updated;

/** A request or transaction as a promise. */
function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = request.oncomplete = () => resolve(request.result);
    request.onerror = request.onabort = () => reject(request.error ?? new DOMException("aborted", "AbortError"));
  });
}

function opened() {
  const request = indexedDB.open("nybble", 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("conversations", { keyPath: "id" });
    request.result.createObjectStore("summaries", { keyPath: "id" });
  };
  return settled(request);
}

class Kept {
  constructor(database) {
    this.isKept = true;
    this.database = database;
    database.onversionchange = () => database.close();  // A later version of the page is open in another tab.
    this.known = new Set();
    this.tabs = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel("nybble");
  }

  /** Calls back when another tab has changed something. */
  onchange(callback) {
    if (this.tabs) this.tabs.onmessage = callback;
  }

  /** Whether a conversation that was kept exists no longer. */
  async isDeleted(id) { return this.known.has(id) && await this.get(id) === undefined; }

  async list() {
    return (await settled(this.database.transaction("summaries").objectStore("summaries").getAll())).sort(latestFirst);
  }

  async get(id) {
    const found = await settled(this.database.transaction("conversations").objectStore("conversations").get(id));
    if (found) this.known.add(id);
    return found;
  }

  all() { return settled(this.database.transaction("conversations").objectStore("conversations").getAll()); }

  /**
   * Keeps a conversation, together with what another tab has changed in it, unless it was deleted. Returns whether it
   * has taken something from another tab. With `isQuiet`, other tabs do not read it again.
   */
  async put(conversation, isQuiet = false) {
    let hasTaken = false;
    await this.change((full, summaries, attempt) => {
      full.get(conversation.id).onsuccess = ({ target }) => attempt(() => {
        if (!target.result && this.known.has(conversation.id)) return;
        if (target.result) hasTaken = merge(conversation, target.result);
        full.put(conversation);
        summaries.put(summaryOf(conversation));
      });
    }, isQuiet);
    this.known.add(conversation.id);
    return hasTaken;
  }

  /** Keeps a conversation when the page is closed, which leaves no time to read what another tab has kept. */
  putAtOnce(conversation) {
    return this.change((full, summaries) => {
      full.put(conversation);
      summaries.put(summaryOf(conversation));
      full.transaction.commit();
    });
  }

  putNew(conversations) {
    return this.change((full, summaries) => {
      for (const each of conversations) {
        full.put(each);
        summaries.put(summaryOf(each));
      }
    });
  }

  async remove(id) {
    await this.change((full, summaries) => { full.delete(id); summaries.delete(id); });
  }

  async clear() {
    await this.change((full, summaries) => { full.clear(); summaries.clear(); });
  }

  /** All of a change, or nothing of it. `work` wraps what it does later in `attempt`. */
  async change(work, isQuiet = false) {
    const transaction = this.database.transaction(["conversations", "summaries"], "readwrite");
    let fault = null;
    const attempt = action => {
      try {
        action();
      } catch (error) {
        fault = error;
        transaction.abort();
      }
    };
    const done = settled(transaction);
    attempt(() => work(transaction.objectStore("conversations"), transaction.objectStore("summaries"), attempt));
    await done.catch(error => { throw fault ?? error; });
    if (!isQuiet) this.tabs?.postMessage("changed");
  }
}

/** Takes from a kept conversation what this tab does not have. Returns whether there was something. */
function merge(conversation, kept) {
  const own = new Map(conversation.nodes.map(node => [node.id, node]));
  const parents = new Set(kept.nodes.map(node => node.parent));
  let hasTaken = takeTitle(conversation, kept);
  for (const node of kept.nodes) {
    const ours = own.get(node.id);
    if (!ours) {
      // An answer without content that nothing follows may be one that was replaced here.
      if (!node.content && !node.files && !parents.has(node.id)) continue;
      conversation.nodes.push(node);
      hasTaken = true;
    } else if (!isOwn(ours) || (node.end && !ours.end)) {
      // This tab has read the message earlier, maybe while another one was still writing it.
      hasTaken ||= ours.content !== node.content || ours.end !== node.end;
      Object.assign(ours, node);
    }
  }
  conversation.updated = Math.max(conversation.updated, kept.updated);
  return hasTaken;
}

class InMemory {
  constructor() {
    this.isKept = false;
    this.found = new Map();
  }

  onchange() {}
  async isDeleted() { return false; }
  async list() { return [...this.found.values()].map(summaryOf).sort(latestFirst); }
  async get(id) { return this.found.get(id); }
  async all() { return [...this.found.values()]; }
  async put(conversation) { this.found.set(conversation.id, conversation); return false; }
  async putAtOnce() {}
  async putNew(conversations) { for (const each of conversations) this.found.set(each.id, each); }
  async remove(id) { this.found.delete(id); }
  async clear() { this.found.clear(); }
}

/** The conversations that this browser keeps. */
export async function openStore() {
  try {
    return new Kept(await opened());
  } catch {
    return new InMemory();
  }
}

/** What to tell a person when the browser could not store or read something; `result` says what follows. */
export function explain(error, result = "") {
  const lead = error.name === "QuotaExceededError"
    ? "The browser has no space left for conversations. Export conversations, then delete some."
    : `The browser's storage failed: ${(error.message || error.name).replace(/\.+$/, "")}.`;
  return [lead, result].filter(Boolean).join(" ");
}

/** The result of an action on the store. If the action fails, a notice says why, and the result is `undefined`. */
export async function attempted(action, result = "") {
  try {
    return await action();
  } catch (error) {
    notice(explain(error, result));
  }
}
