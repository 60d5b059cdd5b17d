// The page: which view is shown, and the feed of GET /v1/queue/events that all of them are fed by.

import * as batches from "./batches.js";
import * as chat from "./chat.js";
import { $, ask, clock, events, pause, put, say, useKey, usedKey } from "./common.js";
import { forgetHour, refreshHour } from "./hour.js";
import * as models from "./models.js";
import * as overview from "./overview.js";
import { redrawPlots } from "./plots.js";
import * as request from "./request.js";
import * as requests from "./requests.js";
import * as usage from "./usage.js";

const RETRY_MS = [500, 1000, 2000, 5000];
const SILENCE_MS = 10_000; // the api says something every second
const VIEWS = { overview, requests, request, models, batches, usage, chat };

let feed = null; // AbortController of the connection to the feed
let shown = null; // name of the view
let last = null; // the newest message with numbers

// --- Views by their addresses: #/, #/requests?q=…, #/request/ID, … ---

function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  if (location.hash === "#main") return;
  const [name = "", ...rest] = path.split("/");
  const next = Object.hasOwn(VIEWS, name) ? name : "overview";
  const moved = next !== shown;
  if (moved && shown) VIEWS[shown].close?.();
  shown = next;
  for (const view of Object.keys(VIEWS)) $(`view-${view}`).hidden = view !== next;
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.hash.replace(/^#\/?/, "") || "overview";
    if (here === next || (here === "requests" && next === "request")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = next === "overview" ? "Forebay" : `${$(`view-${next}`).querySelector("h2").textContent} · Forebay`;
  say("");
  VIEWS[next].open(decoded(rest.join("/")), new URLSearchParams(query));
  if (last) VIEWS[next].show?.(last);
  if (moved) scrollTo(0, 0);
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // typed by hand: no request has such an id
  }
}

// --- The feed ---

async function watch() {
  feed?.abort();
  const { signal } = (feed = new AbortController());
  for (let tries = 0; ; tries += 1) {
    let why = "the api ended the connection";
    try {
      await follow(signal, () => { tries = 0; });
    } catch (error) {
      if (error.status === 401 && !signal.aborted) return wantKey(error.message);
      why = reason(error);
    }
    if (signal.aborted) return;
    unknown(why);
    await pause(RETRY_MS[Math.min(tries, RETRY_MS.length - 1)], signal);
    if (signal.aborted) return;
  }
}

// One connection to the feed, until it ends or nothing is heard: some connections die without a word.
async function follow(signal, heard) {
  const silence = new AbortController();
  const silent = Object.assign(new Error(`no event for ${SILENCE_MS / 1000} s, reconnecting`), { code: "silent" });
  let timer;
  const wait = () => {
    clearTimeout(timer);
    timer = setTimeout(() => silence.abort(silent), SILENCE_MS);
  };
  wait();
  try {
    const response = await ask("/v1/queue/events", { signal: AbortSignal.any([signal, silence.signal]) });
    for await (const data of events(response)) {
      wait();
      heard();
      show(JSON.parse(data));
    }
  } catch (error) {
    silence.signal.throwIfAborted();
    throw error;
  } finally {
    clearTimeout(timer);
  }
}

function reason({ status, code, message }) {
  if (code === "queue_unavailable") return "NATS cannot be reached";
  if (code === "silent") return message;
  return status ? `the api answers ${status}: ${message}` : `no connection to the api: ${message}`;
}

function connection(kind, text) {
  $("connection").className = `badge ${kind}`;
  put($("connection"), text);
}

// What was seen last stays, dimmed, with its time: nothing is known of now.
function unknown(why) {
  document.body.classList.add("stale");
  connection("bad", last ? `${why} · as of ${clock(last.at)}` : why);
  overview.unknown(why);
}

function show(message) {
  const { connected, status, client, version } = message;
  known(client);
  put($("version"), version ?? "");
  if (!connected || !status) return unknown("NATS cannot be reached");
  document.body.classList.remove("stale");
  if (status.is_running) connection("good", "live");
  else connection("bad", "no worker is ready");
  last = message;
  refreshHour(message.at);
  chat.offerModels(status.models, message.workers);
  VIEWS[shown].show?.(message);
}

// --- The key ---

function known(client) {
  const named = client?.name ?? null;
  $("key-form").hidden = true;
  $("key-used").hidden = named === null;
  put($("key-name"), named === null ? "" : `${named}${client.operator ? "" : " (own requests only)"}`);
  document.body.classList.toggle("operator", client?.operator ?? false);
}

function wantKey(message) {
  forget();
  connection("bad", "an API key is needed");
  $("key-form").hidden = false;
  $("key-used").hidden = true;
  const wrong = usedKey() !== "";
  put($("key-error"), wrong ? message : "");
  $("key").toggleAttribute("aria-invalid", wrong);
  if (wrong || document.activeElement === document.body) $("key").focus();
}

// What was seen with one key is not for who comes with another.
function forget() {
  last = null;
  forgetHour();
  for (const view of Object.values(VIEWS)) view.forget();
  put($("version"), "");
  say("");
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  put($("key-error"), "");
  forget();
  connection("", "connecting");
  route();
  watch();
});

$("key-change").addEventListener("click", () => {
  $("key-form").hidden = false;
  $("key-used").hidden = true;
  feed?.abort();
  forget();
  connection("", "not connected");
  $("key").focus();
});

// --- Light and dark ---

const THEME = "forebay-theme";
const dark = matchMedia("(prefers-color-scheme: dark)");

function theme(chosen) {
  if (chosen) document.documentElement.dataset.theme = chosen;
  redrawPlots();
}

$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  const next = now === "dark" ? "light" : "dark";
  localStorage.setItem(THEME, next);
  theme(next);
});
dark.addEventListener("change", redrawPlots);
theme(localStorage.getItem(THEME));

addEventListener("hashchange", route);
route();
watch();
