// Asks for the API key of a server that wants one.

import { apiKey, setApiKey } from "./api.js";

const dialog = document.getElementById("key-dialog");
const field = document.getElementById("key");
let asked = null; // one question at a time, however many requests were refused

/** True when the user gave a key, false when not. */
export function askKey(reason) {
  asked ??= new Promise((resolve) => {
    document.getElementById("key-reason").textContent = apiKey() ? `The key was not accepted: ${reason}` : reason;
    field.value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
    dialog.showModal();
  }).finally(() => {
    asked = null;
  });
  return asked;
}

export function listenToKeyDialog() {
  document.getElementById("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setApiKey(field.value.trim());
    dialog.close("given");
  });
  document.getElementById("key-cancel").addEventListener("click", () => dialog.close(""));
}
