// The server's API as the page uses it: models, and a chat answer chunk by chunk.

const KEY = "ultrafuser-key";

/** The server answered, and said no. */
export class ServerError extends Error {
  constructor(message, { status = 0, retryAfterS = null } = {}) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** The server cannot be reached, or the connection ended in the middle of an answer. */
export class ConnectionLost extends Error {}

// Without storage (a browser may forbid it) the key lives as long as the page.
let keyInMemory = "";
let needsKey = false;

export function apiKey() {
  try {
    return sessionStorage.getItem(KEY) ?? keyInMemory;
  } catch {
    return keyInMemory;
  }
}

export function setApiKey(key) {
  keyInMemory = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Forbidden: it stays in memory.
  }
}

/** An address of the API; relative to the page, so that it holds behind a proxy with a path of its own. */
export function address(path) {
  return new URL(path, document.baseURI).href;
}

/** Whether requests need a key: one that was given to this page, or one that the browser sends by itself. */
export function keyIsNeeded() {
  return needsKey || apiKey() !== "";
}

export async function listModels() {
  const answer = await readJson(await call("v1/models"));
  if (!Array.isArray(answer?.data) || answer.data.length === 0) throw new ServerError("The server has no model.");
  if (!apiKey()) needsKey = await refusesStrangers();
  return answer.data;
}

async function refusesStrangers() {
  try {
    return (await fetch(address("v1/models"), { credentials: "omit", cache: "no-store" })).status === 401;
  } catch (error) {
    throw lost(error, "The server cannot be reached.");
  }
}

/** The chunks of an answer. Throws ServerError, ConnectionLost, or AbortError when the signal says so. */
export async function* streamChat(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ServerError("The server sent something that is no JSON.");
    }
    if (chunk.error) throw new ServerError(chunk.error.message ?? "The server failed.", { status: 500 });
    yield chunk;
  }
  throw new ConnectionLost("The answer broke off before its end.");
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  // With a key of its own the page need not let the browser ask for one.
  const credentials = apiKey() ? "omit" : "same-origin";
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, credentials, cache: "no-store" });
  } catch (error) {
    throw lost(error, "The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // A proxy in between answers in its own words.
  }
  const seconds = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new ServerError(message, {
    status: response.status,
    retryAfterS: Number.isFinite(seconds) ? Math.max(0, seconds) : null,
  });
}

async function readJson(response) {
  try {
    return await response.json();
  } catch (error) {
    throw lost(error, "The server's answer cannot be read.");
  }
}

/** The data of each server-sent event: lines up to an empty one, those that begin with `data:`. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        throw lost(error, "The connection broke in the middle of the answer.");
      }
      if (piece.done) return;
      const lines = (rest + piece.value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    if (!signal.aborted) reader.cancel().catch(() => {});
  }
}

function lost(error, message) {
  return error.name === "AbortError" ? error : new ConnectionLost(message);
}
