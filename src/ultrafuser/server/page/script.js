// The chat page: questions go out, answers stream in, and what goes wrong is said.

import { ConnectionLost, listModels, ServerError, streamChat } from "./api.js";
import { askKey, listenToKeyDialog } from "./key.js";
import { hideNotice, showNotice } from "./notice.js";
import { asksAlone, forgets, limitTokens, listenToSettings, openSettings, samplingFields, settingsAreValid, systemMessage } from "./settings.js";
import { Specialists } from "./specialists.js";
import { make } from "./text.js";
import { hideTip, moveTip } from "./tip.js";
import { Turn } from "./turn.js";

const RETRY_S = [1, 2, 4, 8, 15]; // between attempts to reach the server; the last one repeats
const EXAMPLES = [
  "Name the opposite of early.",
  "Write a Python function turn for a list a. It should keep even items, then keep items above 3.",
  "Gus has 4 nuts. Gus gets 3 more. Gus buys 5 more. How many nuts does Gus have now?",
  "Bob has 4 cards. Bob loses 3. How many cards does Bob have now? Then write a Python function make for a number n. It should make it positive.",
];

const $ = (id) => document.getElementById(id);
const scroller = $("scroller");
const question = $("question");

let model = null; // as /v1/models describes it
let specialists = null;
let turns = [];
let running = null; // the AbortController of what is being answered
let isAtEnd = true; // whether to follow the answer as it grows

const growth = {
  beforeGrowth: () => {
    isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  },
  afterGrowth: () => {
    if (isAtEnd) scroller.scrollTop = scroller.scrollHeight;
  },
};
const actions = { regenerate: (turn) => answer(turn), alone: (turn) => run((signal) => answerAlone(turn, signal)) };

// Which model is there.

async function connect() {
  $("model").textContent = "connecting…";
  try {
    [model] = await listModels();
  } catch (error) {
    $("model").textContent = "not connected";
    await explain(error, { label: "Try again", run: connect });
    return;
  }
  const names = model.fusion?.specialists ?? [model.id];
  specialists = new Specialists(names, { legend: $("legend"), switches: $("switches"), openSettings });
  limitTokens(model.fusion?.max_context);
  $("model").textContent = model.id;
  document.title = `${model.id} · UltraFuser`;
  document.body.classList.toggle("single", names.length < 2);
  hideNotice();
}

// Asking.

function request(turn) {
  const messages = [];
  if (systemMessage()) messages.push({ role: "system", content: systemMessage() });
  for (const before of forgets() ? [] : turns.slice(0, turns.indexOf(turn))) {
    // A question that was never answered is not part of the conversation.
    if (!before.answer?.text) continue;
    messages.push({ role: "user", content: before.question }, { role: "assistant", content: before.answer.text });
  }
  messages.push({ role: "user", content: turn.question });
  return {
    model: model.id,
    messages,
    ...samplingFields(),
    stream: true,
    stream_options: { include_usage: true },
    fusion: { weights: true, ...specialists.fusion },
  };
}

function ask(text) {
  if (running !== null || text.trim() === "" || !settingsAreValid()) return;
  if (model === null) {
    showNotice("There is no connection to the server yet.", { action: { label: "Try again", run: connect } });
    return;
  }
  const turn = new Turn(text.trim(), specialists.names, { actions, growth });
  turns.push(turn);
  $("talk").append(turn.element);
  $("empty").hidden = true;
  question.value = "";
  fitQuestion();
  scroller.scrollTop = scroller.scrollHeight;
  answer(turn);
}

function answer(turn) {
  if (!settingsAreValid()) return;
  const ending = { length: "cut at max tokens", error: "ended by an error" };
  run(async (signal) => {
    const view = turn.begin(request(turn));
    let how = "";
    try {
      how = ending[await stream(turn.body, view, signal)] ?? "";
    } catch (error) {
      how = signal.aborted ? "stopped" : "broken off";
      if (!signal.aborted) throw error;
    } finally {
      turn.end(how);
      if (view.means !== null) specialists.showMeans(view.means);
      growth.afterGrowth();
    }
    $("status").textContent = how === "" ? "Answer complete." : `Answer ${how}.`;
    if (asksAlone() && !signal.aborted && specialists.names.length > 1) await answerAlone(turn, signal);
  }, { label: "Ask again", run: () => answer(turn) });
}

