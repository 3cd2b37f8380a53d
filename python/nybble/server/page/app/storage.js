// Conversations in the browser: IndexedDB, or memory where the browser refuses it.
//
// Two stores: `conversations` by id, and `summaries` {id, title, updated} for the list, which needs no messages.

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

  /** Keeps a conversation, together with the messages that another tab has added to it. */
  async put(conversation) {
    await this.change((full, summaries, attempt) => {
      full.get(conversation.id).onsuccess = ({ target }) => attempt(() => {
        const known = target.result?.nodes ?? [], parents = new Set(known.map(node => node.parent));
        const own = new Set(conversation.nodes.map(node => node.id));
        // An answer without content that nothing follows may be one that was replaced here.
        const isWanted = node => !own.has(node.id) && (node.content || node.files || parents.has(node.id));
        conversation.nodes.push(...known.filter(isWanted));
        full.put(conversation);
        summaries.put(summaryOf(conversation));
      });
    });
    this.known.add(conversation.id);
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
    this.known.delete(id);
    await this.change((full, summaries) => { full.delete(id); summaries.delete(id); });
  }

  async clear() {
    this.known.clear();
    await this.change((full, summaries) => { full.clear(); summaries.clear(); });
  }

  /** All of a change, or nothing of it. `work` wraps what it does later in `attempt`. */
  async change(work) {
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
    this.tabs?.postMessage("changed");
  }
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
  async put(conversation) { this.found.set(conversation.id, conversation); }
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

/** What to tell a person when a conversation could not be kept. */
export function explain(error) {
  return error.name === "QuotaExceededError"
    ? "The browser has no space left, so this conversation is not kept. Export conversations, then delete some."
    : `This conversation could not be kept in the browser: ${error.message || error.name}.`;
}
