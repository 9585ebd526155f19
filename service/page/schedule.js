// The noise schedule, drawn: alpha_bar, beta and the signal-to-noise ratio alpha_bar / (1 - alpha_bar).

import { element } from "./api.js";

const WIDTH = 600, HEIGHT = 190, TOP = 10;
const LEGEND =
  "Solid: alpha_bar, 0 to 1. Dashed: beta, to its greatest value. Dotted: signal-to-noise ratio, 10⁻⁶ to 10⁶.";
let alphaBar = [];

const x = (t) => (t / Math.max(1, alphaBar.length - 1)) * WIDTH;

export function drawSchedule(schedule) {
  alphaBar = schedule.alpha_bar;
  const snr = alphaBar.map((value) => Math.max(-6, Math.min(6, Math.log10(value / (1 - value)))));
  const most = Math.max(...schedule.beta);
  const chart = element("chart");
  const add = (name, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    chart.append(node);
  };
  const y = (share) => (TOP + (1 - share) * HEIGHT).toFixed(1);
  const line = (values, share) =>
    values.map((value, t) => `${t ? "L" : "M"}${x(t).toFixed(1)} ${y(share(value))}`).join("");
  add("line", { x1: 0, x2: WIDTH, y1: TOP + HEIGHT, y2: TOP + HEIGHT });
  add("path", { class: "alpha_bar", d: line(alphaBar, (value) => value) });
  add("path", { class: "beta", d: line(schedule.beta, (value) => value / most) });
  add("path", { class: "snr", d: line(snr, (value) => (value + 6) / 12) });
  add("line", { id: "now", y1: TOP, y2: TOP + HEIGHT, x1: 0, x2: 0, visibility: "hidden" });
  element("last-t").textContent = `t = ${alphaBar.length - 1}`;
  markTime(null);
}

// alpha_bar at t, between whole timesteps by a line in log sigma, as the server has it.
function levelAt(t) {
  const low = Math.floor(t);
  if (low === t) return alphaBar[t];
  const [cleaner, noisier] = [alphaBar[low], alphaBar[low + 1]].map((level) => Math.log(level / (1 - level)));
  return 1 / (1 + Math.exp(-(cleaner + (t - low) * (noisier - cleaner))));
}

// Mark a timestep in the chart, or none.
export function markTime(t) {
  const now = element("now");
  if (!now) return;
  now.setAttribute("visibility", t === null ? "hidden" : "visible");
  element("chart-legend").textContent = LEGEND;
  element("chart-now").textContent = "";
  if (t === null) return;
  for (const end of ["x1", "x2"]) now.setAttribute(end, x(t).toFixed(1));
  const level = levelAt(t);
  const ratio = level / (1 - level);
  element("chart-now").textContent =
    `At t = ${t}: alpha_bar ${level.toPrecision(3)}, signal-to-noise ${ratio.toPrecision(3)}.`;
}
