// The page that shows the queue: fed by GET /v1/queue/events, with no library and no request to anywhere else.

const FINAL = new Set(["completed", "failed", "cancelled", "timed_out"]);
const MAX_ROWS = 50;
const CHART_SECONDS = 120;
const RETRY_MS = [500, 1000, 2000, 5000];
const KEY = "forebay-api-key";

const $ = (id) => document.getElementById(id);
const requests = new Map(); // id → its newest state
const rows = new Map(); // id → its table row
const samples = []; // {at, waiting, processing, completed}
let feed = null; // AbortController of the connection to the feed
let last = null; // the newest message of the feed

const headers = (more = {}) => {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
};

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP ${response.status}`;
  }
}

const pause = (ms, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); });
  });

// Each event of a server-sent stream as {event, data}. EventSource cannot send the key, so the body is read here.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const found = { event: "message", data: "" };
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) found.event = line.slice(7);
        if (line.startsWith("data: ")) found.data += line.slice(6);
      }
      if (found.data) yield found;
    }
  }
}

// --- The feed ---

async function watch() {
  feed?.abort();
  const mine = (feed = new AbortController());
  for (let tries = 0; !mine.signal.aborted; tries += 1) {
    let why = "the api closed the connection";
    try {
      const response = await fetch("/v1/queue/events", { headers: headers(), signal: mine.signal });
      if (response.ok) {
        loadModels();
        for await (const message of events(response)) {
          tries = 0;
          show(JSON.parse(message.data));
        }
      } else {
        why = await failure(response);
        if (response.status === 401) {
          connection("bad", "an API key is needed");
          say(why);
          return;
        }
      }
    } catch (error) {
      why = error.message;
    }
    if (mine.signal.aborted) return;
    connection("bad", `no connection to the api: ${why}`);
    await pause(RETRY_MS[Math.min(tries, RETRY_MS.length - 1)], mine.signal);
  }
}

function connection(kind, text) {
  const badge = $("connection");
  badge.className = `badge ${kind}`;
  // Written only when it changes, so that a screen reader says it once.
  if (badge.textContent !== text) badge.textContent = text;
}

function show(message) {
  last = message;
  const { status } = message;
  for (const state of message.requests) requests.set(state.id, state);
  if (!message.connected || !status) connection("bad", "NATS cannot be reached");
  else if (!status.is_running) connection("bad", "no worker is ready");
  else connection("good", "live");
  if (status) showNumbers(message.at, status);
  showModels(status?.models ?? [], message.workers);
  showRequests();
}

function showNumbers(at, status) {
  for (const [name, value] of Object.entries(status)) {
    const cell = document.querySelector(`#tiles #${name}`);
    if (cell) cell.textContent = value;
  }
  const newest = samples.at(-1);
  if (newest && at < newest.at) samples.length = 0;
  samples.push({ at, waiting: status.queue_size, processing: status.processing_count, completed: status.total_processed });
  while (samples[0].at < at - CHART_SECONDS) samples.shift();
  const since = samples.find((sample) => sample.at >= at - 10);
  const rate = at > since.at ? (status.total_processed - since.completed) / (at - since.at) : 0;
  $("rate").textContent = rate ? `${rate.toFixed(1)}/s` : "";
  draw(at);
}

