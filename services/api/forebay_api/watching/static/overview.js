// Is it well? Six numbers, one hour, what needs attention, and what runs now.

import { $, clock, count, get, make, many, put, seconds, time } from "./common.js";
import { hour, lately, onHour, rate } from "./hour.js";
import { plot } from "./plots.js";
import { requestRows } from "./rows.js";

const RUNNING = 10; // rows of what runs now
const RUNNING_MS = 1000;
const FULL = 0.8; // as the alerts have it: docs/observability.md
const SLOW_S = 60;
const LOST_S = 600; // a worker that is gone is told of for so long
const MAX_SEEN = 240;
const GRAVE = new Set(["worker_lost", "nats_away"]);

const running = requestRows($("running"), ["id", "status", "model", "key", "worker", "waited", "ran", "attempt", "action"], { onAct: refresh });

const seen = []; // the messages of the last minutes, which are closer together than the samples of the hour

let chart = null;
let message = null; // the newest
let runningAt = 0;
let open_ = false;

export function open() {
  open_ = true;
  chart ??= plot($("chart"), {
    series: [{ label: "waiting", colour: "--waiting" }, { label: "running", colour: "--processing" }, { label: "deferred", colour: "--room" }],
    marks: () => (hour?.marks ?? []).filter(({ what }) => what !== "worker_joined").map(({ at }) => at),
  });
}

export function close() {
  open_ = false;
  chart?.end();
  chart = null;
}

export function forget() {
  message = null;
  seen.length = 0;
  for (const tile of document.querySelectorAll("#tiles [id], #totals [id]")) put(tile, ["failed-lately", "nats"].includes(tile.id) ? "" : "–");
  running.forget();
  put($("running-none"), "unknown yet");
  put($("running-all"), "all");
  $("marks").replaceChildren();
  $("attention").replaceChildren(make("li", { className: "quiet" }, "unknown yet"));
  chart?.draw([[], [], [], []], "no data yet");
}

// NATS or the api is away.
export function unknown(why) {
  if (message) return; // it stays, dimmed
  $("attention").replaceChildren(make("li", { className: "bad" }, `Unknown: ${why}.`));
  put($("running-none"), "unknown");
}

export function show(newest) {
  message = newest;
  const { at, status } = message;
  if (at < seen.at(-1)?.at) seen.length = 0; // another api, with another clock
  if (at - (seen.at(-1)?.at ?? 0) > 0.9 && seen.push({ at, status }) > MAX_SEEN) seen.shift();
  for (const [name, value] of Object.entries(status)) {
    const tile = document.querySelector(`#tiles #${name}, #totals #${name}`);
    if (tile) put(tile, count(value));
  }
  put($("nats"), message.nats ? ` · NATS at ${message.nats}` : "");
  const done = rate("completed", at, status.total_processed);
  put($("rate"), done === null ? "–" : `${done.toFixed(1)}/s`);
  offerModels(status.models);
  drawHour();
  refresh();
}

async function refresh() {
  if (!message || !open_ || Date.now() - runningAt < RUNNING_MS) return;
  runningAt = Date.now();
  try {
    const [recent, list] = await Promise.all([lately(), get(`/v1/queue/requests?status=processing&order=oldest&limit=${RUNNING}`)]);
    if (!message) return;
    showRecent(recent);
    running.show(list.data, list.at);
    put($("running-none"), list.total ? "" : "nothing");
    put($("running-all"), `all ${count(list.total)}`);
  } catch {
    // The feed says what is wrong.
  }
}

// --- The hour ---

function offerModels(models) {
  const select = $("hour-of");
  const names = ["", ...models.map(({ model }) => model)];
  if (names.length === select.options.length && names.every((name, place) => name === select.options[place].value)) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => new Option(name || "the whole queue", name)));
  select.value = names.includes(chosen) ? chosen : "";
}

