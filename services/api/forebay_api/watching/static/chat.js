// A chat, to try a model and to see what waiting in the queue is like. Its answers are stored: it survives a reload of
// the page and a restart of the api.

import { $, ask, cancelRequest, events, getRequest, make, pause, put, seconds } from "./common.js";

const KEPT = "forebay-chat";
const RETRY_MS = 1000;

let turns = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]"); // { text, id }; another array once it is another chat
let chatting = null; // AbortController of the answer that is waited for

const chatStatus = (text) => put($("chat-status"), text);

// The models that chat, or may once they have a worker, and the adapters that all workers of a model have. A list that
// has not changed is left alone: it may be open.
export function offerModels(lines, workers) {
  const own = (model) => workers.filter((worker) => worker.model === model);
  const adapters = (model) => {
    const [first, ...others] = own(model).filter(({ status }) => status !== "draining");
    return first?.adapters.filter((name) => others.every((other) => other.adapters.includes(name))) ?? [];
  };
  const models = [...new Set([...lines, ...workers].map(({ model }) => model))]
    .filter((model) => !own(model).length || own(model).some((worker) => worker.completion_types.includes("chat")))
    .flatMap((model) => [model, ...adapters(model).map((name) => `${model}:${name}`)]);
  const select = $("chat-model");
  const shown = [...select.options].map((option) => option.value);
  if (models.length === shown.length && models.every((model, place) => model === shown[place])) return;
  const chosen = select.value;
  const ready = models.find((model) => own(model).some((worker) => worker.status === "ready"));
  select.replaceChildren(...models.map((model) => new Option(model, model)));
  select.value = models.includes(chosen) ? chosen : ready ?? models[0];
}

export function open() {
  $("chat-log").scrollTop = $("chat-log").scrollHeight;
}

export function forget() {
  stop();
  turns = [];
  keep();
  $("chat-log").replaceChildren();
  chatStatus(" ");
}

const keep = () => sessionStorage.setItem(KEPT, JSON.stringify(turns));

function stop() {
  chatting?.abort();
}

function line(kind, text) {
  const made = make("p", { className: kind }, text);
  $("chat-log").append(made);
  $("chat-log").scrollTop = $("chat-log").scrollHeight;
  return made;
}

// The place in the queue, while there is one: asked for once a second by the one who waits.
async function tellPlace(id, signal) {
  while (!signal.aborted) {
    try {
      const { status, position, estimated_wait_s: wait } = await getRequest(id, { signal });
      if (signal.aborted) return;
      if (position) chatStatus(`in the queue: place ${position}${wait ? `, about ${Math.ceil(wait)} s` : ""}`);
      if (status === "processing") chatStatus("running, no token yet");
    } catch {
      // Asked again, unless it is not wanted any more: the answer itself says what is wrong.
    }
    await pause(1000, signal);
  }
}

function chat(event) {
  event.preventDefault();
  const text = $("chat-message").value.trim();
  if (!text || chatting) return;
  $("chat-message").value = "";
  const turn = { text, id: null };
  turns.push(turn);
  show(turn);
}

// What was said before the page was loaded, and the answer that may still be coming.
async function goOn() {
  for (const turn of [...turns]) await show(turn);
}

async function show(turn) {
  const mine = (chatting = new AbortController());
  const waiting = new AbortController();
  const told = turns;
  working(true);
  line("user", turn.text);
  const answer = line("assistant", "");
  chatStatus("sent");
  try {
    chatStatus(await receive(turn, told, answer, mine.signal, waiting));
  } catch (error) {
    told.splice(told.indexOf(turn), 1);
    if (mine.signal.aborted && turn.id) cancel(turn.id);
    // Of a conversation that has been given up nothing more is said.
    if (told !== turns) return;
    keep();
    if (!answer.textContent) answer.remove();
    line("failure", mine.signal.aborted ? "stopped" : error.message);
    chatStatus(mine.signal.aborted ? "stopped" : "no answer");
  } finally {
    waiting.abort();
    if (chatting === mine) {
      chatting = null;
      working(false);
    }
  }
}

const cancel = (id) => cancelRequest(id).catch(() => {});

// Asks, or takes the answer up again, and writes it as it comes; how long it took. `waiting` ends with the first token.
async function receive(turn, told, answer, signal, waiting) {
  const begun = performance.now();
  const since = () => seconds((performance.now() - begun) / 1000);
  let first = "", pieces = 0, last = -1, reasoning;

  function take({ type, sequence_number: number, delta, response }) {
    last = number;
    if (response && !turn.id) {
      turn.id = response.id;
      keep();
    }
    if (type === "response.failed") throw Object.assign(new Error(response.error?.message ?? "cancelled"), { last: true });
    if (type === "response.completed" || type === "response.incomplete") {
      return pieces ? `${first}, ${pieces} pieces in ${since()}` : `an empty answer after ${since()}`;
    }
    const thought = type === "response.reasoning_text.delta";
    if (!thought && type !== "response.output_text.delta") return;
    if (!delta) return;
    if (!pieces) {
      waiting.abort();
      chatStatus((first = `first token after ${since()}`));
    }
    pieces += 1;
    if (thought && !reasoning) answer.before((reasoning = make("p", { className: "reasoning" })));
    (thought ? reasoning : answer).textContent += delta;
    $("chat-log").scrollTop = $("chat-log").scrollHeight;
  }

  while (true) {
    try {
      const response = turn.id
        ? await ask(`/v1/responses/${turn.id}?stream=true&starting_after=${last}`, { signal })
        : await begin(turn, told, signal);
      if (!pieces) tellPlace(turn.id ?? response.headers.get("x-request-id"), waiting.signal);
      for await (const data of events(response)) {
        const ended = take(JSON.parse(data));
        if (ended) return ended;
      }
    } catch (error) {
      // A request that may have been taken is not sent again: nobody would read the first one.
      if (signal.aborted || error.last || !turn.id || (error.status ?? 500) < 500) throw error;
    }
    chatStatus("the connection is lost, the answer goes on");
    await pause(RETRY_MS, signal);
  }
}

function begin(turn, told, signal) {
  const before = told[told.indexOf(turn) - 1]?.id;
  return ask("/v1/responses", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      model: $("chat-model").value,
      input: turn.text,
      stream: true,
      ...(before && { previous_response_id: before }),
    }),
    signal,
  });
}

function working(busy) {
  $("chat-send").disabled = busy;
  $("chat-stop").disabled = !busy;
  // A screen reader reads the answer once it is whole, and not each piece.
  $("chat-log").setAttribute("aria-busy", busy);
  // Not away from where the reader has gone meanwhile.
  const { activeElement } = document;
  if ($("view-chat").hidden) return;
  if (!busy && (activeElement === document.body || $("chat-form").contains(activeElement))) $("chat-message").focus();
}

$("chat-form").addEventListener("submit", chat);
$("chat-stop").addEventListener("click", stop);
$("chat-clear").addEventListener("click", forget);
$("chat-message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("chat-form").requestSubmit();
  }
  if (event.key === "Escape") stop();
});

goOn();
