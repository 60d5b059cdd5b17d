// The models: what waits and runs, their workers, and pausing, resuming and draining with the effect shown.

import { $, clock, count, make, many, post, put, say, seconds, sure, time } from "./common.js";
import { hour, lately } from "./hour.js";

const YEAR_S = 365 * 86_400;

const cards = new Map(); // model → its elements
let message = null;
let recent = null;
const draining = new Set(); // workers that were told to drain here

export function open() {
  if (!message) put($("models"), "unknown yet");
}

export function forget() {
  message = recent = null;
  cards.clear();
  $("models").replaceChildren();
}

export function show(newest) {
  const { status, workers } = (message = newest);
  lately().then((found) => { recent = found; }, () => {});
  const lines = [...status.models];
  for (const { model } of workers) {
    if (!lines.some((line) => line.model === model)) lines.push({ model, waiting: 0, processing: 0, deferred: 0, max_concurrent: 0, paused_until: null });
  }
  for (const [model, { card }] of cards) if (!lines.some((line) => line.model === model)) { card.remove(); cards.delete(model); }
  if (!cards.size) $("models").replaceChildren(...(lines.length ? [] : [make("p", { className: "quiet" }, "No model is known: no worker has been started yet.")]));
  for (const line of lines) fill(cards.get(line.model) ?? addCard(line.model), line, workers.filter(({ model }) => model === line.model));
  tellDrained(workers);
}

function addCard(model) {
  const title = make("h3", {}, model);
  const state = make("span", { className: "badge" });
  const button = make("button", { type: "button", className: "steer", onclick: () => steer(model) });
  const numbers = make("dl", { className: "facts" });
  const body = make("tbody");
  const heads = ["worker", "status", "busy", "engine", "device", "context", "up for", ""];
  const table = make("table", { className: "cards" },
    make("caption", { className: "hidden" }, `Workers of ${model}`),
    make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text || make("span", { className: "hidden" }, "action"))))),
    body);
  const none = make("p", { className: "quiet" });
  const card = make("section", { className: "model" }, make("div", { className: "head" }, title, state, button), numbers, table, none);
  $("models").append(card);
  const made = { card, state, button, numbers, body, table, none, facts: new Map(), rows: new Map() };
  cards.set(model, made);
  return made;
}

function fill(card, line, workers) {
  const paused = line.paused_until !== null;
  const [kind, text] = paused ? ["warn", `paused${until(line.paused_until)}`] : readiness(workers);
  card.state.className = `badge ${kind}`;
  put(card.state, text);
  put(card.button, paused ? "Resume" : "Pause");
  card.button.setAttribute("aria-label", `${paused ? "Resume" : "Pause"} ${line.model}`);
  const last = recent?.models.find(({ model }) => model === line.model);
  const used = (hour?.usage.at(-1)?.rows ?? []).filter(({ model }) => model === line.model).reduce((sum, row) => sum + row.tokens, 0);
  facts(card, {
    waiting: count(line.waiting), running: `${line.processing} of ${line.max_concurrent || "–"}`, deferred: count(line.deferred ?? 0),
    "p95 wait": last?.wait_p95_s === null || !last ? "–" : seconds(last.wait_p95_s),
    "failed in 5 min": last ? count(last.failed + last.timed_out) : "–",
    "tokens/s": used ? (used / hour.usage_s).toFixed(1) : "–",
  });
  card.table.hidden = !workers.length;
  put(card.none, workers.length ? "" : "no worker");
  for (const [id, { row }] of card.rows) if (!workers.some((worker) => worker.id === id)) { row.remove(); card.rows.delete(id); }
  for (const worker of workers) fillWorker(card, worker);
}

function facts(card, values) {
  for (const [name, value] of Object.entries(values)) {
    if (!card.facts.has(name)) {
      const place = make("dd");
      card.facts.set(name, place);
      card.numbers.append(make("div", {}, make("dt", {}, name), place));
    }
    put(card.facts.get(name), value);
  }
}

