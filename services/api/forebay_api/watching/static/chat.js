// A chat, to try a model and to see what waiting in the queue is like.

import { $, ask, askRequest, element, events, pause, put, seconds } from "./common.js";

let history = []; // of the conversation; another array once it is another
let chatting = null; // AbortController of the answer that is waited for

const chatStatus = (text) => put($("chat-status"), text);

// The models that chat, or may once they have a worker. A list that has not changed is left alone: it may be open.
export function offerModels(lines, workers) {
  const own = (model) => workers.filter((worker) => worker.model === model);
  const models = [...new Set([...lines, ...workers].map(({ model }) => model))]
    .filter((model) => !own(model).length || own(model).some((worker) => worker.completion_types.includes("chat")));
  const select = $("chat-model");
  const shown = [...select.options].map((option) => option.value);
  if (models.length === shown.length && models.every((model, place) => model === shown[place])) return;
  const chosen = select.value;
  const ready = models.find((model) => own(model).some((worker) => worker.status === "ready"));
  select.replaceChildren(...models.map((model) => new Option(model, model)));
  select.value = models.includes(chosen) ? chosen : ready ?? models[0];
}

export function forgetChat() {
  chatting?.abort();
  history = [];
  $("chat-log").replaceChildren();
  chatStatus(" ");
}

function line(kind, text) {
  const made = element("p", kind, text);
  $("chat-log").append(made);
  $("chat-log").scrollTop = $("chat-log").scrollHeight;
  return made;
}

// The place in the queue, while there is one: asked for once a second by the one who waits.
async function tellPlace(id, signal) {
  while (!signal.aborted) {
    try {
      const { status, position, estimated_wait_s: wait } = await askRequest(id, { signal });
      if (signal.aborted) return;
      if (position) chatStatus(`in the queue: place ${position}${wait ? `, about ${Math.ceil(wait)} s` : ""}`);
      if (status === "processing") chatStatus("running, no token yet");
    } catch {
      // Asked again, unless it is not wanted any more: the answer itself says what is wrong.
    }
    await pause(1000, signal);
  }
}

async function chat(event) {
  event.preventDefault();
  const text = $("chat-message").value.trim();
  if (!text || chatting) return;
  const mine = (chatting = new AbortController());
  const waiting = new AbortController();
  const told = history;
  working(true);
  $("chat-message").value = "";
  line("user", text);
  told.push({ role: "user", content: text });
  const answer = line("assistant", "");
  chatStatus("sent");
  try {
    chatStatus(await receive(told, answer, mine.signal, waiting));
    told.push({ role: "assistant", content: answer.textContent });
  } catch (error) {
    told.pop();
    // Of a conversation that has been given up nothing more is said.
    if (told !== history) return;
    if (!answer.textContent) answer.remove();
    line("failure", mine.signal.aborted ? "stopped" : error.message);
    chatStatus(mine.signal.aborted ? "stopped" : "no answer");
  } finally {
    waiting.abort();
    chatting = null;
    working(false);
  }
}

// Asks, and writes the answer as it comes; how long it took. `waiting` ends with the first token.
async function receive(messages, answer, signal, waiting) {
  const begun = performance.now();
  const since = () => seconds((performance.now() - begun) / 1000);
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    // Early: its headers, and so its id, come while it still waits.
    headers: { "content-type": "application/json", "forebay-stream": "early" },
    body: JSON.stringify({ model: $("chat-model").value, messages, stream: true }),
    signal,
  });
  tellPlace(response.headers.get("x-request-id"), waiting.signal);
  let first = "", pieces = 0, reasoning;
  for await (const data of events(response)) {
    if (data === "[DONE]") return pieces ? `${first}, ${pieces} pieces in ${since()}` : `an empty answer after ${since()}`;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    const { content = "", reasoning_content: thought } = chunk.choices?.[0]?.delta ?? {};
    if (!content && !thought) continue;
    if (!pieces) {
      waiting.abort();
      chatStatus((first = `first token after ${since()}`));
    }
    pieces += 1;
    if (thought) {
      if (!reasoning) answer.before((reasoning = element("p", "reasoning", "")));
      reasoning.textContent += thought;
    }
    answer.textContent += content;
    $("chat-log").scrollTop = $("chat-log").scrollHeight;
  }
  throw new Error("the answer ended early");
}

function working(busy) {
  $("chat-send").disabled = busy;
  $("chat-stop").disabled = !busy;
  // A screen reader reads the answer once it is whole, and not each piece.
  $("chat-log").setAttribute("aria-busy", busy);
  // Not away from where the reader has gone meanwhile.
  const { activeElement } = document;
  if (!busy && (activeElement === document.body || $("chat-form").contains(activeElement))) $("chat-message").focus();
}

$("chat-form").addEventListener("submit", chat);
$("chat-stop").addEventListener("click", () => chatting?.abort());
$("chat-clear").addEventListener("click", forgetChat);
$("chat-message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("chat-form").requestSubmit();
  }
  if (event.key === "Escape") chatting?.abort();
});
