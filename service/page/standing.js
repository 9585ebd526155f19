// Where a job stands, in words and as a bar.

import { element, seconds } from "./api.js";

export function say(text) {
  if (element("status").textContent !== text) element("status").textContent = text; // a reader says each change
}

// Of a job that waits or runs.
export function showForecast({ state, position, eta_s: eta }) {
  if (state === "running") say("Running.");
  else if (eta === null || eta === undefined) say("Waiting.");
  else if (position) say(`Waiting: ${position === 1 ? "1 job" : `${position} jobs`} ahead, done in about ${seconds(eta)}.`);
  else say(`Begun, done in about ${seconds(eta)}.`);
}

// t is not told by a GET, and eta_s may not be known.
export function showStep({ step, steps, t, eta_s: eta }) {
  const parts = [`Step ${step} of ${steps}`];
  if (t !== undefined) parts.push(`t = ${t}`);
  showProgress(step / steps, parts.join(", "));
  if (typeof eta === "number") element("left-text").textContent = `, ${seconds(eta)} left`;
}

export function showProgress(share, text) {
  element("progress").value = share;
  element("step-text").textContent = text;
  forgetForecast();
}

export function forgetForecast() {
  element("left-text").textContent = "";
}
