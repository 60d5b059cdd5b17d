// A table of requests: rows that change in place, hold still under the pointer and the focus, and are one tab stop.

import { FINAL, cancelRequest, clock, make, put, retryRequest, say, spaced, times, utc } from "./common.js";

const hovers = matchMedia("(hover: hover)");

// `body` is the <tbody>, `columns` the names of its cells. `chosen` (ids) and `onChoose` make rows selectable.
export function requestRows(body, columns, { chosen, onChoose, onNew, onAct } = {}) {
  const rows = new Map(); // id → { row, cells, state }
  let now = Date.now() / 1000;
  let order = []; // the states that are to be shown
  let visited = null; // the row that had the focus last, where Tab comes back to

  // While somebody points at a row, or has come to it by keyboard, no row moves: what is new waits.
  const held = () => (hovers.matches && body.matches(":hover")) || body.querySelector(":focus-visible") !== null;

  // `fresh`: they are of another filter or page, so none holds still.
  function show(states, at, fresh = false) {
    now = at;
    order = states;
    arrange(!fresh && held());
  }

  function arrange(still = held()) {
    const wanted = new Map(order.map((state) => [state.id, state]));
    for (const [id, one] of rows) {
      one.row.classList.toggle("gone", !wanted.has(id));
      fill(one, wanted.get(id) ?? one.state);
    }
    onNew?.(still ? order.filter(({ id }) => !rows.has(id)).length : 0);
    if (still) return;
    for (const [id, { row }] of rows) {
      if (wanted.has(id)) continue;
      row.remove();
      rows.delete(id);
    }
    order.forEach((state, place) => {
      const { row } = rows.get(state.id) ?? add(state);
      const there = body.rows[place];
      if (there !== row) body.insertBefore(row, there ?? null);
    });
    enterAt(visited?.isConnected ? visited : body.rows[0]);
  }

  // The one row that Tab leads to.
  function enterAt(row) {
    for (const other of body.querySelectorAll("tr[tabindex='0']")) other.tabIndex = -1;
    if (row) row.tabIndex = 0;
  }

  function add(state) {
    const cells = Object.fromEntries(columns.map((name) => [name, make("td", { className: name, role: "gridcell", "data-label": spaced(name) })]));
    const row = make("tr", { role: "row", tabIndex: -1 }, ...Object.values(cells));
    row.dataset.id = state.id;
    if (cells.choose) {
      const box = make("input", { type: "checkbox", tabIndex: -1, "aria-label": `Select ${state.id}` });
      box.addEventListener("change", () => choose(state.id, box.checked));
      cells.choose.append(box);
    }
    cells.id.append(make("a", { href: `#/request/${state.id}`, tabIndex: -1, title: state.id }, state.id.slice(0, 8)));
    cells.action.append(
      make("button", { type: "button", tabIndex: -1, "aria-label": `Cancel ${state.id}`, onclick: () => act(state.id, "cancel") }, "Cancel"),
      make("button", { type: "button", tabIndex: -1, "aria-label": `Run ${state.id} again`, onclick: () => act(state.id, "retry") }, "Run again"),
    );
    cells.error?.append(make("div"), make("div", { className: "quiet" }));
    const one = { row, cells, state };
    rows.set(state.id, one);
    fill(one, state);
    return one;
  }

  function fill(one, state) {
    const { row, cells } = one;
    one.state = state;
    const tier = state.tier && state.tier !== "default" ? ` · ${state.tier}` : "";
    const texts = {
      status: spaced(state.status), type: state.completion_type + tier, model: state.model.split("/").at(-1), key: state.key ?? "",
      worker: state.worker ?? "", queued: clock(state.queued_at), attempt: state.attempt > 1 ? state.attempt : "", ...times(state, now),
    };
    for (const [name, text] of Object.entries(texts)) if (cells[name]) put(cells[name], text);
    cells.status.className = `status state-${state.status}`;
    if (cells.queued) cells.queued.title = utc(state.queued_at);
    cells.model.title = state.model;
    if (cells.error) {
      const [error, fault] = cells.error.children;
      put(error, state.error ?? "");
      put(fault, state.fault ?? "");
      cells.error.classList.toggle("none", !state.error && !state.fault);
    }
    const [cancel, again] = cells.action.children;
    const ended = FINAL.has(state.status);
    // The focus keeps its place, and on no other button, where one more Enter would cancel what was not meant.
    if (ended && document.activeElement === cancel) row.focus({ preventScroll: true });
    cancel.hidden = ended;
    again.hidden = !state.retryable;
    cells.action.classList.toggle("none", ended && !state.retryable);
    if (cells.choose) {
      const selected = chosen.has(state.id);
      row.setAttribute("aria-selected", selected);
      cells.choose.firstChild.checked = selected;
    }
  }

  function choose(id, on) {
    if (on) chosen.add(id);
    else chosen.delete(id);
    fill(rows.get(id), rows.get(id).state);
    onChoose();
  }

  async function act(id, what) {
    await acts[what](id);
    onAct?.();
  }

  body.addEventListener("focusin", ({ target }) => {
    visited = target.closest("tr");
    enterAt(visited);
  });
  body.addEventListener("keydown", (event) => {
    const row = event.target;
    if (row.tagName !== "TR" || event.ctrlKey || event.metaKey || event.altKey) return;
    const { id } = row.dataset;
    const { state } = rows.get(id);
    const to = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling, Home: body.rows[0], End: body.rows[body.rows.length - 1] };
    if (event.key in to) to[event.key]?.focus();
    else if (event.key === "Enter") location.hash = `#/request/${id}`;
    else if (event.key === " " && chosen) choose(id, !chosen.has(id));
    else if (event.key === "Delete" && !FINAL.has(state.status)) act(id, "cancel");
    else return;
    event.preventDefault();
  });
  // Later, when the pointer and the focus are where they went.
  for (const left of ["pointerleave", "focusout"]) body.addEventListener(left, () => setTimeout(arrange));

  return {
    show,
    // Between two lists: the times of those that have not ended go on.
    tick: (at) => {
      now = at;
      for (const one of rows.values()) if (!FINAL.has(one.state.status)) fill(one, one.state);
    },
    refill: () => rows.forEach((one) => fill(one, one.state)),
    get states() { return [...rows.values()].map(({ state }) => state); },
    forget: () => {
      rows.clear();
      order = [];
      body.replaceChildren();
    },
  };
}

export const acts = {
  async cancel(id, tell = say) {
    try {
      const answer = await cancelRequest(id);
      tell(answer.cancelled ? `${id} was cancelled` : `${id} has ended already: ${spaced(answer.status)}`);
      return answer.cancelled;
    } catch (error) {
      tell(`${id} was not cancelled: ${error.message}`);
      return false;
    }
  },
  async retry(id, tell = say) {
    try {
      tell(`${id} runs again as ${(await retryRequest(id)).retried_as}`);
      return true;
    } catch (error) {
      tell(`${id} does not run again: ${error.message}`);
      return false;
    }
  },
};
