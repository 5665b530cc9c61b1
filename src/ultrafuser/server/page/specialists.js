// The specialists: a colour and an underline for each, who speaks alone, who is left out.

import { figure, make } from "./text.js";

const NUM_COLOURS = 6; // as many as the palette has; then they come round again

export function colourClass(n) {
  return `s${n % NUM_COLOURS}`;
}

/** The sign of a specialist: its initial on its colour, over its underline. */
export function swatch(name, n) {
  const key = make("span", { className: `swatch letter ${colourClass(n)}`, textContent: [...name][0] ?? "?" });
  key.setAttribute("aria-hidden", "true");
  return key;
}

export class Specialists {
  /** Fills the legend and the list of switches. */
  constructor(names, { legend, switches, openSettings }) {
    this.names = names;
    this.solo = null;
    this.without = new Set();
    this.rows = names.map((name, n) => this.#row(name, n));
    this.keys = names.map((name, n) => this.#key(name, n, openSettings));
    switches.replaceChildren(...this.rows.map((row) => row.element));
    legend.replaceChildren(...this.keys.map((key) => key.element));
    this.#show();
  }

  /** What a request asks for, by the switches as they are now. */
  get fusion() {
    if (this.solo !== null) return { override: { [this.names[this.solo]]: 1 } };
    if (this.without.size > 0) return { without: this.names.filter((_, n) => this.without.has(n)) };
    return {};
  }

  /** Show the mean weights of an answer. */
  showMeans(means) {
    for (const [n, name] of this.names.entries()) {
      const mean = means[name] ?? 0;
      this.rows[n].mean.textContent = figure(mean);
      this.rows[n].bar.style.setProperty("--w", String(mean));
      this.keys[n].mean.textContent = figure(mean);
    }
  }

  #row(name, n) {
    const solo = this.#switch("Solo", `Solo: ${name} answers alone`, () => {
      this.solo = this.solo === n ? null : n;
    });
    const leave = this.#switch("Leave out", `Leave out ${name}`, () => {
      if (!this.without.delete(n)) this.without.add(n);
    });
    const mean = make("span", { className: "mean", title: "Mean weight in the last answer" });
    const bar = make("span", { className: "tip-bar" });
    const track = make("span", { className: "tip-track" }, bar);
    const label = make("span", { className: "name", textContent: name });
    const head = make("div", { className: "row" }, swatch(name, n), label, mean);
    const element = make("li", { className: colourClass(n) }, head, track, make("div", { className: "row" }, solo, leave));
    return { element, solo, leave, mean, bar };
  }

  #key(name, n, openSettings) {
    const mean = make("span", { className: "mean" });
    const label = make("span", { className: "name", textContent: name });
    const state = make("span", { className: "state" });
    const button = make("button", { type: "button", className: "key", onclick: openSettings }, swatch(name, n), label, mean, state);
    return { element: make("li", {}, button), button, mean, state };
  }

  #switch(text, label, change) {
    const button = make("button", { type: "button", className: "switch", textContent: text });
    button.setAttribute("aria-label", label);
    button.addEventListener("click", () => {
      change();
      this.#show();
    });
    return button;
  }

  #show() {
    for (const [n, { element, solo, leave }] of this.rows.entries()) {
      const isSolo = this.solo === n;
      const isOut = this.solo === null && this.without.has(n);
      const isSilent = isOut || (this.solo !== null && !isSolo);
      solo.setAttribute("aria-pressed", String(isSolo));
      leave.setAttribute("aria-pressed", String(isOut));
      // Somebody has to answer; and who answers alone has left out the others already.
      leave.disabled = this.solo !== null || (!isOut && this.without.size >= this.names.length - 1);
      element.classList.toggle("silent", isSilent);
      this.keys[n].button.classList.toggle("silent", isSilent);
      this.keys[n].state.textContent = isSolo ? "solo" : isSilent ? "out" : "";
    }
  }
}
