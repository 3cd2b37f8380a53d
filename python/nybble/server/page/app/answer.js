// One answer of the model: the request, its stream, and what is measured.

import { ask, events, ServerError } from "./api.js";

/** Share of the time that rendering may take while an answer is written. */
const RENDERING = 0.25;
/** Milliseconds between two views of an answer, at least. */
const PACE = 40;

/** Writes an answer into a message of a conversation. */
export class Answer {
  /** `ontoken` is called for each piece of the answer; `onprogress` when more can be shown, which never happens in a hidden tab. */
  constructor(conversation, node, ontoken, onprogress) {
    this.conversation = conversation;
    this.node = node;
    this.ontoken = ontoken;
    this.onprogress = onprogress;
    this.controller = new AbortController();
    this.timer = 0;
    this.wait = PACE;
  }

  stop() { this.controller.abort(); }

  /** Sends the request and follows the stream. Does not throw: the message keeps what went wrong. */
  async write(body) {
    const { node } = this;
    const began = performance.now();
    let first = 0, last = 0, tokens = 0, counted = 0;
    const measure = () => {
      const seconds = (last - first) / 1000, all = counted || tokens;
      node.stats = { tokens: all, speed: seconds > 0 && all > 1 ? (all - 1) / seconds : 0, first: first ? (first - began) / 1000 : 0 };
    };
    try {
      const reply = await ask("v1/chat/completions", {
        method: "POST",
        signal: this.controller.signal,
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      });
      for await (const chunk of events(reply.body)) {
        counted = chunk.usage?.completion_tokens ?? counted;
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        if (choice.finish_reason) node.end = choice.finish_reason;
        const { content, reasoning_content: reasoning } = choice.delta ?? {};
        if (!content && !reasoning) continue;
        last = performance.now();
        first ||= last;
        tokens += 1;
        node.content += (content ?? "").replace(/\r\n?/g, "\n");
        if (reasoning) node.reasoning = (node.reasoning ?? "") + reasoning;
        measure();
        this.ontoken(this);
        this.showSoon();
      }
    } catch (error) {
      if (error.name === "AbortError") {
        node.end = "stopped";
      } else {
        node.end = "cut";
        node.error = error instanceof ServerError ? error.message : `the page failed: ${error.message}`;
      }
    }
    clearTimeout(this.timer);
    measure();
  }

  /** Shows the answer so far, often enough to be smooth and seldom enough to leave time for everything else. */
  showSoon() {
    if (this.timer) return;
    this.timer = setTimeout(() => requestAnimationFrame(() => {
      const began = performance.now();
      this.timer = 0;
      this.onprogress(this);
      this.wait = Math.max(PACE, (performance.now() - began) / RENDERING);
    }), this.wait);
  }
}