function fillWorker(card, worker) {
  let made = card.rows.get(worker.id);
  if (!made) {
    const cells = Object.fromEntries(["worker", "status", "busy", "engine", "device", "context", "up for", "action"]
      .map((name) => [name, make("td", { "data-label": name, className: name.split(" ")[0] })]));
    cells.worker.append(make("span", { className: "id" }, worker.id));
    cells.action.append(make("button", { type: "button", className: "steer", onclick: () => drain(worker.id), "aria-label": `Drain ${worker.id}` }, "Drain"));
    const row = make("tr", {}, ...Object.values(cells));
    card.body.append(row);
    made = { row, cells };
    card.rows.set(worker.id, made);
  }
  const { cells } = made;
  put(cells.status, worker.progress ?? worker.status);
  cells.status.className = `status state-${worker.status}`;
  put(cells.busy, `${worker.busy} of ${worker.slots}`);
  put(cells.engine, [worker.engine, worker.quantization !== "none" && worker.quantization].filter(Boolean).join(", "));
  put(cells.device, worker.device ?? "");
  put(cells.context, worker.context_length ? count(worker.context_length) : "");
  put(cells["up for"], seconds(message.at - worker.started_at).replace(/\.\d\d s/, " s"));
  cells.worker.title = `version ${worker.version}${worker.adapters.length ? `, adapters ${worker.adapters.join(", ")}` : ""}`;
  cells.action.firstChild.disabled = worker.status === "draining";
}

const until = (at) => (at - message.at > YEAR_S ? "" : ` until ${clock(at)}`);

// How many workers of a model are ready, loading and draining.
function readiness(workers) {
  const counts = ["ready", "loading", "draining"].map((status) => [workers.filter((worker) => worker.status === status).length, status])
    .filter(([number]) => number);
  if (!counts.length) return ["bad", "no worker"];
  return [counts[0][1] === "ready" ? "good" : "warn", counts.map(([number, status]) => `${number} ${status}`).join(", ")];
}

// --- Steering: what it will do is said before, and what it did is seen after ---

async function steer(model) {
  const line = message.status.models.find((one) => one.model === model);
  const runs = many(line?.processing ?? 0, "request that runs goes", "requests that run go");
  if (line?.paused_until) {
    return told(`${model} is resumed.`, "resume", { model });
  }
  const choice = await sure({
    title: `Pause ${model}?`, yes: "Pause", choice: true,
    text: `New requests wait in the queue until their deadlines. ${runs} on. ${many(line?.waiting ?? 0, "waits", "wait")} now.`,
  });
  if (!choice) return;
  await told(`${model} is paused${choice.seconds ? ` for ${seconds(choice.seconds).replace(" 0 s", "")}` : ""}; ${runs} on.`, "pause", { model, for_s: choice.seconds });
}

async function drain(worker) {
  const { busy, model } = message.workers.find((one) => one.id === worker);
  const others = message.workers.filter((one) => one.model === model && one.id !== worker && one.status === "ready").length;
  const text = `It takes no new requests, finishes ${many(busy, "request")} and exits. ${others ? `${many(others, "other worker")} of ${model} ${others === 1 ? "goes" : "go"} on.` : `No other worker serves ${model}: its requests will wait.`}`;
  if (!await sure({ title: `Drain ${worker}?`, text, yes: "Drain" })) return;
  if (await told(`${worker} drains: it finishes ${many(busy, "request")} and exits.`, "drain", { worker })) draining.add(worker);
}

async function told(done, order, body) {
  try {
    await post(`/v1/queue/${order}`, Object.fromEntries(Object.entries(body).filter(([, value]) => value !== null)));
    say(done);
    return true;
  } catch (error) {
    say(`Not done: ${error.message}`);
    return false;
  }
}

function tellDrained(workers) {
  for (const worker of draining) {
    if (workers.some(({ id }) => id === worker)) continue;
    draining.delete(worker);
    say(`${worker} has drained and is gone.`);
  }
}
