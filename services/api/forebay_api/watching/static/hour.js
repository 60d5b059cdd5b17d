// The last hour as the api has kept it (GET /v1/queue/history), and the last five minutes (GET /v1/queue/recent).

import { get } from "./common.js";

const RECENT_MS = 5000;

const listeners = new Set();

export let hour = null; // the columns of /v1/queue/history, all of equal length
let asked = 0; // when it was asked for, by the clock of the api
let recent = null; // the promise of /v1/queue/recent
let recentAt = 0;
let generation = 0;

export const onHour = (listener) => listeners.add(listener);

export function forgetHour() {
  hour = recent = null;
  asked = 0;
  generation += 1;
}

// Asks for what has been sampled since the last time, once for each sample.
export async function refreshHour(at) {
  if (at - asked < (hour?.sample_s ?? 5)) return;
  asked = at;
  const mine = generation;
  try {
    const more = await get(`/v1/queue/history?after=${hour?.at.at(-1) ?? 0}`);
    if (mine !== generation) return;
    hour = hour ? joined(hour, more) : more;
    for (const listener of listeners) listener();
  } catch {
    // Asked again with the next message.
  }
}

function joined(old, more) {
  // Another process of the api has another history: begin anew.
  if (more.at.length && more.at[0] <= (old.at.at(-1) ?? 0)) return more;
  const all = old.at.length;
  const first = [...old.at, ...more.at].findIndex((at) => at > more.now - more.seconds);
  const merge = (a, b) => [...a, ...b].slice(first);
  const nulls = (length) => new Array(length).fill(null);
  const models = {};
  for (const model of new Set([...Object.keys(old.models), ...Object.keys(more.models)])) {
    models[model] = Object.fromEntries(["waiting", "processing", "deferred"].map((name) => [name, merge(
      old.models[model]?.[name] ?? nulls(all), more.models[model]?.[name] ?? nulls(more.at.length),
    )]));
  }
  const since = (list) => list.filter((one) => one.at > more.now - more.seconds);
  const columns = ["at", "waiting", "processing", "deferred", "completed", "failed", "cancelled", "workers_ready"];
  return {
    ...more,
    ...Object.fromEntries(columns.map((name) => [name, merge(old[name], more[name])])),
    models,
    usage: since([...old.usage, ...more.usage]),
    marks: since([...old.marks, ...more.marks]),
  };
}

// What happened in the last five minutes; asked for at most every RECENT_MS.
export function lately() {
  if (!recent || Date.now() - recentAt > RECENT_MS) {
    recentAt = Date.now();
    recent = get("/v1/queue/recent").catch((error) => { recent = null; throw error; });
  }
  return recent;
}

// How many a second were added to a total within the last `span` seconds; null if that is not known.
export function rate(name, now, value, span = 60) {
  const first = hour?.at.findIndex((at, place) => at >= now - span && hour[name][place] !== null) ?? -1;
  if (first < 0 || now - hour.at[first] < 1) return null;
  return Math.max(value - hour[name][first], 0) / (now - hour.at[first]);
}
