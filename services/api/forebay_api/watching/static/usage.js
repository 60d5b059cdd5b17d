// What keys used of models: a table of days, and the last hour minute by minute.

import { $, count, get, make, put, seconds } from "./common.js";
import { hour, onHour } from "./hour.js";
import { plot } from "./plots.js";

const EVERY_MS = 15_000;
const MOST = 8; // lines of the plot

let askedAt = 0;
let asking = null;
let chart = null;
let drawn = ""; // the names of its lines

const named = (key) => key ?? "without a key";
const here = () => !$("view-usage").hidden;

export function open() {
  askedAt = 0;
  show();
  drawTokens();
}

export function close() {
  asking?.abort();
  endChart();
}

export function forget() {
  asking?.abort();
  $("usage").replaceChildren();
  endChart();
}

export async function show() {
  if (!here() || Date.now() - askedAt < EVERY_MS) return;
  askedAt = Date.now();
  asking?.abort();
  const { signal } = (asking = new AbortController());
  const groups = $("usage-by").value.split(",");
  const first = new Date(Date.now() - ($("usage-days").value - 1) * 86_400_000).toISOString().slice(0, 10);
  const query = new URLSearchParams([["from", first], ...groups.map((group) => ["group_by", group])]);
  try {
    draw(await get(`/v1/usage?${query}`, { signal }), groups);
  } catch (error) {
    if (!signal.aborted && error.status !== 401 && !$("usage").childElementCount) put($("usage"), `unknown: ${error.message}`);
  }
}

function draw({ data, total }, groups) {
  if (!data.length) return $("usage").replaceChildren(make("p", { className: "quiet" }, "Nothing was used in these days."));
  const heads = [...groups, "requests", "tokens in", "from a cache", "tokens out", "mean wait"];
  const cells = (row) => [
    count(row.requests), count(row.prompt_tokens), count(row.cached_tokens), count(row.completion_tokens),
    row.requests ? seconds(row.queue_seconds / row.requests) : "",
  ];
  const line = (row, names) => make("tr", {}, ...[...names, ...cells(row)].map((text, place) => make("td", { "data-label": heads[place], className: place < groups.length ? "" : "number" }, text)));
  $("usage").replaceChildren(make("table", { className: "cards" },
    make("caption", { className: "hidden" }, "Usage"),
    make("thead", {}, make("tr", {}, ...heads.map((text, place) => make("th", { scope: "col", className: place < groups.length ? "" : "number" }, text)))),
    make("tbody", {}, ...data.map((row) => line(row, groups.map((group) => (group === "key" ? named(row.key) : row[group])))),
      ...(data.length > 1 ? [line(total, groups.map((_, place) => (place ? "" : "all together")))] : []))));
}

// --- The last hour ---

function drawTokens() {
  if (!here() || !hour) return;
  const by = $("tokens-by").value;
  const sums = new Map();
  for (const { rows } of hour.usage) {
    for (const row of rows) {
      const name = by === "key" ? named(row.key) : row.model;
      sums.set(name, (sums.get(name) ?? 0) + row.tokens);
    }
  }
  const names = [...sums].sort((a, b) => b[1] - a[1]).slice(0, MOST).map(([name]) => name);
  if (!names.length) return endChart();
  if (drawn !== names.join()) {
    endChart();
    chart = plot($("tokens"), { series: names.map((label) => ({ label })) });
    drawn = names.join();
  }
  const start = Math.max(hour.at[0] ?? 0, hour.now - hour.seconds);
  const times = [];
  for (let at = hour.now - (hour.now % hour.usage_s); at > start; at -= hour.usage_s) times.unshift(at);
  const value = (name, at) => hour.usage.filter((one) => one.at > at - hour.usage_s && one.at <= at)
    .flatMap(({ rows }) => rows).filter((row) => (by === "key" ? named(row.key) : row.model) === name).reduce((sum, row) => sum + row.tokens, 0);
  chart.draw([times, ...names.map((name) => times.map((at) => value(name, at)))],
    names.map((name) => `${name}: ${count(sums.get(name))} tokens`).join("; "));
}

function endChart() {
  chart?.end();
  chart = null;
  drawn = "";
}

for (const id of ["usage-days", "usage-by"]) $(id).addEventListener("change", () => { askedAt = 0; show(); });
$("usage-form").addEventListener("submit", (event) => event.preventDefault());
$("tokens-by").addEventListener("change", drawTokens);
onHour(drawTokens);