async function answerAlone(turn, signal) {
  const columns = turn.beginAlone();
  growth.afterGrowth();
  const outcomes = await Promise.allSettled(
    columns.map(async ({ name, answer: view, note }) => {
      const body = { ...turn.body, fusion: { weights: true, override: { [name]: 1 } } };
      try {
        await stream(body, view, signal);
      } catch (error) {
        note.textContent = signal.aborted ? "stopped" : error.message;
        throw error;
      } finally {
        view.finish();
      }
    }),
  );
  const failed = outcomes.find(({ status }) => status === "rejected");
  if (failed && !signal.aborted) throw failed.reason;
}

/** Fill an answer; returns the reason why it ended. */
async function stream(body, view, signal) {
  let reason = null;
  for await (const chunk of streamChat(body, signal)) {
    view.take(chunk);
    reason = chunk.choices?.[0]?.finish_reason ?? reason;
  }
  return reason;
}

/** Do one thing at a time; Stop ends it. `again` is what to offer when it fails. */
async function run(work, again = null) {
  if (running !== null) return;
  hideNotice();
  running = new AbortController();
  const { signal } = running;
  showRunning();
  let failure = null;
  try {
    await work(signal);
  } catch (error) {
    failure = error;
  } finally {
    running = null;
    showRunning();
  }
  if (failure !== null) await explain(failure, again);
}

function showRunning() {
  const isRunning = running !== null;
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  document.body.classList.toggle("running", isRunning);
  if (isRunning) $("status").textContent = "Answering…";
}

// What went wrong, and what now.

async function explain(error, again) {
  if (error instanceof ConnectionLost) return reconnect(error.message, again);
  if (!(error instanceof ServerError)) {
    showNotice("The page itself failed; this is a bug.");
    throw error;
  }
  if (error.status === 401) {
    if (await askKey(error.message)) return (again?.run ?? connect)();
    return showNotice(error.message, { action: { label: "Enter a key", run: () => explain(error, again) } });
  }
  const waits = error.status === 503 || error.status === 429 ? error.retryAfterS : null;
  return showNotice(error.message, { action: again, afterS: again === null ? null : waits });
}

let reconnecting = 0; // a number for each time the connection was lost: a newer one ends the older

async function reconnect(message, again) {
  reconnecting += 1;
  const mine = reconnecting;
  showNotice(`${message} Trying to reach the server…`, { kind: "waiting" });
  for (let attempt = 0; ; attempt += 1) {
    await pause(RETRY_S[Math.min(attempt, RETRY_S.length - 1)]);
    if (mine !== reconnecting) return;
    let found;
    try {
      [found] = await listModels();
    } catch (error) {
      if (error instanceof ConnectionLost) continue;
      return explain(error, again);
    }
    if (model === null) return connect();
    if (isAnother(found)) await connect();
    if (running === null) showNotice("The server is back.", { kind: "good", action: again });
    return;
  }
}

/** Whether a server that was started anew serves another model. */
function isAnother(found) {
  return found.id !== model.id || String(found.fusion?.specialists) !== String(model.fusion?.specialists);
}

/** Wait, but not beyond the moment when the machine is online again. */
function pause(seconds) {
  return new Promise((resolve) => {
    setTimeout(resolve, seconds * 1000);
    addEventListener("online", resolve, { once: true });
  });
}

// The form, and the rest of the page.

function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight, 200)}px`;
}

function startAnew() {
  running?.abort();
  hideNotice();
  hideTip();
  turns = [];
  $("talk").replaceChildren();
  $("empty").hidden = false;
  question.focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(question.value);
});
question.addEventListener("input", fitQuestion);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask(question.value);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented) running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", startAnew);
scroller.addEventListener("scroll", moveTip, { passive: true });
$("examples").replaceChildren(
  ...EXAMPLES.map((text) => make("li", {}, make("button", { type: "button", className: "example", textContent: text, onclick: () => ask(text) }))),
);
listenToSettings();
listenToKeyDialog();
connect();
