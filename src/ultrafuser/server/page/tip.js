// The tooltip: one token and its exact weights, one bar per specialist. There is one, shared by all answers.

import { colourClass } from "./specialists.js";
import { figure, make, named, ranked, weightsText } from "./text.js";

const box = document.getElementById("tip");
const reading = document.getElementById("reading");
let anchor = null; // the token that the tip belongs to

/** Show a token's weights beside it. Aloud: also to a screen reader. */
export function showTip(beside, text, weights, names, { aloud = false } = {}) {
  const sentence = weightsText(weights, names);
  const rows = ranked(weights).map((n) => {
    const bar = make("span", { className: "tip-bar" });
    bar.style.setProperty("--w", String(weights[n]));
    return make(
      "li",
      { className: colourClass(n) },
      make("span", { className: "swatch" }),
      make("span", { className: "tip-name", textContent: names[n] }),
      make("span", { className: "tip-weight", textContent: figure(weights[n]) }),
      make("span", { className: "tip-track" }, bar),
    );
  });
  box.replaceChildren(make("p", { className: "tip-token", textContent: named(text) }), make("ul", {}, ...rows));
  box.setAttribute("aria-label", `${named(text)}: ${sentence}`);
  box.hidden = false;
  anchor = beside;
  moveTip();
  if (aloud) reading.textContent = `${named(text)}: ${sentence}`;
}

export function hideTip() {
  box.hidden = true;
}

/** Above its token where there is room, else below it; never outside the window. */
export function moveTip() {
  if (box.hidden) return;
  const { left, top, bottom } = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
  const { width, height } = box.getBoundingClientRect();
  const edge = 8;
  const room = document.documentElement.clientWidth - width - edge;
  const above = top - height - edge;
  box.style.left = `${Math.max(edge, Math.min(left, room))}px`;
  box.style.top = `${above >= edge ? above : bottom + edge}px`;
}
