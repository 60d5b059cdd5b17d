// One request: what happened to it, in order, and what can be done about it.

import { $, FINAL, count, exact, getAnswer, getRequest, make, put, say, seconds, spaced, time, times } from "./common.js";
import { acts } from "./rows.js";

const LEAST_MS = 1000; // between two looks at a request that has not ended
const UNKNOWN = "This request is unknown. It was refused (its answer and the api's log say why), it is older than "
  + "REQUEST_STATE_TTL, or it belongs to another key.";

let id = null;
let asking = null; // AbortController of the look that is waited for
let askedAt = 0;
let ended = false;
let written = ""; // what is shown

export function open(wanted) {
  if (wanted !== id) clear();
  id = wanted;
  put($("request-title"), `Request ${id}`);
  look();
  $("request-title").focus({ preventScroll: true });
}

export function close() {
  asking?.abort();
  id = null;
}

export function forget() {
  asking?.abort();
  clear();
}

function clear() {
  $("request").replaceChildren();
  written = "";
  ended = false;
}

export function show({ requests, reset }) {
  if (!id || Date.now() - askedAt < LEAST_MS) return;
  if (!ended || reset || requests.some((one) => one.id === id)) look();
}

async function look() {
  if (id === null) return; // what was done to it ended after the view was left
  asking?.abort();
  const { signal } = (asking = new AbortController());
  askedAt = Date.now();
  try {
    const state = await getRequest(id, { signal });
    const answer = state.logged ? await getAnswer(id).catch(() => null) : null;
    if (signal.aborted) return;
    ended = FINAL.has(state.status);
    draw(state, answer);
  } catch (error) {
    if (signal.aborted || error.status === 401) return;
    ended = error.status === 404;
    written = "";
    $("request").replaceChildren(make("p", { className: "bad" }, error.status === 404 ? UNKNOWN : error.message));
  }
}

function draw(state, answer) {
  const news = JSON.stringify([{ ...state, estimated_wait_s: null }, answer]);
  if (news === written) return;
  written = news;
  const box = $("request");
  const open_ = box.querySelector("details")?.open ?? false;
  // A button that is used stays where it is.
  const focused = box.contains(document.activeElement) ? document.activeElement.dataset.act : null;
  box.replaceChildren(
    make("p", { className: "summary" },
      make("strong", { className: `state-${state.status}` }, spaced(state.status)),
      ...[state.completion_type, state.model, state.key && `key ${state.key}`, state.tier && state.tier !== "default" && `tier ${state.tier}`]
        .filter(Boolean).map((text) => ` · ${text}`)),
    make("p", { className: "row" }, ...buttons(state)),
    make("ol", { className: "timeline" }, ...timeline(state).map(step)),
    facts(state),
    ...(answer?.texts ? [make("details", { open: open_ }, make("summary", {}, ended ? "The answer" : "The answer so far"), ...answer.texts.map((text) => make("pre", {}, text)))] : []),
    make("p", { className: "quiet" }, "In a terminal: ", make("code", {}, `forebay requests --id ${state.id}`)),
  );
  if (focused !== null) (box.querySelector(`[data-act="${focused}"]`) ?? $("request-title")).focus({ preventScroll: true });
}

function buttons(state) {
  const button = (act, text, onclick) => {
    const made = make("button", { type: "button", onclick }, text);
    made.dataset.act = act;
    return made;
  };
  const act = (what) => () => acts[what](state.id).then(look);
  return [
    ...(FINAL.has(state.status) ? [] : [button("cancel", "Cancel", act("cancel"))]),
    ...(state.retryable && !state.retried_as ? [button("retry", "Run again", act("retry"))] : []),
    button("copy", "Copy id", () => copy(state.id)),
    ...(state.retried_as ? [make("a", { href: `#/request/${state.retried_as}` }, "it runs again as another request")] : []),
  ];
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("The id is copied.");
  } catch {
    say(`The browser lets pages copy only over https or from localhost: ${text}`);
  }
}

// --- The timeline: [time or null, text, kind] ---

function timeline(state) {
  const { attempts, queued_at, started_at, finished_at, status } = state;
  const steps = [[queued_at, state.tier && state.tier !== "default" ? "queued in the waiting room" : "queued", ""]];
  for (const past of attempts) {
    steps.push([past.began_at, `attempt ${past.number} on ${past.worker ?? "a worker"}`, "processing"]);
    steps.push([past.ended_at, ending(past), past.fault ? "failed" : "queued"]);
  }
  const last = attempts.at(-1)?.number;
  if (state.attempt && state.attempt !== last) {
    const from = state.resumed ? `, from token ${state.resumed} on` : "";
    steps.push([state.attempt_at ?? started_at, `attempt ${state.attempt}${state.worker ? ` on ${state.worker}` : ""}${from}`, "processing"]);
    if (state.first_token_at) steps.push([state.first_token_at, `first token, ${seconds(state.first_token_at - queued_at)} after it was queued`, "processing"]);
  }
  if (status === "queued") {
    const wait = state.estimated_wait_s ? `, about ${Math.ceil(state.estimated_wait_s)} s more` : "";
    steps.push([null, `waits${state.position ? `: place ${state.position}${wait}` : ""}`, "queued"]);
  } else if (status === "processing") steps.push([null, "is running", "processing"]);
  else {
    // Of an attempt that failed last, the fault is of this attempt alone.
    if (state.fault && state.fault !== attempts.at(-1)?.fault) steps.push([finished_at, ending(state), "failed"]);
    steps.push([finished_at, `${spaced(status)}${state.error ? `: ${state.error} (what the client was told)` : ""}`, status]);
  }
  return steps;
}

function ending({ fault, tokens }) { // of an attempt
  const after = tokens ? ` after ${count(tokens)} tokens` : "";
  return fault ? `failed${after}: ${fault.replace(/^attempt \d+ on worker [^:]*: /, "")}` : `gave the request back${after}`;
}

const step = ([at, text, kind]) => make("li", { className: `state-${kind}` }, at ? time(at, exact(at)) : make("span", { className: "quiet" }, "–"), make("span", {}, text));

function facts(state) {
  const { usage } = state;
  const { waited, ran } = times(state, Date.now() / 1000);
  const rows = {
    waited: FINAL.has(state.status) ? waited : null,
    ran: FINAL.has(state.status) ? ran : null,
    tokens: usage && `${count(usage.prompt_tokens)} in${usage.cached_tokens ? ` (${count(usage.cached_tokens)} from a cache)` : ""}, ${count(usage.completion_tokens)} out`,
    "tokens a second": usage && state.first_token_at && state.finished_at > state.first_token_at
      ? ((usage.completion_tokens - 1) / (state.finished_at - state.first_token_at)).toFixed(1) : null,
    "gave way": state.turn ? `${state.turn} times` : null,
    deadline: FINAL.has(state.status) ? null : time(state.deadline),
  };
  return make("dl", { className: "facts" }, ...Object.entries(rows).filter(([, value]) => value)
    .map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}
