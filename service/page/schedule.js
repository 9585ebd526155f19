// The noise schedule, drawn: alpha_bar, beta and the signal-to-noise ratio alpha_bar / (1 - alpha_bar). Also a slider of t.

import { element } from "./api.js";
import { onTime, setTime, time } from "./film.js";

const WIDTH = 600, HEIGHT = 200, QUARTERS = [0, 1, 2, 3, 4];
const plot = element("plot"), chart = element("chart");
let alphaBar = [], beta = [];

const last = () => alphaBar.length - 1;
/** Noise is on the left, as in the filmstrip. */
const x = (t) => (1 - t / Math.max(1, last())) * WIDTH;

function add(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  chart.append(node);
}

export function drawSchedule(schedule) {
  ({ alpha_bar: alphaBar, beta } = schedule);
  const snr = alphaBar.map((value) => Math.max(-6, Math.min(6, Math.log10(value / (1 - value)))));
  const most = Math.max(...beta);
  const y = (share) => ((1 - share) * HEIGHT).toFixed(1);
  const line = (values, share) =>
    values.map((value, t) => `${t ? "L" : "M"}${x(t).toFixed(1)} ${y(share(value))}`).join("");
  for (const quarter of QUARTERS) {
    const [across, down] = [(quarter * WIDTH) / 4, (quarter * HEIGHT) / 4];
    add("line", { class: "rule", x1: 0, x2: WIDTH, y1: down, y2: down });
    add("line", { class: "rule", x1: across, x2: across, y1: 0, y2: HEIGHT });
  }
  add("path", { class: "snr", d: line(snr, (value) => (value + 6) / 12) });
  add("path", { class: "beta", d: line(beta, (value) => value / most) });
  add("path", { class: "alpha_bar", d: line(alphaBar, (value) => value) });
  add("line", { id: "now", y1: 0, y2: HEIGHT, x1: 0, x2: 0, visibility: "hidden" });
  element("ticks").replaceChildren(
    ...QUARTERS.map((quarter) =>
      Object.assign(document.createElement("span"), { textContent: Math.round(last() * (1 - quarter / 4)) }),
    ),
  );
  element("chart-legend").replaceChildren(
    key("alpha_bar", "alpha_bar, 0 to 1 (left)"),
    key("beta", `beta, noise added per step, 0 to ${most.toPrecision(2)}`),
    key("snr", "signal-to-noise ratio (right)"),
  );
  plot.ariaValueMax = last();
  mark(null);
}

function key(name, text) {
  const entry = document.createElement("span");
  entry.append(Object.assign(document.createElement("i"), { className: `key ${name}` }), text);
  return entry;
}

// alpha_bar at t, between whole timesteps by a line in log sigma, as the server has it.
function levelAt(t) {
  const low = Math.floor(t);
  if (low === t) return alphaBar[t];
  const [cleaner, noisier] = [alphaBar[low], alphaBar[low + 1]].map((level) => Math.log(level / (1 - level)));
  return 1 / (1 + Math.exp(-(cleaner + (t - low) * (noisier - cleaner))));
}

function mark(t) {
  const now = element("now");
  if (!now) return;
  now.setAttribute("visibility", t === null ? "hidden" : "visible");
  element("chart-now").textContent = "";
  if (t === null) return;
  for (const end of ["x1", "x2"]) now.setAttribute(end, x(t).toFixed(1));
  const level = levelAt(t);
  const ratio = level / (1 - level);
  const text = `At t = ${t}: alpha_bar ${level.toPrecision(3)}, beta ${beta[Math.floor(t)].toPrecision(2)}, `;
  element("chart-now").textContent = `${text}signal-to-noise ${ratio.toPrecision(3)}.`;
  plot.ariaValueNow = last() - t; // of a slider it grows to the right
  plot.ariaValueText = `t = ${t}, alpha_bar ${level.toPrecision(2)}`;
}

function timeUnder(event) {
  const box = chart.getBoundingClientRect();
  return Math.round(last() * Math.max(0, Math.min(1, 1 - (event.clientX - box.left) / box.width)));
}

onTime(mark);
plot.addEventListener("pointermove", (event) => {
  if (!last()) return;
  if (event.pointerType === "mouse" && !event.buttons) setTime(timeUnder(event), "hover");
  else if (plot.hasPointerCapture(event.pointerId)) setTime(timeUnder(event), "plot");
});
plot.addEventListener("pointerdown", (event) => {
  if (!last()) return;
  plot.setPointerCapture(event.pointerId);
  setTime(timeUnder(event), "plot");
});
plot.addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.round(last() / 20));
  // To the right and up is on to the image.
  const by = {
    ArrowRight: -1, ArrowUp: -1, ArrowLeft: 1, ArrowDown: 1, PageUp: -page, PageDown: page, Home: last(), End: -last(),
  }[event.key];
  if (!by) return;
  event.preventDefault();
  setTime(Math.max(0, Math.min(last(), Math.round((time ?? last()) + by))), "plot");
});