function drawHour() {
  if (!chart || !hour || !message) return;
  const model = $("hour-of").value;
  const now = ({ status }) => {
    if (!model) return [status.queue_size, status.processing_count, status.deferred];
    const line = status.models.find((one) => one.model === model);
    return [line?.waiting ?? null, line?.processing ?? null, line?.deferred ?? null];
  };
  const newest = seen.some(({ at }) => at === message.at) ? seen : [...seen, message];
  // What was sampled while nobody looked, then what was seen here.
  const before = hour.at.findIndex((at) => at >= newest[0].at);
  const sampled = before < 0 ? hour.at.length : before;
  const lines = ["waiting", "processing", "deferred"].map((name, place) => [
    ...(model ? hour.models[model]?.[name] ?? hour.at.map(() => null) : hour[name]).slice(0, sampled),
    ...newest.map((one) => now(one)[place]),
  ]);
  const times = [...hour.at.slice(0, sampled), ...newest.map(({ at }) => at)];
  const most = (line) => Math.max(0, ...line.filter((value) => value !== null));
  const [waiting, processing, deferred] = now(message);
  chart.draw([times, ...lines], `${waiting} waiting, ${processing} running, ${deferred} deferred; at most `
    + `${most(lines[0])} waiting and ${most(lines[1])} running since ${clock(times[0])}`);
  const marks = hour.marks.slice(-6).reverse();
  const key = marks.map((mark) => mark.at).join();
  if ($("marks").dataset.key !== key) {
    $("marks").dataset.key = key;
    $("marks").replaceChildren(...marks.map((mark) => make("li", {}, time(mark.at, clock(mark.at)), ` ${mark.text}`)));
  }
}

// --- Needs attention: the conditions of the alerts, in words that lead on ---

const problems = (recent) => {
  const { at, status, workers } = message;
  const found = [];
  const add = (grave, text, href, label) => found.push({ grave, text, href, label });
  const query = (text) => `#/requests?q=${encodeURIComponent(text)}`;
  for (const { model, waiting, processing, max_concurrent: most, paused_until: paused, deferred } of status.models) {
    const here = workers.filter((worker) => worker.model === model);
    const last = recent.models.find((one) => one.model === model);
    if (paused) add(false, `${model} is paused; ${many(waiting, "request waits", "requests wait")}.`, "#/models", "models");
    else if (waiting + deferred && !here.some(({ status: is }) => is === "ready")) {
      const loading = here.filter(({ status: is }) => is === "loading").length;
      add(!loading, `${model}: ${many(waiting + deferred, "request waits", "requests wait")}, and no worker is ready${loading ? `; ${loading} load` : ""}.`, "#/models", "models");
    } else if (last?.wait_p95_s > SLOW_S || last?.waiting_s > SLOW_S && waiting) {
      const full = most && processing >= most ? ", and every place is taken" : "";
      add(false, `${model}: the wait is ${seconds(Math.max(last.wait_p95_s ?? 0, last.waiting_s ?? 0))}${full}.`, query(`state:queued model:${model}`), "the waiting");
    }
  }
  for (const { model, timed_out: late, retried } of recent.models) {
    if (late) add(late > 3, `${many(late, "request")} for ${model} ended with 408 in the last five minutes.`, query(`state:timed_out model:${model}`), "show");
    if (retried > 5) add(false, `${retried} requests for ${model} needed another attempt in the last five minutes.`, query(`model:${model} newer:10m`), "show");
  }
  for (const { model, worker, cause, count: times } of recent.causes) {
    const on = worker ? ` on ${worker}` : "";
    add(true, `${many(times, "request")} for ${model} failed${on}: ${cause}`, query(`state:failed model:${model}${worker ? ` worker:${worker}` : ""}`), "show");
  }
  for (const text of status.differences ?? []) add(false, text, "#/models", "models");
  const fill = status.active_requests / (status.max_queue_size || 1);
  if (fill >= FULL) add(fill >= 1, `The queue is ${Math.round(fill * 100)} % full; at 100 % new requests get 503.`, "#/requests?q=state:queued", "the waiting");
  const alive = new Set(workers.map(({ id }) => id));
  for (const mark of hour?.marks ?? []) {
    const back = mark.what === "worker_lost" && alive.has(mark.text.split(" ")[0]);
    if (GRAVE.has(mark.what) && !back && at - mark.at < LOST_S) add(false, `${clock(mark.at)}: ${mark.text}.`, "#/models", "workers");
  }
  return found.sort((a, b) => b.grave - a.grave);
};

function showRecent(recent) {
  const failed = recent.models.reduce((sum, one) => sum + one.failed + one.timed_out, 0);
  put($("failed-lately"), failed ? ` (${count(failed)} in 5 min)` : "");
  const waits = recent.models.map((one) => one.wait_p95_s).filter((wait) => wait !== null);
  put($("p95"), waits.length ? seconds(Math.max(...waits)) : "–");
  const found = problems(recent);
  const list = $("attention");
  const key = JSON.stringify(found);
  if (list.dataset.key === key && list.childElementCount) return;
  list.dataset.key = key;
  list.replaceChildren(...(found.length
    ? found.map(({ grave, text, href, label }) => make("li", { className: grave ? "bad" : "warn" }, `▲ ${text} `, make("a", { href }, label)))
    : [make("li", { className: "good" }, "✓ Nothing needs attention.")]));
}

$("hour-of").addEventListener("change", drawHour);
onHour(drawHour);
