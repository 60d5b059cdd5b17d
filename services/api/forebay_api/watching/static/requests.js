// The requests: one filter line with chips that write it, fifty a page, several cancelled or run again at once.

import { $, FINAL, count, get, make, many, put, say, spaced, sure } from "./common.js";
import { acts, requestRows } from "./rows.js";

const PAGE = 50;
const AT_ONCE = 6; // cancelled or retried at the same time
const MOST = 1000; // cancelled by one "all that fit"
const LISTED = 100; // the most that the api lists at once
const OPEN = ["queued", "processing"];
const LEAST_MS = 1000; // between two lists
const STATES = ["queued", "processing", "completed", "failed", "timed_out", "cancelled"];
const NAMES = ["state", "model", "key", "worker", "tier", "type", "older", "newer"];
const UNITS = { s: 1, m: 60, h: 3600, d: 86_400 };

const chosen = new Set();
const rows = requestRows($("requests"), ["choose", "id", "status", "type", "model", "key", "worker", "queued", "waited", "ran", "attempt", "error", "action"], {
  chosen, onChoose: showChosen, onAct: () => refresh(true),
  onNew: (unseen) => put($("new"), unseen ? `${unseen} new, shown when pointer and focus leave the table` : ""),
});

let place = { q: "", order: "newest", page: 1 };
let asking = null; // AbortController of the list that is waited for
let askedAt = 0;
let due = false;
let shownAt = ""; // the address of the list that is shown

// --- The address and the filter line ---

export function open(_, query) {
  const next = { q: query.get("q") ?? "", order: query.get("order") === "oldest" ? "oldest" : "newest", page: Math.max(Number(query.get("page")) || 1, 1) };
  if (next.q !== place.q || next.order !== place.order || next.page !== place.page) chosen.clear();
  place = next;
  $("filter").value = place.q;
  $("order").value = place.order;
  refresh(true);
}

export function close() {
  asking?.abort();
}

export function forget() {
  asking?.abort();
  rows.forget();
  chosen.clear();
  showChosen();
  for (const id of ["new", "range", "requests-none"]) put($(id), "");
  $("cancel-fitting").hidden = true;
  $("pages").replaceChildren();
}

const address = ({ q, order, page }) => {
  const query = new URLSearchParams({ ...(q && { q }), ...(order !== "newest" && { order }), ...(page > 1 && { page }) }).toString();
  return `#/requests${query && `?${query}`}`;
};

function go(change) {
  const to = address({ ...place, page: 1, ...change });
  if (to === location.hash || (to === "#/requests" && location.hash === "#/requests?")) refresh(true);
  else location.hash = to;
}

// `state:failed older:10m words` as the parameters of GET /v1/queue/requests. Throws an Error that says what is wrong.
export function parameters(line) {
  const query = new URLSearchParams();
  const words = [];
  for (const part of line.split(/\s+/).filter(Boolean)) {
    const [, name, value] = part.match(/^([a-z]+):(.*)$/) ?? [];
    if (!NAMES.includes(name)) words.push(part);
    else if (!value) throw new Error(`${name}: has no value`);
    else if (name === "state") {
      for (const state of value.split(",")) {
        const known = { waiting: "queued", running: "processing" }[state] ?? state;
        if (!STATES.includes(known)) throw new Error(`state: is one of ${STATES.join(", ")}`);
        query.append("status", known);
      }
    } else if (name === "older" || name === "newer") {
      const [, amount, unit] = value.match(/^(\d+(?:\.\d+)?)([smhd])$/) ?? [];
      if (!unit) throw new Error(`${name}: is a duration such as 90s, 10m or 2h`);
      query.set(`${name}_s`, amount * UNITS[unit]);
    } else query.set(name, value);
  }
  if (words.length) query.set("text", words.join(" "));
  return query;
}

// The line with one state more or less.
function toggled(line, state) {
  const states = line.match(/(?:^|\s)state:(\S*)/)?.[1].split(",").filter(Boolean) ?? [];
  const next = states.includes(state) ? states.filter((one) => one !== state) : [...states, state];
  const others = line.replace(/(?:^|\s)state:\S*/g, "").trim();
  return [next.length ? `state:${next.join(",")}` : "", others].filter(Boolean).join(" ");
}

function showChips(counts, query) {
  const wanted = query.getAll("status");
  for (const state of STATES) {
    const chip = $("chips").querySelector(`[data-state="${state}"]`) ?? addChip(state);
    chip.setAttribute("aria-pressed", wanted.includes(state));
    put(chip.lastChild, counts ? count(counts[state]) : "–");
  }
}

function addChip(state) {
  const chip = make("button", { type: "button", className: `chip state-${state}`, onclick: () => go({ q: toggled(place.q, state) }) }, `${spaced(state)} `, make("span"));
  chip.dataset.state = state;
  $("chips").append(chip);
  return chip;
}

// --- The list ---

export function show({ at, requests, reset }) {
  rows.tick(at);
  due ||= reset || requests.length > 0;
  if (due) refresh();
}

async function refresh(now = false) {
  if ($("view-requests").hidden || (!now && Date.now() - askedAt < LEAST_MS)) return;
  asking?.abort();
  const { signal } = (asking = new AbortController());
  askedAt = Date.now();
  due = false;
  try {
    const query = parameters(place.q);
    put($("filter-error"), "");
    query.set("order", place.order);
    query.set("limit", PAGE);
    query.set("offset", (place.page - 1) * PAGE);
    showList(await get(`/v1/queue/requests?${query}`, { signal }), query);
  } catch (error) {
    if (signal.aborted || error.status === 401) return;
    due = true;
    put($("filter-error"), error.message);
  }
}

