// The numbers, the picture of how they moved, and the models and workers behind them.

import { $, element, put } from "./common.js";

const CHART_S = 120;
const SPARKLINE_S = 60;
const LEAST_SPAN_S = 5; // of a picture that has just begun
const MAX_SAMPLES = 240; // of the chart, and of each model and worker
const RATE_S = 10;
const YEAR_S = 365 * 86_400;

const chart = []; // {at, waiting, processing, completed}, oldest first
const series = new Map(); // model → [{at, waiting, processing}], worker → [{at, busy}]

export function showQueue({ at, status, workers }) {
  for (const [name, value] of Object.entries(status)) {
    const tile = document.querySelector(`#tiles #${name}`);
    if (tile) put(tile, value);
  }
  record(chart, {
    at, waiting: status.queue_size, processing: status.processing_count, completed: status.total_processed,
  }, CHART_S);
  const since = chart.find((sample) => sample.at >= at - RATE_S);
  const rate = at > since.at ? (status.total_processed - since.completed) / (at - since.at) : 0;
  put($("rate"), rate ? `${rate.toFixed(1)}/s` : "");
  drawChart();
  showModels(at, status.models, workers);
  $("differences").replaceChildren(...(status.differences ?? []).map((text) => element("li", "", text)));
}

export function forgetQueue() {
  chart.length = 0;
  series.clear();
  for (const tile of document.querySelectorAll("#tiles [id]")) put(tile, tile.id === "rate" ? "" : "–");
  for (const id of ["chart", "models", "workers", "differences"]) $(id).replaceChildren();
  for (const id of ["chart-top", "chart-half", "chart-span"]) put($(id), "");
  $("chart").setAttribute("aria-label", "no data yet");
}

// --- Pictures ---

// Keeps the samples of the last `span` seconds, MAX_SAMPLES at most, and the one before them, where the line begins.
function record(samples, sample, span) {
  if (samples.at(-1)?.at > sample.at) samples.length = 0; // another api, with another clock
  if (samples.length > 1 && sample.at - samples.at(-2).at < span / MAX_SAMPLES) samples.pop();
  samples.push(sample);
  while (samples[1]?.at < sample.at - span) samples.shift();
}

const spanOf = (samples, most) => Math.min(Math.max(samples.at(-1).at - samples[0].at, LEAST_SPAN_S), most);
const peak = (samples, name) => Math.max(...samples.map((sample) => sample[name]));

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// A line and the area under it for each of `names`, the newest sample at the right edge.
function lines(samples, names, { width, height, span, top }) {
  const now = samples.at(-1).at;
  const x = (at) => (width * (1 - (now - at) / span)).toFixed(1);
  const y = (value) => (height - 1 - (value / top) * (height - 2)).toFixed(1);
  return names.flatMap((name) => {
    const points = samples.map((sample) => `${x(sample.at)} ${y(sample[name])}`).join("L");
    return [
      shape("path", { class: `area ${name}`, d: `M${x(samples[0].at)} ${height}L${points}L${width} ${height}Z` }),
      shape("path", { class: `line ${name}`, d: `M${points}` }),
    ];
  });
}

// The least round number that is not below `value` and has a whole half.
function roundTop(value) {
  const unit = 10 ** Math.floor(Math.log10(Math.max(value, 4)));
  return [1, 1.2, 1.6, 2, 3, 4, 6, 8, 10].map((factor) => factor * unit).find((top) => top >= Math.max(value, 4));
}

function drawChart() {
  const size = { width: 600, height: 140, span: spanOf(chart, CHART_S) };
  const peaks = { waiting: peak(chart, "waiting"), processing: peak(chart, "processing") };
  size.top = roundTop(Math.max(peaks.waiting, peaks.processing));
  const grid = shape("path", { class: "grid", d: `M0 ${size.height / 2}H${size.width}M0 1H${size.width}` });
  $("chart").replaceChildren(grid, ...lines(chart, ["waiting", "processing"], size));
  const { waiting, processing } = chart.at(-1);
  $("chart").setAttribute("aria-label", `${waiting} waiting, ${processing} processing; at most ${peaks.waiting} waiting `
    + `and ${peaks.processing} processing in the last ${Math.round(size.span)} s`);
  put($("chart-span"), `the last ${Math.round(size.span)} s`);
  put($("chart-top"), size.top);
  put($("chart-half"), size.top / 2);
}

function sparkline(key, sample, top = 1) {
  const samples = series.get(key) ?? [];
  series.set(key, samples);
  record(samples, sample, SPARKLINE_S);
  const names = Object.keys(sample).filter((name) => name !== "at");
  const span = spanOf(samples, SPARKLINE_S);
  const size = { width: 100, height: 20, span, top: Math.max(top, ...names.map((name) => peak(samples, name))) };
  const told = names.map((name) => `${sample[name]} ${name}, at most ${peak(samples, name)}`).join("; ");
  const picture = shape("svg", {
    class: "sparkline", viewBox: "0 0 100 20", preserveAspectRatio: "none", role: "img",
    "aria-label": `${told} in the last ${Math.round(span)} s`,
  });
  picture.append(...lines(samples, names, size));
  return picture;
}

// --- Models and workers ---

const until = (at, now) => (at - now > YEAR_S ? "" : ` until ${new Date(at * 1000).toLocaleString()}`);

function showModels(at, models, workers) {
  const keys = new Set([...models.map(({ model }) => `model ${model}`), ...workers.map(({ id }) => `worker ${id}`)]);
  for (const key of series.keys()) if (!keys.has(key)) series.delete(key);
  $("models").replaceChildren(...models.map(({ model, waiting, deferred, processing, max_concurrent, paused_until }) => row(
    model, deferred ? `${waiting} + ${deferred} deferred` : waiting, `${processing} of ${max_concurrent}`, sparkline(`model ${model}`, { at, waiting, processing }),
    paused_until ? element("span", "state-paused", `paused${until(paused_until, at)}`) : readiness(model, workers),
  )));
  $("workers").replaceChildren(...workers.map(({ id, model, status, progress, busy, slots, device, engine }) => row(
    element("span", "id", id), modelCell(model), element("span", `state-${status}`, progress ?? status), `${busy} of ${slots}`,
    sparkline(`worker ${id}`, { at, busy }, slots), device, engine,
  )));
}

// How many workers of a model are ready, loading and draining.
function readiness(model, workers) {
  const counts = ["ready", "loading", "draining"].map((status) => [
    workers.filter((worker) => worker.model === model && worker.status === status).length, status,
  ]).filter(([count]) => count);
  if (!counts.length) return element("span", "state-failed", "no worker");
  return element("span", `state-${counts[0][1]}`, counts.map(([count, status]) => `${count} ${status}`).join(", "));
}

const row = (...cells) => element("tr", "", ...cells.map((cell) => (cell?.tagName === "TD" ? cell : element("td", "", cell ?? ""))));

function modelCell(model) {
  const cell = element("td", "model", model);
  cell.title = model; // where it is cut off
  return cell;
}