function draw(now) {
  const width = 600, height = 140;
  const top = Math.max(4, ...samples.map((sample) => Math.max(sample.waiting, sample.processing)));
  const span = Math.min(Math.max(now - samples[0].at, 20), CHART_SECONDS);
  const x = (at) => (width * (1 - (now - at) / span)).toFixed(1);
  const y = (value) => (height - 2 - (value / top) * (height - 10)).toFixed(1);
  const shapes = [shape("path", { class: "grid", d: `M0 ${y(top / 2)}H${width}M0 ${y(top)}H${width}` })];
  for (const name of ["waiting", "processing"]) {
    const points = samples.map((sample) => `${x(sample.at)} ${y(sample[name])}`).join("L");
    shapes.push(shape("path", { class: `area ${name}`, d: `M${x(samples[0].at)} ${height}L${points}L${width} ${height}Z` }));
    shapes.push(shape("path", { class: `line ${name}`, d: `M${points}` }));
  }
  $("chart").replaceChildren(...shapes);
  $("chart-text").textContent = `the last ${Math.round(span)} s`;
  $("chart-top").textContent = `top of the picture: ${top}`;
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function row(cells) {
  const made = document.createElement("tr");
  for (const cell of cells) {
    const [text, look] = Array.isArray(cell) ? cell : [cell, ""];
    const made_cell = document.createElement("td");
    made_cell.textContent = text ?? "";
    made_cell.className = look;
    made.append(made_cell);
  }
  return made;
}

function showModels(models, workers) {
  const ready = (model) => workers.filter((worker) => worker.model === model && worker.status === "ready").length;
  $("models").replaceChildren(...models.map((line) => {
    let state = [`${ready(line.model)} ready`, "state-ready"];
    if (!ready(line.model)) state = ["no worker", "state-failed"];
    if (line.paused_until) state = [`paused${until(line.paused_until)}`, "state-paused"];
    return row([line.model, line.waiting, `${line.processing} of ${line.max_concurrent}`, state]);
  }));
  $("workers").replaceChildren(...workers.map((worker) => row([
    [worker.id, "id"], worker.model, [worker.progress ?? worker.status, `state-${worker.status}`],
    `${worker.busy} of ${worker.slots}`, worker.device, worker.engine,
  ])));
}

// --- Requests ---

const DAY_S = 86_400;
const until = (at) => (at - last.at > 365 * DAY_S ? "" : ` until ${new Date(at * 1000).toLocaleString()}`);
const clock = (at) => new Date(at * 1000).toLocaleTimeString();
const seconds = (value) => `${Math.max(value, 0).toFixed(2)} s`;

function times(state) {
  const now = last?.at ?? Date.now() / 1000;
  const waited = (state.started_at ?? state.finished_at ?? now) - state.queued_at;
  return [seconds(waited), state.started_at ? seconds((state.finished_at ?? now) - state.started_at) : ""];
}

function showRequests() {
  const newest = [...requests.values()].sort((a, b) => b.queued_at - a.queued_at);
  for (const state of newest.splice(MAX_ROWS)) requests.delete(state.id);
  for (const [id, kept] of rows) {
    if (!requests.has(id)) {
      kept.remove();
      rows.delete(id);
    }
  }
  const body = $("requests");
  newest.forEach((state, place) => {
    // Rows stay the same elements, so that the focus stays on a button while the table moves.
    let kept = rows.get(state.id);
    if (!kept) {
      kept = row([[state.id, "id"], "", state.completion_type, state.model, clock(state.queued_at), "", "", "", ["", "error"], ""]);
      const cancel = document.createElement("button");
      cancel.textContent = "Cancel";
      cancel.setAttribute("aria-label", `Cancel ${state.id}`);
      cancel.addEventListener("click", () => cancelRequest(state.id));
      kept.lastChild.append(cancel);
      rows.set(state.id, kept);
    }
    const [, status, , , , waited, ran, attempt, error, action] = kept.children;
    status.textContent = state.status.replace("_", " ");
    status.className = `state-${state.status}`;
    [waited.textContent, ran.textContent] = times(state);
    attempt.textContent = state.attempt || "";
    error.textContent = state.error ?? "";
    action.firstChild.hidden = FINAL.has(state.status);
    if (body.children[place] !== kept) body.insertBefore(kept, body.children[place] ?? null);
  });
}

function say(text) {
  $("message").textContent = text;
}

async function cancelRequest(id) {
  try {
    const response = await fetch(`/v1/queue/request/${encodeURIComponent(id)}`, { method: "DELETE", headers: headers() });
    if (!response.ok) return say(await failure(response));
    const answer = await response.json();
    say(answer.cancelled ? `${id} is cancelled` : `${id} had ended before: ${answer.status}`);
  } catch (error) {
    say(`not cancelled: ${error.message}`);
  }
}

async function lookUp(event) {
  event.preventDefault();
  const id = $("look-id").value.trim();
  const result = $("look-result");
  try {
    const response = await fetch(`/v1/queue/request/${encodeURIComponent(id)}`, { headers: headers() });
    if (!response.ok) {
      result.textContent = await failure(response);
      return;
    }
    const state = await response.json();
    const [waited, ran] = times(state);
    const list = document.createElement("dl");
    const shown = { status: state.status, error: state.error, ...state, waited, ran };
    for (const [name, value] of Object.entries(shown)) {
      if (value === null || value === "") continue;
      const term = document.createElement("dt");
      term.textContent = name.replace("_", " ");
      const text = document.createElement("dd");
      if (name === "status") text.className = `state-${value}`;
      text.textContent = name.endsWith("_at") || name === "timestamp" || name === "deadline"
        ? new Date(value * 1000).toLocaleString()
        : typeof value === "object" ? JSON.stringify(value) : value;
      list.append(term, text);
    }
    result.replaceChildren(list);
    if (!FINAL.has(state.status)) {
      const cancel = document.createElement("button");
      cancel.textContent = "Cancel it";
      cancel.addEventListener("click", () => cancelRequest(id).then(() => $("look-form").requestSubmit()));
      result.append(cancel);
    }
  } catch (error) {
    result.textContent = error.message;
  }
}

// --- Chat ---

const history = [];
let chatting = null; // AbortController of the answer that is waited for

async function loadModels() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) return;
    const chosen = $("chat-model").value;
    const models = (await response.json()).data.filter(
      (model) => !model.completion_types.length || model.completion_types.includes("chat"),
    );
    $("chat-model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    if (models.some((model) => model.id === chosen)) $("chat-model").value = chosen;
  } catch {
    // The feed says what is wrong, and comes here again once it is back.
  }
}

