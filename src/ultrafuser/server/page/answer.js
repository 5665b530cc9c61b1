// One answer as it grows: tokens in their specialists' colours, the strip above, the weights at hand.

import { colourClass } from "./specialists.js";
import { Strip } from "./strip.js";
import { figure, make, ranked, setText, weightsText } from "./text.js";
import { hideTip, showTip } from "./tip.js";

const REDRAW_MS = 100; // of the strip, while tokens come
const FENCE = "```";
// An indented line that is no item of a list: code that no fence announces.
const INDENTED = /\n(?: {2,}|\t+)(?![-*+\u2022\d ])\S/;

export class Answer {
  /** Without colours it is plain text: the answer of one specialist alone. */
  constructor(names, { coloured = true, beforeGrowth = () => {}, afterGrowth = () => {} } = {}) {
    this.names = names;
    this.coloured = coloured;
    this.text = "";
    this.weights = []; // one row per token; null where the server gave none
    this.texts = [];
    this.nodes = [];
    this.means = null;
    this.active = -1; // the token that Tab leads to
    this.waiting = [];
    this.frame = 0;
    this.drawnAt = 0;
    this.beforeGrowth = beforeGrowth;
    this.afterGrowth = afterGrowth;
    this.body = make("div", { className: "tokens", dir: "auto" });
    this.strip = new Strip(names.map((_, n) => colourClass(n)));
    this.element = make("div", { className: "answer" }, this.body);
    this.element.setAttribute("aria-busy", "true");
    if (coloured) {
      this.strip.element.toggleAttribute("hidden", true);
      this.element.prepend(this.strip.element);
      this.body.setAttribute("role", "group");
      this.body.setAttribute("aria-label", "Answer; arrow keys move from token to token");
      this.#listen();
    }
  }

  /** Take one chunk of the stream; shown with the next frame. */
  take(chunk) {
    if (chunk.usage?.fusion_mean) this.means = chunk.usage.fusion_mean;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const content = choice.delta?.content ?? "";
    const tokens = choice.fusion ?? [];
    if (tokens.length > 0 && tokens.map((token) => token.text).join("") === content) {
      for (const token of tokens) this.#put(token.text, this.#checked(token.weights));
    } else if (content !== "") {
      this.#put(content, null);
    }
    if (this.waiting.length > 0 && this.frame === 0) this.frame = requestAnimationFrame(() => this.#grow());
  }

  /** The end: what waits is shown, the strip is drawn whole. */
  finish() {
    if (this.frame !== 0) cancelAnimationFrame(this.frame);
    this.#grow({ last: true });
    this.element.setAttribute("aria-busy", "false");
    this.means ??= this.#countMeans();
    if (this.means !== null) {
      const means = this.names.map((name) => this.means[name] ?? 0);
      this.strip.element.setAttribute("aria-label", `Gate weights over the answer; mean: ${weightsText(means, this.names)}`);
    }
  }

  #checked(weights) {
    return weights?.length === this.names.length ? weights : null;
  }

