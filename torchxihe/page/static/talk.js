// Text from one model, or from two side by side, as it is generated.
"use strict";
let running = []; // an AbortController per column
let listed = "";
let models = [];
const columns = () => [...document.querySelectorAll(".column:not([hidden])")];
const modelOf = (column) => models.find((model) => model.name === column.querySelector("select").value);

function listModels(found) {
  if (JSON.stringify(found) === listed) return;
  listed = JSON.stringify(found);
  models = found;
  document.querySelectorAll(".column select").forEach((select, place) => {
    const before = select.value, groups = new Map();
    for (const model of found) {
      if (!groups.has(model.home)) groups.set(model.home, Object.assign(make("optgroup"), { label: model.home }));
      const text = model.step < 0 ? `${short(model.name)} (export)` : `${short(model.home)}, step ${model.step.toLocaleString("en")}`;
      const option = make("option", "", text);
      option.value = model.name;
      groups.get(model.home).append(option);
    }
    select.replaceChildren(...groups.values());
    if (!found.length) select.append(make("option", "", "no checkpoint or export in the given directories"));
    if (found.some((model) => model.name === before)) select.value = before;
    else if (found.length) select.selectedIndex = Math.min(place, found.length - 1);
  });
  chatPossible();
}

function chatPossible() {
  const possible = models.length > 0 && columns().every((column) => modelOf(column)?.chat);
  if (!possible) $("chat").checked = false;
  $("chat").disabled = !possible;
  $("prompt").placeholder = $("chat").checked ? "Message" : "Text to continue";
}

function say(column, text, bad) {
  const status = column.querySelector(".status");
  status.textContent = text;
  status.classList.toggle("error", Boolean(bad));
}

function piece(target, { text, p }) {
  const span = make("span", "", text);
  span.style.setProperty("--p", p);
  span.title = `${(100 * p).toPrecision(3)} %`;
  target.append(span);
}

async function ask(column, prompt, controller) {
  const output = column.querySelector(".output"), model = modelOf(column);
  const request = { model: model ? model.name : "" };
  for (const name of ["temperature", "max_tokens", "top_k", "top_p", "seed"]) request[name] = $(name).valueAsNumber;
  let target = output;
  if ($("chat").checked) {
    column.turns = [...(column.turns || []), { role: "user", content: prompt }];
    request.messages = column.turns;
    output.append(make("div", "turn user", prompt), (target = make("div", "turn")));
  } else {
    column.turns = [];
    request.prompt = prompt;
    output.replaceChildren(make("span", "said", prompt));
  }
  say(column, "loading the model");
  const start = performance.now();
  let said = "", tokens = 0, ended = false;
  const rate = () => `${tokens} ${tokens === 1 ? "piece" : "pieces"}, ${((performance.now() - start) / 1000).toFixed(1)} s`;
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request), signal: controller.signal };
    const response = await fetch("api/generate", options);
    if (!response.ok) throw new Error((await response.text()).trim());
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", part; !(part = await reader.read()).done; ) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => JSON.parse(text))) {
        if (line.text !== undefined) {
          piece(target, line);
          said += line.text;
          tokens += 1;
          say(column, rate());
        } else if (line.waiting) say(column, `waiting for ${line.waiting} before`);
        else if (line.done) {
          ended = true;
          say(column, `${line.tokens} tokens in ${line.seconds.toFixed(1)} s, ${(line.tokens / Math.max(line.seconds, 1e-3)).toFixed(0)} tokens/s`);
        }
      }
    }
    if (!ended) say(column, "the server ended it; see its terminal", true);
  } catch (error) {
    if (controller.signal.aborted) say(column, `stopped, ${rate()}`);
    else say(column, error instanceof TypeError ? "the server does not answer" : error.message, true);
  }
  if (column.turns.length) column.turns.push({ role: "assistant", content: said });
}

async function generate() {
  stop();
  const mine = columns().map(() => new AbortController()), prompt = $("prompt").value;
  running = mine;
  $("stop").disabled = false;
  if ($("chat").checked) $("prompt").value = "";
  await Promise.all(columns().map((column, place) => ask(column, prompt, mine[place])));
  if (running === mine) $("stop").disabled = true;
}

function stop() {
  for (const controller of running) controller.abort();
}

function clear() {
  stop();
  for (const column of document.querySelectorAll(".column")) {
    column.turns = [];
    column.querySelector(".output").replaceChildren();
    say(column, "");
  }
}

addEventListener("DOMContentLoaded", () => {
  const colored = () => $("talk").classList.toggle("colored", $("colored").checked);
  colored();
  $("ask").addEventListener("submit", (event) => (event.preventDefault(), generate()));
  $("stop").addEventListener("click", stop);
  $("clear").addEventListener("click", clear);
  $("colored").addEventListener("change", colored);
  $("chat").addEventListener("change", () => (clear(), chatPossible()));
  $("compare").addEventListener("change", () => {
    document.querySelectorAll(".column")[1].hidden = !$("compare").checked;
    chatPossible();
  });
  for (const select of document.querySelectorAll(".column select")) select.addEventListener("change", chatPossible);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
    if (event.key === "Escape") stop();
  });
});
