// A conversation as a tree of messages. Editing a message or asking again adds a branch; `chosen` says which is shown.
//
// {id, title, renamed, created, updated, model, nodes: [{id, parent, role, content, ...}], chosen: {parent: child}}
// A node of the role "user" may have `files` [{name, text}]; one of "assistant" `reasoning`, `model`, `stats`, `end`
// and `error`. A parent precedes its children in `nodes`; the parent of first messages is null.

const ROOT = "";

/** A conversation without messages. */
export function newConversation(model) {
  const now = Date.now();
  return { id: newId(), title: "", renamed: false, created: now, updated: now, model, nodes: [], chosen: {} };
}

/** An id. `crypto.randomUUID` exists on secure origins only, and a server in the local network may have another. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("");
}

/** Adds a message after another, and shows it. */
export function add(conversation, parent, fields) {
  const node = { id: newId(), parent, created: Date.now(), ...fields };
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
export function path(conversation) {
  const children = byParent(conversation.nodes);
  const found = [];
  for (let key = ROOT; children.has(key);) {
    const options = children.get(key), chosen = conversation.chosen[key];
    const node = options.find(each => each.id === chosen) ?? options.at(-1);
    found.push(node);
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

/** The messages of a request whose answer follows `last`. A question without an answer is left out: templates need turns. */
export function requestMessages(conversation, last, system) {
  const byId = new Map(conversation.nodes.map(node => [node.id, node]));
  const line = [];
  for (let node = last; node; node = byId.get(node.parent)) line.unshift(node);
  const messages = [];
  for (const node of line) {
    if (node.role === "user") {
      if (messages.at(-1)?.role === "user") messages.pop();
      messages.push({ role: "user", content: contentOf(node) });
    } else if (node.content) {
      messages.push({ role: "assistant", content: node.content, ...(node.reasoning ? { reasoning_content: node.reasoning } : {}) });
    }
  }
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** A title from the first message. */
export function titleOf(node) {
  const text = (node.content || node.files?.[0]?.name || "").trim().split("\n")[0];
  return text.length > 60 ? `${text.slice(0, 59).trimEnd()}…` : text;
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
    id: field("id", isName), title: field("title", isText), renamed: Boolean(given.renamed),
    created: field("created", isTime), updated: field("updated", isTime), model: field("model", isText),
    nodes: [], chosen: {},
  };
  const roles = new Map([[null, "assistant"]]);
  for (const [index, each] of field("nodes", Array.isArray).entries()) {
    const place = `${where}.nodes[${index}]`, node = checkedNode(each, place);
    if (roles.has(node.id)) throw new Error(`${place}.id: ${JSON.stringify(node.id)} occurs twice`);
    if (!roles.has(node.parent)) throw new Error(`${place}.parent: ${JSON.stringify(node.parent)} is not an earlier message`);
    if (roles.get(node.parent) === node.role) throw new Error(`${place}.role: a message of the role ${node.role} cannot follow one of the same role`);
    roles.set(node.id, node.role);
    conversation.nodes.push(node);
  }
  for (const [parent, child] of Object.entries(field("chosen", isObject))) {
    const node = conversation.nodes.find(each => each.id === child);
    if ((node?.parent ?? ROOT) !== parent || !node) throw new Error(`${where}.chosen: ${JSON.stringify(child)} does not follow ${JSON.stringify(parent)}`);
    conversation.chosen[parent] = child;
  }
  return conversation;
}

function checkedNode(given, where) {
  const field = reader(given, where);
  const node = {
    id: field("id", isName), parent: field("parent", value => value === null || isName(value)),
    created: field("created", isTime), role: field("role", value => value === "user" || value === "assistant"),
    content: field("content", isText),
  };
  for (const name of ["reasoning", "model", "end", "error"]) if (given[name] != null) node[name] = field(name, isText);
  if (given.files != null) {
    node.files = field("files", Array.isArray).map((file, index) => {
      const part = reader(file, `${where}.files[${index}]`);
      return { name: part("name", isText), text: part("text", isText) };
    });
  }
  if (given.stats != null) {
    const part = reader(given.stats, `${where}.stats`);
    node.stats = Object.fromEntries(["tokens", "speed", "first"].map(name => [name, part(name, isNumber)]));
  }
  return node;
}

function reader(given, where) {
  if (!isObject(given)) throw new Error(`${where}: expected an object`);
  return (name, isRight) => {
    if (!isRight(given[name])) throw new Error(`${where}.${name}: found ${String(JSON.stringify(given[name])).slice(0, 80)}`);
    return given[name];
  };
}

const isObject = value => typeof value === "object" && value !== null && !Array.isArray(value);
const isText = value => typeof value === "string";
const isName = value => isText(value) && /^[\w-]{1,64}$/.test(value) && value !== "__proto__";
const isNumber = value => Number.isFinite(value) && value >= 0;
const isTime = value => Number.isFinite(value) && value >= 0 && value < 8.64e15;
