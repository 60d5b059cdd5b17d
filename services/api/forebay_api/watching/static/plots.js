// Plots by uPlot (MIT, uplot.LICENSE) in the page's colours.

import { clock } from "./common.js";

const COLOURS = ["--processing", "--waiting", "--room", "--good", "--bad", "--c6", "--c7", "--c8"];

const plots = new Set();

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Draws `series` ([{label, colour}]) into `element`; `marks()` gives times at which a line is drawn from top to bottom.
export function plot(element, { series, marks = () => [], height = 180 }) {
  const axis = { stroke: () => colour("--quiet"), grid: { stroke: () => colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
  const options = {
    width: Math.max(element.clientWidth, 200), height,
    legend: { live: true },
    cursor: { drag: { x: false, y: false } },
    scales: { y: { range: (_, low, high) => [0, Math.max(high * 1.1, 4)] } },
    axes: [
      { ...axis, space: 80, values: (_, ticks) => ticks.map((at) => (ticks.at(-1) - ticks[0] < 600 ? clock(at) : clock(at).slice(0, 5))) },
      { ...axis, size: 44, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6, 1e7], values: (_, ticks) => ticks.map((value) => (value >= 10_000 ? `${value / 1000}k` : value)) },
    ],
    series: [
      { label: "at", value: (_, at) => (at ? clock(at) : "–") },
      ...series.map(({ label, colour: name }, place) => ({
        label, width: 1.5, points: { show: false },
        stroke: () => colour(name ?? COLOURS[place % COLOURS.length]),
        value: (_, value) => (value ?? "–"),
      })),
    ],
    hooks: { draw: [(u) => drawMarks(u, marks())] },
  };
  element.replaceChildren();
  const made = new uPlot(options, [[], ...series.map(() => [])], element);
  const resized = new ResizeObserver(() => {
    const width = element.clientWidth;
    if (width && width !== made.width) made.setSize({ width, height });
  });
  resized.observe(element);
  plots.add(made);
  return {
    draw: (data, label) => {
      made.setData(data);
      element.setAttribute("aria-label", label);
    },
    end: () => {
      resized.disconnect();
      plots.delete(made);
      made.destroy();
      element.replaceChildren();
      element.setAttribute("aria-label", "no data yet");
    },
  };
}

function drawMarks(u, marks) {
  const { left, top, width, height } = u.bbox;
  u.ctx.save();
  u.ctx.strokeStyle = colour("--bad");
  u.ctx.setLineDash([4, 4]);
  for (const at of marks) {
    const x = u.valToPos(at, "x", true);
    if (x < left || x > left + width) continue;
    u.ctx.beginPath();
    u.ctx.moveTo(x, top);
    u.ctx.lineTo(x, top + height);
    u.ctx.stroke();
  }
  u.ctx.restore();
}

// After light has become dark, or the other way round.
export function redrawPlots() {
  for (const one of plots) one.redraw(false, true);
}
