// A conversation as a tree of messages. Editing a message or asking again adds a branch; `chosen` says which is shown.
//
// {id, title, renamed, created, updated, model, nodes: [{id, parent, role, content, ...}], chosen: {parent: child}}
// `renamed` is the time of the last rename, or 0; earlier versions kept true or false.
// A node of the role "user" may have `files` [{name, text}]; one of "assistant" `reasoning`, `model`, `stats`, `end`
// and `error`. A parent precedes its children in `nodes`; the parent of first messages is null.

const ROOT = "";

/** Characters of a title, at most. */
export const MAX_TITLE = 120;

/** A conversation without messages. */
export function newConversation(model) {
  const now = Date.now();
  return { id: newId(), title: "", renamed: 0, created: now, updated: now, model, nodes: [], chosen: {} };
}

/** An id. `crypto.randomUUID` exists on secure origins only, and a server in the local network may have another. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("");
}

const own = new WeakSet();

/** Whether this tab has written a message. The others come from the store. */
export const isOwn = node => own.has(node);

/** Gives a conversation a title of a person. */
export function rename(conversation, title) {
  conversation.title = title;
  conversation.renamed = Math.max(Date.now(), Number(conversation.renamed) + 1);
}

/** Takes the title of another copy of a conversation if it is newer. Returns whether it was. */
export function takeTitle(conversation, other) {
  if (!(Number(other.renamed) > Number(conversation.renamed))) return false;
  conversation.title = other.title;
  conversation.renamed = other.renamed;
  return true;
}

/** Adds a message after another, and shows it. */
export function add(conversation, parent, fields) {
  const node = { id: newId(), parent, created: Date.now(), ...fields };
  own.add(node);
  conversation.nodes.push(node);
  choose(conversation, node);
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node);
  return node;
}

/** Removes a message that no other follows. */
export function drop(conversation, node) {
  conversation.nodes = conversation.nodes.filter(each => each !== node);
  const last = siblings(conversation, node).at(-1);
  if (last) choose(conversation, last);
  else delete conversation.chosen[node.parent ?? ROOT];
}

/** Shows the branch of a message. */
export function choose(conversation, node) {
  conversation.chosen[node.parent ?? ROOT] = node.id;
  conversation.updated = Date.now();
}

/** The messages that follow the same one, oldest first. */
export function siblings(conversation, node) {
  return conversation.nodes.filter(each => each.parent === node.parent);
}

/** The messages that are shown, first to last. */
export const path = conversation => branches(conversation).map(({ shown }) => shown);

/** For each message that is shown, first to last: {shown, options}, the message and those that follow the same one. */
export function branches(conversation) {
  const children = byParent(conversation.nodes);
  const found = [];
  for (let key = ROOT; children.has(key);) {
    const options = children.get(key), chosen = conversation.chosen[key];
    const node = options.find(each => each.id === chosen) ?? options.at(-1);
    found.push({ shown: node, options });
    key = node.id;
  }
  return found;
}

function byParent(nodes) {
  const found = new Map();
  for (const node of nodes) {
    const key = node.parent ?? ROOT;
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(node);
  }
  return found;
}