function line(kind, text) {
  const made = document.createElement("p");
  made.className = kind;
  made.textContent = text;
  $("chat-log").append(made);
  $("chat-log").scrollTop = $("chat-log").scrollHeight;
  return made;
}

function chatStatus(text) {
  if ($("chat-status").textContent !== text) $("chat-status").textContent = text;
}

// The place in the queue, while there is one: asked for once a second by the one who waits.
async function tellPlace(id, signal) {
  while (!signal.aborted) {
    try {
      const response = await fetch(`/v1/queue/request/${id}`, { headers: headers(), signal });
      if (response.ok) {
        const state = await response.json();
        if (signal.aborted) return;
        if (state.position) {
          const wait = state.estimated_wait_s ? `, about ${Math.ceil(state.estimated_wait_s)} s` : "";
          chatStatus(`in the queue: place ${state.position}${wait}`);
        }
        if (state.status === "processing") chatStatus("a worker has it; no token yet");
      }
    } catch {
      if (signal.aborted) return;
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
  $("chat-message").value = "";
  $("chat-send").disabled = true;
  $("chat-stop").disabled = false;
  line("user", text);
  history.push({ role: "user", content: text });
  const answer = line("assistant", "");
  const begun = performance.now();
  let first = null, tokens = 0;
  chatStatus("sent");
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      // Early: its headers, and so its id, come while it still waits.
      headers: headers({ "content-type": "application/json", "forebay-stream": "early" }),
      body: JSON.stringify({ model: $("chat-model").value, messages: history, stream: true }),
      signal: mine.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    tellPlace(response.headers.get("x-request-id"), waiting.signal);
    let ended = false;
    for await (const { data } of events(response)) {
      if (data === "[DONE]") { ended = true; break; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices?.[0]?.delta?.content;
      if (!piece) continue;
      if (first === null) {
        first = performance.now();
        waiting.abort();
        chatStatus(`first token after ${((first - begun) / 1000).toFixed(2)} s`);
      }
      tokens += 1;
      answer.textContent += piece;
      $("chat-log").scrollTop = $("chat-log").scrollHeight;
    }
    if (!ended) throw new Error("the answer broke off");
    const took = (performance.now() - begun) / 1000;
    chatStatus(`first token after ${(((first ?? begun) - begun) / 1000).toFixed(2)} s, ${tokens} pieces in ${took.toFixed(2)} s`);
    history.push({ role: "assistant", content: answer.textContent });
  } catch (error) {
    history.pop();
    if (!answer.textContent) answer.remove();
    line("failure", mine.signal.aborted ? "stopped" : error.message);
    chatStatus(mine.signal.aborted ? "stopped" : "no answer");
  } finally {
    waiting.abort();
    chatting = null;
    $("chat-send").disabled = false;
    $("chat-stop").disabled = true;
    $("chat-message").focus();
  }
}

$("chat-form").addEventListener("submit", chat);
$("chat-stop").addEventListener("click", () => chatting?.abort());
$("chat-clear").addEventListener("click", () => {
  chatting?.abort();
  history.length = 0;
  $("chat-log").replaceChildren();
  chatStatus(" ");
});
$("chat-message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("chat-form").requestSubmit();
  }
  if (event.key === "Escape") chatting?.abort();
});
$("look-form").addEventListener("submit", lookUp);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  say("");
  requests.clear();
  watch();
});
$("key").value = sessionStorage.getItem(KEY) ?? "";
watch();
