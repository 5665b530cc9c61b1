// Text of a model, made safe to look at: what would be invisible, or turn the text around, becomes a sign.

// Controls but tab and line feed, bidirectional marks and overrides, invisible spaces and separators, tag characters.
// The zero-width joiners U+200C and U+200D stay: emoji and several scripts need them.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}\ud800-\udfff]/gu;

function sign(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  return `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

/** Fill an element with text; each unseen character becomes an isolated <span class="sign">. */
export function setText(element, text) {
  element.textContent = "";
  let done = 0;
  for (const match of text.matchAll(UNSEEN)) {
    if (match.index > done) element.append(text.slice(done, match.index));
    element.append(make("span", { className: "sign", textContent: sign(match[0]) }));
    done = match.index + match[0].length;
  }
  if (done < text.length) element.append(text.slice(done));
}

/** The same as plain text, with spaces and line ends shown, for a token that stands alone. */
export function named(text) {
  if (text === "") return "(part of a character)";
  return text.replace(UNSEEN, sign).replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replaceAll(" ", "\u2423");
}

/** A weight with two decimals, or with as many as it takes not to read as 0 or 1 when it is neither. */
export function figure(weight) {
  for (let digits = 2; digits < 6; digits += 1) {
    const shown = weight.toFixed(digits);
    if (weight <= 0 || weight >= 1 || (Number(shown) > 0 && Number(shown) < 1)) return shown;
  }
  return weight.toFixed(6);
}

/** `code 0.83, text 0.12, math 0.05`: the heaviest first. */
export function weightsText(weights, names) {
  return ranked(weights).map((n) => `${names[n]} ${figure(weights[n])}`).join(", ");
}

/** Positions of the weights, the heaviest first; equals keep their order. */
export function ranked(weights) {
  return weights.map((_, n) => n).sort((a, b) => weights[b] - weights[a]);
}

/** An element with properties set. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
