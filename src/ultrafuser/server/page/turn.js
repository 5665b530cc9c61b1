// One turn of the conversation on the page: a question, its answer, what can be done with it, the specialists alone.

import { Answer } from "./answer.js";
import { curlCommand, pythonProgram } from "./snippets.js";
import { colourClass, swatch } from "./specialists.js";
import { make, setText, weightsText } from "./text.js";

export class Turn {
  /** actions: regenerate(turn) and alone(turn) are called by the buttons below the answer. */
  constructor(question, names, { actions, growth }) {
    this.question = question;
    this.names = names;
    this.actions = actions;
    this.growth = growth;
    this.body = null; // the request that the answer is for
    this.answer = null;
    const words = make("div", { className: "question", dir: "auto" });
    setText(words, question);
    this.slot = make("div", { className: "slot" });
    this.note = make("p", { className: "note" });
    this.tools = make("div", { className: "row tools-row" });
    this.aside = make("div", { className: "alone" });
    this.who = make("h3", { className: "who" });
    this.reply = make("div", { className: "reply" }, this.who, make("div", { className: "said" }, this.slot, this.note, this.tools, this.aside));
    this.element = make(
      "article",
      { className: "turn" },
      make("div", { className: "asked" }, make("h3", { className: "who", textContent: "You" }), words),
      this.reply,
    );
  }

  /** Make room for a new answer to a request. */
  begin(body) {
    this.body = body;
    this.answer = new Answer(this.names, this.growth);
    this.startedAt = performance.now();
    this.who.textContent = speaker(body.fusion);
    this.slot.replaceChildren(this.answer.element);
    this.note.textContent = "";
    this.tools.replaceChildren();
    this.aside.replaceChildren();
    return this.answer;
  }

  /** The answer is over; `ending` says how, where it did not end by itself. */
  end(ending) {
    this.answer.finish();
    const count = this.answer.texts.length;
    const seconds = (performance.now() - this.startedAt) / 1000;
    const figures = [`${count} ${count === 1 ? "token" : "tokens"}`];
    const rate = count / seconds;
    if (count > 1) figures.push(`${rate.toFixed(rate < 10 ? 1 : 0)} a second`);
    const means = this.answer.means;
    if (means !== null && this.names.length > 1) {
      const text = weightsText(this.names.map((name) => means[name] ?? 0), this.names);
      figures.push(text.replaceAll(/ (?=\d)/g, "\u00a0")); // a weight stays beside its name
    }
    this.note.textContent = [ending, ...(count > 0 ? figures : [])].filter(Boolean).join(" · ");
    this.tools.replaceChildren(...this.#buttons());
  }

  /** One plain answer per specialist, in columns; returns them by name. */
  beginAlone() {
    const answers = this.names.map((name) => [name, new Answer([name], { coloured: false })]);
    const columns = answers.map(([name, answer], n) =>
      make(
        "section",
        { className: `column ${colourClass(n)}`, ariaLabel: `${name} alone` },
        make("h4", {}, swatch(name, n), make("span", { className: "name", textContent: name })),
        answer.element,
        make("p", { className: "note" }),
      ),
    );
    this.aside.replaceChildren(...columns);
    return answers.map(([name, answer], n) => ({ name, answer, note: columns[n].lastChild }));
  }

  #buttons() {
    const button = (label, title, run) => {
      const made = make("button", { type: "button", className: "quiet", textContent: label, title });
      made.addEventListener("click", () => run(made));
      return made;
    };
    const buttons = [];
    if (this.answer.text !== "") buttons.push(button("Copy", "Copy the answer", (it) => copy(this.answer.text, it)));
    buttons.push(
      button("curl", "Copy this request as a curl command", (it) => copy(curlCommand(this.body), it)),
      button("Python", "Copy this request as Python", (it) => copy(pythonProgram(this.body), it)),
    );
    if (this.names.length > 1) buttons.push(button("Side by side", "What each specialist answers alone", () => this.actions.alone(this)));
    const again = button("Regenerate", "Ask again", () => this.actions.regenerate(this));
    again.classList.add("regenerate"); // shown at the last turn only
    return [...buttons, again];
  }
}

function speaker(fusion) {
  const override = Object.keys(fusion?.override ?? {});
  if (override.length > 0) return `${override.join(", ")} alone`;
  if (fusion?.without?.length > 0) return `Without ${fusion.without.join(", ")}`;
  return "Fused";
}

async function copy(text, button) {
  const label = button.textContent;
  const done = (await written(text)) ? "Copied" : "Not copied";
  button.textContent = done;
  document.getElementById("status").textContent = done;
  setTimeout(() => {
    button.textContent = label;
  }, 1500);
}

/** The clipboard of a page that was not loaded over https or from this machine takes only the old way. */
async function written(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = make("textarea", { value: text, className: "unseen" });
    document.body.append(field);
    field.select();
    const isDone = document.execCommand("copy");
    field.remove();
    return isDone;
  }
}
