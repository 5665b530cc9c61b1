// The settings panel: opened and closed, and read as the fields of a request.

const form = document.getElementById("settings");
const panel = document.getElementById("panel");
const opener = document.getElementById("panel-switch");

/** The fields of a request that say how to choose tokens; what would change nothing is left out. */
export function samplingFields() {
  const fields = {
    temperature: number("temperature"),
    max_tokens: number("max_tokens"),
  };
  if (number("top_p") !== 1) fields.top_p = number("top_p");
  if (number("top_k") !== 0) fields.top_k = number("top_k");
  if (number("min_p") !== 0) fields.min_p = number("min_p");
  if (form.elements.seed.value !== "") fields.seed = number("seed");
  const stop = form.elements.stop.value.split("\n").filter((line) => line !== "").map(unescaped);
  if (stop.length > 0) fields.stop = stop;
  return fields;
}

export function systemMessage() {
  return form.elements.system.value.trim();
}

/** Whether each question stands for itself. */
export function forgets() {
  return form.elements.single.checked;
}

export function asksAlone() {
  return form.elements.alone.checked;
}

/** No answer can be longer than the model's context. */
export function limitTokens(maxContext) {
  if (Number.isInteger(maxContext)) form.elements.max_tokens.max = String(maxContext);
}

/** Whether all fields can be sent; if not, the panel opens and says which cannot. */
export function settingsAreValid() {
  if (form.checkValidity()) return true;
  openSettings();
  return form.reportValidity();
}

export function openSettings() {
  panel.classList.add("open");
  opener.setAttribute("aria-expanded", "true");
  document.getElementById("panel-close").focus();
}

function closeSettings() {
  panel.classList.remove("open");
  opener.setAttribute("aria-expanded", "false");
  opener.focus();
}

export function listenToSettings() {
  opener.addEventListener("click", () => (panel.classList.contains("open") ? closeSettings() : openSettings()));
  document.getElementById("panel-close").addEventListener("click", closeSettings);
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && panel.classList.contains("open")) closeSettings();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.monospace.addEventListener("change", (event) => {
    document.body.classList.toggle("monospace", event.target.checked);
  });
  document.getElementById("theme").addEventListener("click", switchTheme);
}

function number(name) {
  return form.elements[name].valueAsNumber;
}

function unescaped(line) {
  return line.replace(/\\([nt\\])/g, (_, letter) => ({ n: "\n", t: "\t", "\\": "\\" })[letter]);
}

function switchTheme() {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  try {
    localStorage.setItem("theme", root.dataset.theme);
  } catch {
    // Forbidden: the choice holds until the page is closed.
  }
}
