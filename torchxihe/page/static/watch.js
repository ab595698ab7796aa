// The tabs, the list of runs, and the curves of those that are selected, every two seconds.
"use strict";
const $ = (id) => document.getElementById(id);
const make = (tag, name, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};
const PERIOD = 2000;
let chosen = null; // names of the selected runs, in the order of their colors
let shown = "";

const short = (name) => name.split("/").filter(Boolean).pop() || name;
const count = (number) => (number >= 1e6 ? `${(number / 1e6).toFixed(2)} M` : number >= 1e4 ? `${(number / 1e3).toFixed(1)} k` : Math.round(number).toLocaleString("en"));
const ago = (seconds) => (seconds < 90 ? `${Math.max(0, Math.round(seconds))} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : seconds < 129600 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`);

async function get(path) {
  const response = await fetch(path, { cache: "no-cache" });
  if (!response.ok) throw new Error((await response.text()).trim());
  return response.json();
}

function drawRuns(runs) {
  const list = $("runs");
  if (!runs.length) list.replaceChildren(make("li", "soft", "There is no run in the given directories yet."));
  else list.replaceChildren(...runs.map((run) => {
    const place = chosen.indexOf(run.name), item = make("li", place < 0 ? "" : `c${place % 8}`);
    const label = make("label"), box = make("input"), facts = make("div", "facts");
    box.type = "checkbox";
    box.checked = place >= 0;
    box.addEventListener("change", () => choose(run.name, box.checked));
    label.append(box, short(run.name));
    label.title = run.name;
    facts.append(make("span", `state ${run.state}`, run.state), make("span", "", `${run.step.toLocaleString("en")}${run.total ? ` / ${run.total.toLocaleString("en")}` : ""}`));
    if (run.loss !== undefined) facts.append(make("span", "", `loss ${run.loss.toFixed(3)}`));
    if (run.state === "training" && run.tokens_per_second !== undefined) facts.append(make("span", "", `${count(run.tokens_per_second)} tok/s`));
    if (run.updated) facts.append(make("span", "", `${ago(Date.now() / 1000 - run.updated)} ago`));
    const link = make("a", "", "report");
    link.href = `report?run=${encodeURIComponent(run.name)}`;
    link.target = "_blank";
    link.rel = "noopener";
    facts.append(link);
    item.append(label, facts);
    if (run.total) {
      const track = make("div", "progress"), done = make("i");
      done.style.width = `${Math.min(100, (100 * run.step) / run.total)}%`;
      track.append(done);
      item.append(track);
    }
    return item;
  }));
}

function choose(name, on) {
  chosen = chosen.filter((other) => other !== name).concat(on ? [name] : []).slice(-12);
  update();
}

function drawCurves(watched) {
  const text = JSON.stringify(watched);
  if (text === shown || document.querySelector(".plot:hover")) return;
  shown = text;
  $("empty").hidden = watched.panels.length > 0;
  $("empty").textContent = chosen.length ? "Nothing is logged yet." : "No run is selected.";
  $("panels").innerHTML = watched.panels.join(""); // escaped by the server
  $("samples").replaceChildren(...watched.samples.reverse().flatMap((sample) => {
    const title = make("h3", "", "Sample "), text = make("pre", "", sample.text);
    title.append(make("small", "", `${sample.run}, step ${sample.step.toLocaleString("en")}`));
    return [title, text];
  }));
}

async function update() {
  try {
    const { runs, models } = await get("api/list");
    const names = runs.map((run) => run.name);
    if (chosen === null && runs.length) chosen = [runs.reduce((a, b) => (b.updated > a.updated ? b : a)).name];
    chosen = (chosen || []).filter((name) => names.includes(name));
    drawRuns(runs);
    listModels(models);
    const query = new URLSearchParams([...chosen.map((name) => ["run", name]), ["by", $("by").value], ["smooth", $("smooth").value]]);
    drawCurves(chosen.length ? await get(`api/watch?${query}`) : { panels: [], samples: [] });
    if (!runs.length) chosen = null;
    $("trouble").textContent = "";
  } catch (error) {
    $("trouble").textContent = error instanceof TypeError ? "the server does not answer" : error.message;
  }
}

function show() {
  const talk = location.hash === "#talk";
  $("watch").hidden = talk;
  $("talk").hidden = !talk;
  for (const link of document.querySelectorAll("nav a")) link.classList.toggle("here", link.hash === (talk ? "#talk" : "#watch"));
}

async function keepUpdating() {
  if (!document.hidden) await update();
  setTimeout(keepUpdating, PERIOD);
}

addEventListener("hashchange", show);
addEventListener("DOMContentLoaded", () => {
  show();
  $("by").addEventListener("change", update);
  $("smooth").addEventListener("change", update);
  keepUpdating();
});
