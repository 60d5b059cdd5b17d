// The batches: how far each is, when it should end, and cancelling it.

import { $, count, get, make, many, post, put, say, seconds, sure, time } from "./common.js";

const EVERY_MS = 3000;
const MOST = 50;
const ENDED = new Set(["completed", "failed", "expired", "cancelled"]);

let askedAt = 0;
let written = "";
let moved = new Map(); // id → {at, done}: where it was when it was first seen, for its speed

export function open() {
  askedAt = 0;
  refresh();
}

export function forget() {
  $("batches").replaceChildren();
  written = "";
  moved = new Map();
}

export const show = refresh;

async function refresh() {
  if (Date.now() - askedAt < EVERY_MS || document.body.classList.contains("stale")) return;
  askedAt = Date.now();
  try {
    draw(await get(`/v1/batches?limit=${MOST}`));
  } catch (error) {
    if (error.status !== 401 && !written) put($("batches"), `unknown: ${error.message}`);
  }
}

function draw({ data, has_more: more }) {
  const now = Date.now() / 1000;
  const news = JSON.stringify(data);
  if (news === written) return;
  written = news;
  const focused = document.activeElement.dataset?.batch;
  const heads = ["batch", "status", "model", "progress", "done", "failed", "left", "made", "ends", ""];
  $("batches").replaceChildren(data.length
    ? make("table", { className: "cards" },
      make("caption", { className: "hidden" }, "Batches, newest first"),
      make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text || make("span", { className: "hidden" }, "action"))))),
      make("tbody", {}, ...data.map((batch) => row(batch, heads, now))))
    : make("p", { className: "quiet" }, "No batches. ", make("code", {}, "POST /v1/batches"), " makes one."));
  if (more) $("batches").append(make("p", { className: "quiet" }, `The newest ${MOST} are shown.`));
  if (focused) $("batches").querySelector(`[data-batch="${focused}"]`)?.focus();
}

function row(batch, heads, now) {
  const { total, completed, failed } = batch.request_counts;
  const left = Math.max(total - completed - failed, 0);
  const action = ENDED.has(batch.status) || batch.status === "finalizing" || batch.status === "cancelling" ? ""
    : make("button", { type: "button", onclick: () => cancel(batch, left), "aria-label": `Cancel ${batch.id}` }, "Cancel");
  if (action) action.dataset.batch = batch.id;
  const progress = make("progress", { max: Math.max(total, 1), value: completed + failed, "aria-label": `${batch.id}: ${completed + failed} of ${total} lines` });
  const why = batch.errors?.data[0];
  const cells = [
    make("span", { className: "id", title: batch.id }, batch.id.slice(0, 14)),
    make("span", { className: `state-${batch.status}`, title: why?.message ?? "" }, batch.status.replaceAll("_", " "), ...(why ? [make("div", { className: "quiet" }, why.message)] : [])),
    batch.model ?? "", progress, count(completed), count(failed), count(left), time(batch.created_at), ends(batch, now), action,
  ];
  return make("tr", {}, ...cells.map((cell, place) => make("td", { "data-label": heads[place], className: heads[place] || "action" }, cell)));
}

// When it ended, or when it should: at the speed with which it went on since it was seen first.
function ends(batch, now) {
  const at = batch[`${batch.status}_at`] ?? batch.completed_at;
  if (ENDED.has(batch.status)) return at ? time(at) : "";
  const { total, completed, failed } = batch.request_counts;
  const done = completed + failed;
  if (!moved.has(batch.id)) moved.set(batch.id, { at: batch.in_progress_at ?? now, done: 0 });
  const since = moved.get(batch.id);
  const span = make("span", {}, "by ", time(batch.expires_at));
  if (done <= since.done || done >= total || now <= since.at) return span;
  const left = ((total - done) * (now - since.at)) / (done - since.done);
  return make("span", { title: `it expires at ${new Date(batch.expires_at * 1000).toLocaleString()}` }, `in about ${seconds(left).replace(/\.\d\d s/, " s")}`);
}

async function cancel(batch, left) {
  if (!await sure({ title: "Cancel this batch?", text: `${many(left, "line")} of ${batch.id} will not run. What is answered stays in its files.`, yes: "Cancel the batch" })) return;
  try {
    const { status } = await post(`/v1/batches/${batch.id}/cancel`);
    say(`${batch.id} is ${status}.`);
  } catch (error) {
    say(`${batch.id} was not cancelled: ${error.message}`);
  }
  askedAt = 0;
  refresh();
}