  #countMeans() {
    const rows = this.weights.filter((row) => row !== null);
    if (rows.length === 0) return null;
    const mean = (n) => rows.reduce((sum, row) => sum + row[n], 0) / rows.length;
    return Object.fromEntries(this.names.map((name, n) => [name, mean(n)]));
  }

  #put(text, weights) {
    this.text += text;
    this.waiting.push([text, weights]);
  }

  #grow({ last = false } = {}) {
    this.frame = 0;
    this.beforeGrowth();
    const fragment = document.createDocumentFragment();
    for (const [text, weights] of this.waiting.splice(0)) fragment.append(this.#token(text, weights));
    this.body.append(fragment);
    if (!this.text.includes(FENCE) && INDENTED.test(this.text)) this.element.classList.add("code");
    if (this.active < 0) this.#activate(this.#next(-1, 1));
    const now = performance.now();
    if (this.coloured && (last || now - this.drawnAt > REDRAW_MS)) {
      this.drawnAt = now;
      const hasWeights = this.weights.some((row) => row !== null);
      this.strip.element.toggleAttribute("hidden", !hasWeights);
      if (hasWeights) this.strip.draw(this.weights);
    }
    this.afterGrowth();
  }

  #token(text, weights) {
    const node = make("span", { className: "token" });
    setText(node, text);
    if (weights !== null && this.coloured) {
      const [n] = ranked(weights);
      node.classList.add(colourClass(n));
      node.style.setProperty("--w", figure(weights[n]));
    }
    if (this.#inFence(text)) node.classList.add("code");
    node.dataset.index = String(this.nodes.length);
    this.nodes.push(node);
    this.texts.push(text);
    this.weights.push(weights);
    return node;
  }

  /** Whether a token belongs to a block between ``` and ```, with both of its ends. */
  #inFence(text) {
    this.seen = (this.seen ?? "") + text;
    const isInside = this.fenced === true;
    const parts = this.seen.split(FENCE);
    if (parts.length % 2 === 0) this.fenced = !isInside;
    this.seen = parts.at(-1).slice(-(FENCE.length - 1));
    return isInside || this.fenced === true;
  }

  // Reading weights: by pointer, by keyboard, from the strip.

  #listen() {
    const indexOf = (event) => {
      const node = event.target.closest?.(".token");
      return node ? Number(node.dataset.index) : -1;
    };
    this.body.addEventListener("pointerover", (event) => this.#point(indexOf(event)));
    this.body.addEventListener("pointerleave", () => this.#point(-1));
    this.body.addEventListener("click", (event) => {
      // A click that ends a selection is no wish to move.
      if (indexOf(event) >= 0 && getSelection().isCollapsed) this.#focus(indexOf(event));
    });
    this.body.addEventListener("focusin", (event) => this.#point(indexOf(event), { aloud: true }));
    this.body.addEventListener("focusout", () => this.#point(-1));
    this.body.addEventListener("keydown", (event) => this.#key(event));
    this.strip.element.addEventListener("pointermove", (event) => this.#point(this.strip.at(event.clientX)));
    this.strip.element.addEventListener("pointerleave", () => this.#point(-1));
    this.strip.element.addEventListener("click", (event) => this.#focus(this.strip.at(event.clientX)));
  }

  #point(index, options) {
    this.pointed?.classList.remove("pointed");
    const weights = this.weights[index] ?? null;
    this.strip.point(weights === null ? null : index);
    if (weights === null) return hideTip();
    this.pointed = this.nodes[index];
    this.pointed.classList.add("pointed");
    showTip(this.pointed, this.texts[index], weights, this.names, options);
  }

  #key(event) {
    const moves = {
      ArrowRight: () => this.#next(this.active, 1),
      ArrowLeft: () => this.#next(this.active, -1),
      ArrowDown: () => this.#line(1),
      ArrowUp: () => this.#line(-1),
      Home: () => this.#next(-1, 1),
      End: () => this.#next(this.nodes.length, -1),
    };
    if (event.key === "Escape") hideTip();
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#focus(moves[event.key]());
  }

  /** The next token that can be seen, in one direction; -1 if there is none. */
  #next(from, step) {
    for (let index = from + step; index >= 0 && index < this.nodes.length; index += step) {
      if (this.texts[index] !== "" && this.weights[index] !== null) return index;
    }
    return -1;
  }

  /** The token above or below, nearest to where the active one is. */
  #line(step) {
    const here = this.nodes[this.active].getBoundingClientRect();
    let best = -1;
    let bestDistance = Infinity;
    let lineTop = null;
    for (let index = this.#next(this.active, step); index >= 0; index = this.#next(index, step)) {
      const there = this.nodes[index].getBoundingClientRect();
      const isBeyond = step > 0 ? there.top >= here.bottom - 2 : there.bottom <= here.top + 2;
      if (!isBeyond) continue;
      lineTop ??= there.top;
      if (Math.abs(there.top - lineTop) > 2) break;
      const distance = Math.abs(there.left - here.left);
      if (distance < bestDistance) [best, bestDistance] = [index, distance];
    }
    return best;
  }

  #activate(index) {
    if (index < 0) return;
    this.nodes[this.active]?.removeAttribute("tabindex");
    this.active = index;
    this.nodes[index].tabIndex = 0;
  }

  #focus(index) {
    if (index < 0) return;
    this.#activate(index);
    this.nodes[index].focus();
  }
}
