// A request as text to paste: a curl command, or Python with the openai package.

import { address, keyIsNeeded } from "./api.js";

// What the openai package has no argument for travels in its `extra_body`.
const EXTRA = new Set(["top_k", "min_p", "fusion"]);
// What one cannot see does not belong in a command one is about to run: it is escaped.
const UNSEEN = /[\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;
const WIDTH = 100; // what is longer is spread over lines

export function curlCommand(body) {
  const lines = [`curl -N ${shellQuote(address("v1/chat/completions"))}`];
  lines.push(`-H 'Content-Type: application/json'`);
  if (keyIsNeeded()) lines.push(`-H "Authorization: Bearer $OPENAI_API_KEY"`);
  lines.push(`-d ${shellQuote(escapeUnseen(JSON.stringify(body, null, 2)))}`);
  return `${lines.join(" \\\n  ")}\n`;
}

export function pythonProgram(body) {
  const own = Object.entries(body).filter(([name]) => !EXTRA.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => EXTRA.has(name)));
  if (Object.keys(extra).length > 0) own.push(["extra_body", extra]);
  const key = keyIsNeeded() ? 'os.environ["OPENAI_API_KEY"]' : '"none"';
  return [
    ...(keyIsNeeded() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(address("v1"))}, api_key=${key})`,
    "stream = client.chat.completions.create(",
    ...own.map(([name, value]) => `    ${name}=${literal(value, 1)},`),
    ")",
    "for chunk in stream:",
    "    for choice in chunk.choices:",
    '        print(choice.delta.content or "", end="", flush=True)',
    "print()",
    "",
  ].join("\n");
}

function shellQuote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function escapeUnseen(json) {
  return json.replace(UNSEEN, (character) =>
    [...Array(character.length).keys()].map((i) => `\\u${character.charCodeAt(i).toString(16).padStart(4, "0")}`).join(""),
  );
}

/** A value as Python writes it. JSON's strings and numbers are Python's, too, but for pairs of surrogates. */
function literal(value, depth = 0) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "string") {
    return JSON.stringify(value).replace(UNSEEN, (c) => `\\U${c.codePointAt(0).toString(16).padStart(8, "0")}`);
  }
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const items = Array.isArray(value)
    ? value.map((item) => literal(item, depth + 1))
    : Object.entries(value).map(([name, item]) => `${literal(name)}: ${literal(item, depth + 1)}`);
  const flat = `${open}${items.join(", ")}${close}`;
  if (!flat.includes("\n") && flat.length < WIDTH) return flat;
  const inner = "    ".repeat(depth + 1);
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${"    ".repeat(depth)}${close}`;
}
