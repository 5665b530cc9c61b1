"use strict";
// Verdicts live in the page (and, against a reload, in the browser's storage) until they are saved as a file.
const items = [...document.querySelectorAll(".item")];
const approvals = [...document.querySelectorAll(".approve")];
const synthesis = document.body.dataset.synthesis;
const storageKey = `ultrafuser review ${synthesis}`;
let isSaved = true;

const noteOf = (item) => item.querySelector(".note");

function verdicts() {
  return {
    synthesis,
    verdicts: items
      .filter((item) => item.dataset.verdict)
      .map((item) => ({ item: item.dataset.key, verdict: item.dataset.verdict, note: noteOf(item).value.trim() })),
    approved: approvals
      .filter((box) => box.checked)
      .map((box) => ({ domain: box.dataset.domain, stage: box.dataset.stage })),
  };
}

function show() {
  for (const item of items) {
    for (const verdict of ["accept", "strike"])
      item.querySelector(`.${verdict}`).setAttribute("aria-pressed", String(item.dataset.verdict === verdict));
  }
  const count = (verdict) => items.filter((item) => item.dataset.verdict === verdict).length;
  const open = items.length - count("accept") - count("strike");
  document.querySelector("#count").textContent =
    `${count("accept")} accepted, ${count("strike")} struck, ${open} open${isSaved ? "" : " · not saved"}`;
}

function changed() {
  isSaved = false;
  try {
    localStorage.setItem(storageKey, JSON.stringify(verdicts()));
  } catch {
    // A browser may refuse storage to a local file: a reload then forgets what was not saved.
  }
  show();
}

function decide(item, verdict) {
  if (verdict && item.dataset.verdict !== verdict) item.dataset.verdict = verdict;
  else delete item.dataset.verdict;
  changed();
}

function restore() {
  let kept = null;
  try {
    kept = JSON.parse(localStorage.getItem(storageKey));
  } catch {
    return;
  }
  if (!kept || !Array.isArray(kept.verdicts)) return;
  const byKey = new Map(items.map((item) => [item.dataset.key, item]));
  for (const { item: key, verdict, note } of kept.verdicts) {
    const item = byKey.get(key);
    if (!item || !["accept", "strike"].includes(verdict)) continue;
    item.dataset.verdict = verdict;
    noteOf(item).value = note;
    isSaved = false;
  }
}

function save() {
  const file = new Blob([JSON.stringify(verdicts(), null, 1) + "\n"], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = "verdicts.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  isSaved = true;
  show();
}

function move(step) {
  const at = items.indexOf(document.activeElement?.closest?.(".item"));
  const next = items[at < 0 ? 0 : Math.min(items.length - 1, Math.max(0, at + step))];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches(".note")) {
    if (event.key === "Escape" || event.key === "Enter") event.target.closest(".item").focus();
    return;
  }
  const item = event.target.closest?.(".item");
  const action = {
    j: () => move(1),
    k: () => move(-1),
    s: save,
    a: item && (() => decide(item, "accept")),
    x: item && (() => decide(item, "strike")),
    u: item && (() => decide(item, null)),
    n: item && (() => noteOf(item).focus()),
  }[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

for (const item of items) {
  for (const verdict of ["accept", "strike"])
    item.querySelector(`.${verdict}`).addEventListener("click", () => decide(item, verdict));
  noteOf(item).addEventListener("input", changed);
}
for (const box of approvals) box.addEventListener("change", changed);
document.querySelector("#save").addEventListener("click", save);
document.addEventListener("keydown", press);
addEventListener("beforeunload", (event) => {
  if (!isSaved) event.preventDefault();
});
restore();
show();
