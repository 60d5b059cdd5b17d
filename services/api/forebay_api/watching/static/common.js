// What the parts of the page share: its elements, and how the api is asked.

const KEY = "forebay-api-key";

export const $ = (id) => document.getElementById(id);
export const seconds = (value) => `${Math.max(value, 0).toFixed(2)} s`;
export const usedKey = () => sessionStorage.getItem(KEY) ?? "";

export function useKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

// Written only where it changes: what is selected stays so, and a screen reader says it once.
export function put(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

export function element(name, className = "", ...content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

// The answer of the api; what it refuses is thrown as an Error with its `status` and `code`.
export async function ask(path, options = {}) {
  const key = usedKey();
  const headers = key ? { ...options.headers, authorization: `Bearer ${key}` } : options.headers;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const { message, code } = await response.json().then((body) => body.error, () => ({}));
  throw Object.assign(new Error(message ?? `HTTP ${response.status}`), { status: response.status, code });
}

export const askRequest = async (id, options) =>
  (await ask(`/v1/queue/request/${encodeURIComponent(id)}`, options)).json();

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