function showList({ at, data, total, counts, complete }, query) {
  showChips(counts, query);
  offerFitting(openStates(query).reduce((sum, state) => sum + counts[state], 0), data.filter(unfinished).length);
  rows.show(data, at, shownAt !== location.hash);
  shownAt = location.hash;
  const first = (place.page - 1) * PAGE;
  put($("range"), total ? `${count(first + 1)} to ${count(first + data.length)} of ${count(total)}${complete ? "" : " that are kept"}` : "");
  put($("requests-none"), total ? "" : place.q ? "No request fits this filter." : "No requests are known. They are kept for REQUEST_STATE_TTL.");
  const link = (page, text) => make("a", { href: address({ ...place, page }) }, text);
  const links = [first > 0 ? link(place.page - 1, "‹ previous") : "", first + PAGE < total ? link(place.page + 1, "next ›") : ""];
  const shown = links.map((one) => one.textContent ?? "").join();
  if ($("pages").dataset.shown !== `${shown} ${location.hash}`) {
    $("pages").dataset.shown = `${shown} ${location.hash}`;
    $("pages").replaceChildren(links[0], " ", links[1]);
  }
  showChosen();
}

// --- Several at once ---

const those = (fits) => rows.states.filter((state) => chosen.has(state.id) && fits(state));
const unfinished = (state) => !FINAL.has(state.status);
const retryable = (state) => state.retryable;

function showChosen() {
  const shown = new Set(rows.states.map(({ id }) => id));
  for (const id of chosen) if (!shown.has(id)) chosen.delete(id);
  const [cancel, retry] = [those(unfinished).length, those(retryable).length];
  put($("selected"), chosen.size ? `${chosen.size} selected` : "");
  put($("cancel-selected"), cancel ? `Cancel ${cancel}` : "Cancel");
  put($("retry-selected"), retry ? `Run ${retry} again` : "Run again");
  $("cancel-selected").disabled = !cancel;
  $("retry-selected").disabled = !retry;
  const all = $("select-all");
  all.checked = chosen.size > 0 && chosen.size === shown.size;
  all.indeterminate = chosen.size > 0 && chosen.size < shown.size;
}

// `more` fit too.
async function together(what, ids, more = 0) {
  const cancels = what === "cancel";
  const number = count(ids.length);
  const bound = more ? `${count(ids.length + more)} fit, and at most ${number} are cancelled at once: the first in this order. ` : "";
  if (cancels && ids.length > 1 && !await sure({
    title: `Cancel ${number} requests?`, text: `${bound}Their clients get an error, and what runs stops.`, yes: `Cancel ${number}`,
  })) return;
  let done = 0;
  const left = [...ids];
  const tell = ids.length > 1 ? () => {} : say; // a screen reader would say each
  await Promise.all(Array.from({ length: AT_ONCE }, async () => {
    for (let id = left.shift(); id; id = left.shift()) {
      const did = await acts[what](id, tell);
      done += did;
    }
  }));
  const rest = more ? `; ${count(more)} that fit are left` : "";
  if (ids.length > 1) say(cancels ? `${many(done, "request was", "requests were")} cancelled${done < ids.length ? `, ${count(ids.length - done)} had ended` : ""}${rest}` : `${many(done, "request runs", "requests run")} again${done < ids.length ? `, ${ids.length - done} not` : ""}`);
  chosen.clear();
  rows.refill();
  refresh(true);
}

const openStates = (query) => OPEN.filter((state) => !query.has("status") || query.getAll("status").includes(state));

// Where more fit than the page shows.
function offerFitting(fitting, shown) {
  const button = $("cancel-fitting");
  if (fitting <= shown && document.activeElement === button) $("select-all").focus();
  button.hidden = fitting <= shown;
  put(button, `Cancel all ${count(fitting)} that fit`);
}

async function cancelFitting() {
  const query = parameters(place.q);
  const states = openStates(query);
  query.delete("status");
  for (const state of states) query.append("status", state);
  query.set("order", place.order);
  query.set("limit", LISTED);
  const ids = new Set();
  let total = MOST;
  try {
    for (let offset = 0; offset < Math.min(total, MOST); offset += LISTED) {
      query.set("offset", offset);
      const list = await get(`/v1/queue/requests?${query}`);
      total = list.total;
      for (const { id } of list.data) ids.add(id);
    }
  } catch (error) {
    return say(`Nothing was cancelled: ${error.message}`);
  }
  await together("cancel", [...ids].slice(0, MOST), Math.max(total - MOST, 0));
}

$("filter-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const line = $("filter").value.trim();
  // An id leads to its request.
  if (/^(resp_)?[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}$/.test(line)) location.hash = `#/request/${line}`;
  else go({ q: line });
});
$("order").addEventListener("change", () => go({ order: $("order").value }));
$("select-all").addEventListener("change", () => {
  for (const { id } of rows.states) {
    if ($("select-all").checked) chosen.add(id);
    else chosen.delete(id);
  }
  rows.refill();
  showChosen();
});
$("cancel-selected").addEventListener("click", () => together("cancel", those(unfinished).map(({ id }) => id)));
$("retry-selected").addEventListener("click", () => together("retry", those(retryable).map(({ id }) => id)));
$("cancel-fitting").addEventListener("click", cancelFitting);
showChips(null, new URLSearchParams());
