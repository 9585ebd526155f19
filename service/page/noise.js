// The forward process: an uploaded image, as x_t at any t.

import { ask, element } from "./api.js";
import { markTime } from "./schedule.js";

let image = null;
let asking = null; // the question under way; a newer one takes its place
let shown = null;

export function setUpNoise(model) {
  const slider = element("noise-t");
  slider.max = model.num_timesteps - 1;
  slider.value = Math.floor(model.num_timesteps / 4);
  slider.addEventListener("input", show);
  element("noise-seed").addEventListener("change", show);
  element("noise-file").addEventListener("change", (event) => take(event.target.files[0]));
  addEventListener("dragover", (event) => event.preventDefault()); // or the browser would open the file
  addEventListener("drop", (event) => {
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  tell(slider.value);
}

function take(file) {
  if (!file) return;
  image = file;
  element("noise-name").textContent = file.name;
  element("noise").scrollIntoView({ block: "nearest" });
  show();
}

function tell(t) {
  element("noise-t-text").textContent = `t = ${t}`;
  element("noise-t").setAttribute("aria-valuetext", `t = ${t}`);
}

async function show() {
  const t = Number(element("noise-t").value);
  tell(t);
  if (!image) return;
  markTime(t);
  asking?.abort();
  const mine = (asking = new AbortController());
  try {
    const query = new URLSearchParams({ t, seed: element("noise-seed").value || "0" });
    const headers = { "Content-Type": "application/octet-stream" };
    const response = await ask(`noise?${query}`, { method: "POST", headers, body: image, signal: mine.signal });
    const url = URL.createObjectURL(await response.blob());
    if (mine !== asking) return;
    if (shown) URL.revokeObjectURL(shown);
    shown = url;
    element("noise-image").src = url;
    element("noise-image").alt = `The image at t = ${t}`;
    element("noise-error").textContent = "";
    const alphaBar = Number(response.headers.get("X-Alpha-Bar"));
    element("noise-text").textContent =
      `x_t = ${Math.sqrt(alphaBar).toFixed(3)} x_0 + ${Math.sqrt(1 - alphaBar).toFixed(3)} eps`;
  } catch (error) {
    if (error.name !== "AbortError") element("noise-error").textContent = `${error.message}.`;
  }
}
