// The newest requests, cancelling one, running one again, and looking one up.

import { $, ask, askRequest, element, put, seconds } from "./common.js";

const FINAL = new Set(["completed", "failed", "cancelled", "timed_out"]);
const MAX_ROWS = 50;
const COLUMNS = ["id", "status", "type", "model", "worker", "queued", "waited", "ran", "attempt", "error", "action"];
const UNKNOWN = "This request is unknown. It was refused (its answer and the api's log say why), it is older than "
  + "REQUEST_STATE_TTL, or it belongs to another key.";

const states = new Map(); // id → its newest state
const rows = new Map(); // id → the cells of its row, by name
let now = Date.now() / 1000; // by the clock of the api
let looking = null; // AbortController of the look-up that is waited for

export const say = (text) => put($("message"), text);

const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hourCycle: "h23" });
const spaced = (name) => name.replaceAll("_", " ");

function times({ status, queued_at, started_at, finished_at }) {
  // Handed over, it waits again, though it had been started.
  if (status === "queued") return { waited: seconds(now - queued_at), ran: "" };
  return {
    waited: seconds((started_at ?? finished_at ?? now) - queued_at),
    ran: started_at ? seconds((finished_at ?? now) - started_at) : "",
  };
}

// --- The table ---

export function showRequests({ at, reset, requests }) {
  now = at;
  if (reset) states.clear();
  for (const state of requests) states.set(state.id, state);
  arrange();
}

export function forgetRequests() {
  states.clear();
  rows.clear();
  $("requests").replaceChildren();
  looking?.abort();
  $("look-result").replaceChildren();
  put($("new"), "");
  say("");
}

// While somebody points at a row, or has come to it by keyboard, no row moves: what is new waits.
const held = () => $("requests").matches(":hover") || $("requests").querySelector(":focus-visible") !== null;

function arrange() {
  const still = held();
  const newest = [...states.values()].sort((a, b) => b.queued_at - a.queued_at);
  for (const { id } of newest.splice(MAX_ROWS)) {
    if (!(still && rows.has(id))) states.delete(id);
  }
  for (const [id, cells] of rows) fill(cells, states.get(id));
  const unseen = still ? newest.filter(({ id }) => !rows.has(id)).length : 0;
  put($("new"), unseen ? `${unseen} new, shown when pointer and focus leave the table` : "");
  if (still) return;
  for (const [id, cells] of rows) {
    if (!states.has(id)) {
      cells.row.remove();
      rows.delete(id);
    }
  }
  newest.forEach((state, place) => {
    const { row } = rows.get(state.id) ?? addRow(state);
    const there = $("requests").children[place];
    if (there !== row) $("requests").insertBefore(row, there ?? null);
  });
}

function addRow(state) {
  const cells = Object.fromEntries(COLUMNS.map((name) => [name, element("td", name)]));
  const cancel = element("button", "", "Cancel");
  cancel.setAttribute("aria-label", `Cancel ${state.id}`);
  cancel.addEventListener("click", () => cancelRequest(state.id));
  const again = element("button", "", "Run again");
  again.setAttribute("aria-label", `Run ${state.id} again`);
  again.addEventListener("click", () => retryRequest(state.id));
  cells.action.append(cancel, again);
  cells.error.append(element("div"), element("div", "quiet"));
  // Where they are cut off.
  cells.id.title = state.id;
  cells.model.title = state.model;
  cells.row = element("tr", "", ...Object.values(cells));
  cells.row.tabIndex = -1;
  rows.set(state.id, cells);
  fill(cells, state);
  return cells;
}

function fill(cells, state) {
  cells.row.classList.toggle("gone", !state);
  if (!state) return put(cells.status, "no longer sent");
  const { waited, ran } = times(state);
  const texts = {
    id: state.id, status: spaced(state.status), type: state.completion_type, model: state.model,
    worker: state.worker ?? "", queued: clock(state.queued_at), waited, ran, attempt: state.attempt || "",
  };
  for (const [name, text] of Object.entries(texts)) put(cells[name], text);
  cells.status.className = `status state-${state.status}`;
  const [error, fault] = cells.error.children;
  put(error, state.error ?? "");
  put(fault, state.fault ?? "");
  const [cancel, again] = cells.action.children;
  const ended = FINAL.has(state.status);
  // The focus keeps its place, and on no other button, where one more Enter would cancel what was not meant.
  if (ended && document.activeElement === cancel) cells.row.focus({ preventScroll: true });
  cancel.hidden = ended;
  again.hidden = !state.retryable;
}

async function cancelRequest(id) {
  try {
    const answer = await (await ask(`/v1/queue/request/${encodeURIComponent(id)}`, { method: "DELETE" })).json();
    say(answer.cancelled ? `${id} was cancelled` : `${id} has ended already: ${spaced(answer.status)}`);
  } catch (error) {
    say(`${id} was not cancelled: ${error.message}`);
  }
}

async function retryRequest(id) {
  try {
    const answer = await (await ask(`/v1/queue/request/${encodeURIComponent(id)}/retry`, { method: "POST" })).json();
    say(`${id} runs again as ${answer.retried_as}`);
  } catch (error) {
    say(`${id} does not run again: ${error.message}`);
  }
}

// --- Look-up ---

async function lookUp(event) {
  event.preventDefault();
  looking?.abort();
  const { signal } = (looking = new AbortController());
  try {
    showFound(await askRequest($("look-id").value.trim(), { signal }));
  } catch (error) {
    if (!signal.aborted) showResult(error.status === 404 ? UNKNOWN : error.message);
  }
}

function showResult(...content) {
  const result = $("look-result");
  const focused = result.contains(document.activeElement);
  result.replaceChildren(...content);
  if (focused) result.focus({ preventScroll: true });
}

function showFound(state) {
  const { id, status, error, fault, ...others } = state;
  const list = element("dl");
  for (const [name, value] of Object.entries({ id, status, error, fault, ...others, ...times(state) })) {
    if (value === null || value === "") continue;
    list.append(element("dt", "", spaced(name)), element("dd", name === "status" ? `state-${value}` : "", written(name, value)));
  }
  if (FINAL.has(status) && !others.retryable) return showResult(list);
  const [word, act] = others.retryable ? ["Run it again", retryRequest] : ["Cancel it", cancelRequest];
  const button = element("button", "", word);
  button.addEventListener("click", () => act(id).then(() => $("look-form").requestSubmit()));
  showResult(list, button);
}

function written(name, value) {
  if (name === "status") return spaced(value);
  if (name.endsWith("_at") || name === "timestamp") return new Date(value * 1000).toLocaleString();
  return typeof value === "object" ? JSON.stringify(value) : value;
}

// Later, when the pointer and the focus are where they went.
for (const left of ["pointerleave", "focusout"]) $("requests").addEventListener(left, () => setTimeout(arrange));
$("look-form").addEventListener("submit", lookUp);
