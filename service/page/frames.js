// The frames of a job as they come, kept so that one can go back: {step, steps, t, x_t, x_0}, pictures as URLs.

import { element } from "./api.js";
import { markTime } from "./schedule.js";

let frames = [];
let following = true; // whether the newest frame is shown; not while somebody looks back

// A step may come in two parts, and again after the connection broke.
export function addFrame({ step, steps, t }, pictures) {
  const last = frames.at(-1);
  if (last && step < last.step) return;
  if (last && last.step === step) Object.assign(last, pictures);
  else frames.push({ step, steps, t, ...pictures });
  const scrub = element("scrub");
  scrub.disabled = false;
  scrub.max = frames.length - 1;
  if (following) showFrame(frames.length - 1);
}

export function clearFrames() {
  frames = [];
  following = true;
  for (const show of ["x_t", "x_0"]) {
    element(show).removeAttribute("src");
    element(show).alt = "";
  }
  Object.assign(element("scrub"), { disabled: true, max: 0, value: 0 });
  element("frame-text").textContent = "";
  markTime(null);
}

function showFrame(at) {
  const frame = frames[at];
  for (const show of ["x_t", "x_0"]) {
    if (!frame[show]) continue;
    element(show).src = frame[show];
    element(show).alt = `${show} after ${frame.step} of ${frame.steps} steps`;
  }
  const scrub = element("scrub");
  scrub.value = at;
  scrub.setAttribute("aria-valuetext", `step ${frame.step} of ${frame.steps}`);
  element("frame-text").textContent = `Frame ${at + 1} of ${frames.length}: after ${frame.step} steps, t = ${frame.t}`;
  markTime(frame.t);
}

element("scrub").addEventListener("input", (event) => {
  const at = Number(event.target.value);
  following = at === frames.length - 1;
  showFrame(at);
});
