// Markdown to elements. What a model writes is untrusted: raw HTML is shown as text, the sanitizer allows only a few
// tags and attributes, and the page's policy forbids scripts, foreign images and frames in any case.

import { copyText, make, textButton } from "./dom.js";

const { Lexer, Marked } = globalThis.marked;
const { DOMPurify, hljs } = globalThis;

const BARE_TAG = /^<\/?(?:br|sub|sup|kbd|b|i|em|strong|u|s|del|mark|small)\s*\/?>$/i;
const SANITIZER = {
  ALLOWED_TAGS: [
    "a", "b", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "i", "kbd", "li", "mark", "ol",
    "p", "pre", "s", "small", "span", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "u", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],  // The pattern would apply to these, too.
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
/** Longer code is not highlighted, which takes time. */
const MAX_HIGHLIGHTED = 20_000;
/** Code with a longer line is not highlighted: some grammars take quadratic time for a line. */
const LONG_LINE = /[^\n]{1001}/;
/** A longer code block that is still being written is extended, not parsed again. */
const LONG_CODE = 4_000;

/** Longer paragraphs are shown without emphasis and links, because finding them can take quadratic time. */
const MAX_INLINE = 4_000;
/** Larger tables are shown as text. */
const MAX_CELLS = 20_000;
/** Tables of more cells are shown as text if most cells are missing. The parser adds them: a row of one takes the width of the head. */
const MAX_PADDED_CELLS = 400;
/** A longer text is shown as it is. */
const MAX_TEXT = 1_000_000;

const escaped = text => text.replace(/[&<>"']/g, found => `&#${found.charCodeAt(0)};`);

const parser = new Marked({
  gfm: true,
  breaks: true,
  tokenizer: {
    /** Looks for a table only if it is small enough: `undefined` means none, and `false` the parser's own way. */
    table(text) {
      const [raw, , columns, rows] = this.rules.block.table.exec(text) ?? [];
      if (!rows) return false;
      const cells = columns.split("|").length * rows.split("\n").length;
      return cells > MAX_CELLS || (cells > MAX_PADDED_CELLS && cells > raw.length) ? undefined : false;
    },
  },
  renderer: {
    html({ text, block }) {
      if (BARE_TAG.test(text.trim())) return text;
      return block ? `<p class="raw">${escaped(text.replace(/\n+$/, ""))}</p>` : escaped(text);
    },
    heading({ tokens, depth }) {
      const level = Math.min(depth + 2, 6);  // The page's own headings come first.
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    // Loading an image would tell its host about the reader.
    image({ href, text }) {
      const name = escaped(`Image: ${text || href}`);
      return /^https?:\/\//i.test(href) ? `<a href="${escaped(href)}">${name}</a>` : name;
    },
    checkbox: ({ checked }) => (checked ? "\u2611 " : "\u2610 "),
  },
});

class BoundedLexer extends Lexer {
  inlineTokens(text, tokens = []) {
    if (text.length <= MAX_INLINE) return super.inlineTokens(text, tokens);
    tokens.push({ type: "text", raw: text, text, escaped: false });
    return tokens;
  }
}

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class" && !/^(?:raw|language-[\w.+#-]{1,40}|hljs-[\w -]{1,60})$/.test(data.attrValue)) {
    data.keepAttr = false;
  }
});
DOMPurify.addHook("afterSanitizeAttributes", node => {
  if (node.localName === "a" && node.hasAttribute("href")) {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

/** The elements of a text that is complete. */
export function render(text) {
  const element = make("div");
  new Markdown(element).update(text, true);
  return [...element.childNodes];
}

/** A text that grows within an element. Blocks that cannot change any more are not touched again. */
export class Markdown {
  constructor(element) {
    this.element = element;
    this.done = 0;  // Characters of the blocks that cannot change.
    this.tail = [];  // The blocks behind: {raw, nodes}.
    this.code = null;  // A long code block without its end: {fence, node, read}.
  }

  /** Shows a text that begins with the one shown before. */
  update(text, isComplete = false) {
    if (this.code && !isComplete && this.extendCode(text)) return;
    this.code = null;
    // A definition of a link may concern blocks before it.
    if (isComplete && this.done && /^ {0,3}\[[^\]\n]+\]:/m.test(text)) {
      this.element.replaceChildren();
      this.done = 0;
      this.tail = [];
    }
    const rest = text.slice(this.done), tokens = lex(rest);
    const blocks = tokens.filter(token => token.type !== "space");
    this.show(blocks);
    if (tokens.reduce((sum, token) => sum + token.raw.length, 0) !== rest.length) return;
    // The last line may be incomplete, so the last two blocks can still become one.
    for (const last = blocks.at(-2); last && tokens[0] !== last; tokens.shift()) {
      this.done += tokens[0].raw.length;
      if (tokens[0].type !== "space") this.tail.shift();
    }
    if (!isComplete) this.code = this.openCode(blocks.at(-1), text);
  }

  /** Shows the blocks behind those that are done, and keeps the elements of equal ones. */
  show(blocks) {
    const same = blocks.findIndex((block, index) => block.raw !== this.tail[index]?.raw);
    const first = same < 0 ? blocks.length : same;
    for (const { nodes } of this.tail.splice(first)) nodes.forEach(node => node.remove());
    for (const block of blocks.slice(first)) {
      const nodes = nodesOf([block]);
      this.element.append(...nodes);
      this.tail.push({ raw: block.raw, nodes });
    }
  }

  openCode(block, text) {
    const fence = block?.type === "code" && block.raw.match(/^(?:`{3,}|~{3,})/)?.[0];
    if (!fence || block.text.length < LONG_CODE || closes(block.raw.slice(block.raw.indexOf("\n")), fence)) return null;
    const code = this.tail.at(-1).nodes[0]?.querySelector?.("code"), shown = code?.textContent;
    const written = block.raw.slice(block.raw.indexOf("\n") + 1);
    if (!code || !written.startsWith(shown)) return null;
    const node = document.createTextNode(written.slice(shown.length));
    code.append(node);
    return { fence, node, read: text.length };
  }

  extendCode(text) {
    const { fence, node, read } = this.code;
    // The fence may have begun in what was read.
    if (closes(text.slice(text.lastIndexOf("\n", read - 1)), fence)) return false;
    node.appendData(text.slice(read));
    this.code.read = text.length;
    return true;
  }
}

/** Whether a line of this text, after its first line break, closes a block of code. */
function closes(text, fence) {
  return new RegExp(`\\n {0,3}${fence[0]}{${fence.length},}[ \\t]*(?:\\n|$)`).test(text);
}

function lex(text) {
  try {
    if (text.length > MAX_TEXT) throw new RangeError();
    return new BoundedLexer(parser.defaults).lex(text);
  } catch {  // Too long, or nested too deeply.
    return [{ type: "text", raw: text, text, plain: true }];
  }
}

function nodesOf(tokens) {
  let fragment;
  try {
    if (tokens[0].plain) throw new RangeError();
    fragment = DOMPurify.sanitize(parser.parser(tokens), SANITIZER);
  } catch {
    return [make("p", { class: "raw" }, tokens.map(token => token.raw).join(""))];
  }
  for (const code of fragment.querySelectorAll("pre > code")) {
    const language = code.className.replace("language-", "");
    code.parentElement.replaceWith(codeBlock(language, code.textContent.replace(/\n$/, "")));
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(box);
    box.append(table);
  }
  return [...fragment.childNodes].filter(node => node.nodeType === Node.ELEMENT_NODE || node.textContent.trim());
}

function codeBlock(language, text) {
  const code = make("code", {}, ...highlighted(language, text));
  const copy = textButton("Copy", () => copyText(code.textContent, copy));
  copy.setAttribute("aria-label", "Copy code");
  return make("div", { class: "block" },
    make("div", {}, make("span", {}, language || "code"), copy),
    make("pre", { tabindex: "0" }, code));
}

function highlighted(language, text) {
  if (!language || text.length > MAX_HIGHLIGHTED || LONG_LINE.test(text) || !hljs.getLanguage(language)) return [text];
  const { value } = hljs.highlight(text, { language, ignoreIllegals: true });
  return [DOMPurify.sanitize(value, SANITIZER)];
}