/** What the model receives for a message: its text and its files. */
export function contentOf(node) {
  const files = (node.files ?? []).map(({ name, text }) => {
    const longest = Math.max(2, ...(text.match(/`+/g) ?? []).map(run => run.length));
    const fence = "`".repeat(longest + 1);
    return `File ${name}:\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
  });
  return [node.content, ...files].filter(Boolean).join("\n\n");
}

/** The messages of a request whose answer follows `last`. Questions without an answer between them become one: templates need turns. */
export function requestMessages(conversation, last, system) {
  const byId = new Map(conversation.nodes.map(node => [node.id, node]));
  const line = [];
  for (let node = last; node; node = byId.get(node.parent)) line.push(node);
  const messages = [];
  for (const node of line.reverse()) {
    if (node.role === "user") {
      const before = messages.at(-1)?.role === "user" ? messages.pop().content : "";
      messages.push({ role: "user", content: [before, contentOf(node)].filter(Boolean).join("\n\n") });
    } else if (node.content) {
      messages.push({ role: "assistant", content: node.content, ...(node.reasoning ? { reasoning_content: node.reasoning } : {}) });
    }
  }
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** A title from the first message. */
export function titleOf(node) {
  const text = (node.content || node.files?.[0]?.name || "").trim().split("\n")[0];
  return shortened(text, 60);
}

/** A text of at most this many UTF-16 units, with an ellipsis if it was longer. */
function shortened(text, most) {
  return text.length > most ? `${text.slice(0, most - 1).replace(/[\ud800-\udbff]$/, "").trimEnd()}…` : text;
}

const FORMAT = "nybble-conversations";

/** Conversations as JSON for a file. */
export function toFile(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, exported: new Date().toISOString(), conversations }, null, 1);
}

/** The conversations of a file. Throws an error that says what is wrong and where. */
export function fromFile(text) {
  let parsed;
  try { parsed = JSON.parse(text); } catch { throw new Error("the file is not valid JSON"); }
  if (parsed?.format !== FORMAT) throw new Error(`the file has no conversations of this page: format must be "${FORMAT}"`);
  if (parsed.version !== 1) throw new Error(`version: found ${JSON.stringify(parsed.version)}, expected 1`);
  if (!Array.isArray(parsed.conversations)) throw new Error("conversations: expected a list");
  return parsed.conversations.map((each, index) => checkedConversation(each, `conversations[${index}]`));
}

/** A copy with the known fields alone. */
function checkedConversation(given, where) {
  const field = reader(given, where);
  const conversation = {
    id: field("id", NAME), title: shortened(field("title", TEXT), MAX_TITLE), renamed: TIME.is(given.renamed) ? given.renamed : Number(given.renamed === true),
    created: field("created", TIME), updated: field("updated", TIME), model: field("model", TEXT),
    nodes: [], chosen: {},
  };
  const nodes = new Map();
  for (const [index, each] of field("nodes", LIST).entries()) {
    const place = `${where}.nodes[${index}]`, node = checkedNode(each, place);
    if (nodes.has(node.id)) throw new Error(`${place}.id: ${JSON.stringify(node.id)} occurs twice`);
    if (node.parent !== null && !nodes.has(node.parent)) throw new Error(`${place}.parent: ${JSON.stringify(node.parent)} is not an earlier message`);
    if ((nodes.get(node.parent)?.role ?? "assistant") === node.role) throw new Error(`${place}.role: a message of the role ${node.role} cannot follow one of the same role`);
    nodes.set(node.id, node);
    conversation.nodes.push(node);
  }
  for (const [parent, child] of Object.entries(field("chosen", OBJECT))) {
    const node = nodes.get(child);
    if (!node || (node.parent ?? ROOT) !== parent) throw new Error(`${where}.chosen: ${JSON.stringify(child)} does not follow ${JSON.stringify(parent)}`);
    conversation.chosen[parent] = child;
  }
  return conversation;
}

function checkedNode(given, where) {
  const field = reader(given, where);
  const node = {
    id: field("id", NAME), parent: field("parent", PARENT),
    created: field("created", TIME), role: field("role", ROLE),
    content: field("content", TEXT),
  };
  for (const name of ["reasoning", "model", "end", "error"]) if (given[name] != null) node[name] = field(name, TEXT);
  if (given.files != null) {
    node.files = field("files", LIST).map((file, index) => {
      const part = reader(file, `${where}.files[${index}]`);
      return { name: part("name", TEXT), text: part("text", TEXT) };
    });
  }
  if (given.stats != null) {
    const part = reader(given.stats, `${where}.stats`);
    node.stats = Object.fromEntries(["tokens", "speed", "first"].map(name => [name, part(name, NUMBER)]));
  }
  return node;
}

/** Reads the fields of an object of a file, and throws an error that says where one is wrong. */
function reader(given, where) {
  if (!OBJECT.is(given)) throw new Error(`${where}: expected an object`);
  return (name, { is, expected }) => {
    const value = given[name];
    if (is(value)) return value;
    const found = value === undefined ? "missing" : `found ${shortened(JSON.stringify(value), 80)}`;
    throw new Error(`${where}.${name}: ${found}, expected ${expected}`);
  };
}

const isName = value => typeof value === "string" && /^[\w-]{1,64}$/.test(value) && value !== "__proto__";
const NAME = { expected: "an id of up to 64 characters: A-Z, a-z, 0-9, - and _", is: isName };
const PARENT = { expected: "the id of a message or null", is: value => value === null || isName(value) };
const TEXT = { expected: "a string", is: value => typeof value === "string" };
const LIST = { expected: "a list", is: Array.isArray };
const OBJECT = { expected: "an object", is: value => typeof value === "object" && value !== null && !Array.isArray(value) };
const ROLE = { expected: '"user" or "assistant"', is: value => value === "user" || value === "assistant" };
const NUMBER = { expected: "a number of 0 or more", is: value => Number.isFinite(value) && value >= 0 };
const TIME = { expected: "milliseconds since 1970", is: value => Number.isFinite(value) && value >= 0 && value < 8.64e15 };
