// What the parts of the page share: elements, times, and how the api is asked.

const KEY = "forebay-api-key";

export const FINAL = new Set(["completed", "failed", "cancelled", "timed_out"]);

export const $ = (id) => document.getElementById(id);
export const usedKey = () => sessionStorage.getItem(KEY) ?? "";
export const say = (text) => put($("message"), text);
export const spaced = (name) => name.replaceAll("_", " ");
export const count = (value) => value.toLocaleString();
export const many = (number, one, several = `${one}s`) => `${count(number)} ${number === 1 ? one : several}`;

export function useKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

// Written only where it changes: what is selected stays so, and a screen reader says it once.
export function put(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

// An element; of `properties` the ones with a dash, `role` and `for` are attributes.
export function make(name, properties = {}, ...content) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (key.includes("-") || key === "role" || key === "for") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...content.filter((one) => one !== null && one !== undefined));
  return made;
}

// --- Times: `at` is seconds since the epoch, shown local, with UTC on hover ---

export function seconds(value) {
  const left = Math.max(value, 0);
  if (left < 60) return `${left.toFixed(2)} s`;
  if (left < 3600) return `${Math.floor(left / 60)} min ${Math.floor(left % 60)} s`;
  if (left < 172_800) return `${Math.floor(left / 3600)} h ${Math.floor((left % 3600) / 60)} min`;
  return `${Math.floor(left / 86_400)} days`;
}

export const utc = (at) => new Date(at * 1000).toISOString().replace("T", " ").replace("Z", " UTC");
export const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hourCycle: "h23" });
export const exact = (at) => `${clock(at)}.${String(Math.floor((at % 1) * 1000)).padStart(3, "0")}`;

export function day(at) {
  const date = new Date(at * 1000);
  return date.toDateString() === new Date().toDateString() ? clock(at) : date.toLocaleString([], { hourCycle: "h23" });
}

export const time = (at, text = day(at)) => make("time", { dateTime: new Date(at * 1000).toISOString(), title: utc(at) }, text);

// How long a request has waited for its first attempt, and run since.
export function times({ status, queued_at, started_at, finished_at }, now) {
  // Handed over, it waits again, though it had been started.
  if (status === "queued") return { waited: seconds(now - queued_at), ran: "" };
  return {
    waited: seconds((started_at ?? finished_at ?? now) - queued_at),
    ran: started_at ? seconds((finished_at ?? now) - started_at) : "",
  };
}

// --- The api ---

// Its answer; what it refuses is thrown as an Error with its `status` and `code`.
export async function ask(path, options = {}) {
  const key = usedKey();
  const headers = key ? { ...options.headers, authorization: `Bearer ${key}` } : options.headers;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const { message, code } = await response.json().then((body) => body.error, () => ({}));
  throw Object.assign(new Error(message ?? `HTTP ${response.status}`), { status: response.status, code });
}

export const get = async (path, options) => (await ask(path, options)).json();
export const post = (path, body) => get(path, {
  method: "POST", headers: { "content-type": "application/json" }, ...(body && { body: JSON.stringify(body) }),
});

const requestPath = (id) => `/v1/queue/request/${encodeURIComponent(id)}`;
export const getRequest = (id, options) => get(requestPath(id), options);
export const getAnswer = (id) => get(`${requestPath(id)}/answer`);
export const cancelRequest = (id) => get(requestPath(id), { method: "DELETE" });
export const retryRequest = (id) => post(`${requestPath(id)}/retry`);

export const pause = (ms, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });

// The data of each event of a server-sent stream. EventSource cannot send the key, so the body is read here.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data: "));
      if (lines.length) yield lines.map((line) => line.slice(6)).join("\n");
    }
  }
}

// --- A question before something is done ---

// Resolves to false, or to what is chosen: {seconds} with `choice`, else {}.
export function sure({ title, text, yes, choice = false }) {
  const dialog = $("ask");
  put($("ask-title"), title);
  put($("ask-text"), text);
  put($("ask-yes"), yes);
  $("ask-choice").hidden = !choice;
  dialog.returnValue = "";
  return new Promise((resolve) => {
    $("ask-yes").onclick = () => dialog.close("yes");
    $("ask-no").onclick = () => dialog.close("");
    dialog.onclose = () => resolve(dialog.returnValue === "yes" && { seconds: Number($("ask-for").value) || null });
    dialog.showModal();
  });
}
