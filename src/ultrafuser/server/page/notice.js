// The bar above the question: what went wrong, in the server's words, and what can be done about it.

import { make } from "./text.js";

const bar = document.getElementById("notice");
let timer = 0;

/**
 * Show a message until it is dismissed or another takes its place.
 *
 * action: { label, run } adds a button; afterS runs it by itself after so many seconds, counted down.
 */
export function showNotice(message, { kind = "error", action = null, afterS = null } = {}) {
  hideNotice();
  const words = make("p", { textContent: message });
  const close = make("button", { type: "button", className: "quiet icon", textContent: "\u00d7", onclick: hideNotice });
  close.setAttribute("aria-label", "Dismiss");
  bar.dataset.kind = kind;
  bar.replaceChildren(words);
  if (action !== null) {
    const run = () => {
      hideNotice();
      action.run();
    };
    const button = make("button", { type: "button", className: "quiet", textContent: action.label, onclick: run });
    bar.append(button);
    if (afterS !== null) countDown(button, action.label, afterS, run);
  }
  bar.append(close);
  bar.hidden = false;
}

export function hideNotice() {
  clearInterval(timer);
  bar.hidden = true;
}

function countDown(button, label, seconds, run) {
  const end = performance.now() + seconds * 1000;
  // Not read out second by second: the message has said what matters.
  button.setAttribute("aria-label", label);
  const tick = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    if (left <= 0) run();
    else button.textContent = `${label} (${left} s)`;
  };
  timer = setInterval(tick, 200);
  tick();
}
