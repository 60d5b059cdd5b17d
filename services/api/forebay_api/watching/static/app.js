// The page that shows the queue: fed by GET /v1/queue/events, with no library and no request to anywhere else.

import { forgetChat, offerModels } from "./chat.js";
import { $, ask, events, pause, put, useKey, usedKey } from "./common.js";
import { forgetQueue, showQueue } from "./queue.js";
import { forgetRequests, say, showRequests } from "./requests.js";

const RETRY_MS = [500, 1000, 2000, 5000];
const SILENCE_MS = 10_000; // the api says something every second

let feed = null; // AbortController of the connection to the feed

async function watch() {
  feed?.abort();
  const { signal } = (feed = new AbortController());
  for (let tries = 0; ; tries += 1) {
    let why = "the api ended the connection";
    try {
      await follow(signal, () => { tries = 0; });
    } catch (error) {
      if (error.status === 401 && !signal.aborted) {
        forget();
        connection("bad", "an API key is needed");
        say(error.message);
        return;
      }
      why = reason(error);
    }
    if (signal.aborted) return;
    connection("bad", why);
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

function show(message) {
  const { connected, status, workers } = message;
  if (!connected || !status) connection("bad", "NATS cannot be reached");
  else if (!status.is_running) connection("bad", "no worker is ready");
  else connection("good", "live");
  if (status) {
    showQueue(message);
    offerModels(status.models, workers);
  }
  showRequests(message);
}

// What was seen with one key is not for who comes with another.
function forget() {
  forgetQueue();
  forgetRequests();
  forgetChat();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  forget();
  connection("", "connecting");
  watch();
});
$("key").value = usedKey();
watch();
