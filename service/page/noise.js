// The forward process: the picture of one's own, as x_t at any t.

import { ask, element, reason } from "./api.js";
import { hasPicture, onPicture, pictureBlob, takeFile } from "./picture.js";
import { offer } from "./reproduce.js";
import { onTime, setTime } from "./time.js";

const PAUSE_MS = 150; // that t stands still before the server is asked, where others move it

let asking = null; // the question under way; a newer one takes its place
let shown = null;
let later = null;

export function setUp(model) {
  const slider = element("noise-t");
  slider.max = model.num_timesteps - 1;
  slider.value = Math.floor(model.num_timesteps / 4);
  slider.addEventListener("input", () => {
    setTime(Number(slider.value), "noise");
    show();
  });
  element("noise-seed").addEventListener("change", show);
  const take = (file) => {
    if (!file) return;
    element("noise").scrollIntoView({ block: "nearest" });
    takeFile(file);
    offer(file, model);
  };
  element("noise-file").addEventListener("click", ({ target }) => (target.value = "")); // the same file again is news too
  element("noise-file").addEventListener("change", (event) => take(event.target.files[0]));
  addEventListener("dragover", (event) => event.preventDefault()); // or the browser would open the file
  addEventListener("drop", (event) => {
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  onPicture(() => (hasPicture() ? show() : leave()));
  onTime((t, from) => {
    if (t === null || ["noise", "live"].includes(from)) return;
    slider.value = Math.round(t);
    tell(slider.value);
    clearTimeout(later);
    if (hasPicture()) later = setTimeout(show, PAUSE_MS);
  });
  tell(slider.value);
}

function tell(t) {
  element("noise-t-text").textContent = `t = ${t}`;
  element("noise-t").setAttribute("aria-valuetext", `t = ${t}`);
}

function leave() {
  asking?.abort();
  asking = null;
  element("noise-image").removeAttribute("src");
  if (shown) URL.revokeObjectURL(shown);
  shown = null;
  element("noise-image").alt = "";
  element("noise-text").textContent = "x_t";
  element("noise-error").textContent = "";
}

async function show() {
  const t = Number(element("noise-t").value);
  tell(t);
  if (!hasPicture()) return;
  asking?.abort();
  const mine = (asking = new AbortController());
  try {
    const query = new URLSearchParams({ t, seed: element("noise-seed").value || "0" });
    const headers = { "Content-Type": "application/octet-stream" };
    const body = await pictureBlob(true);
    const response = await ask(`noise?${query}`, { method: "POST", headers, body, signal: mine.signal });
    const url = URL.createObjectURL(await response.blob());
    if (mine !== asking) return URL.revokeObjectURL(url);
    if (shown) URL.revokeObjectURL(shown);
    shown = url;
    element("noise-image").src = url;
    element("noise-image").alt = `The image at t = ${t}`;
    element("noise-error").textContent = "";
    const alphaBar = Number(response.headers.get("X-Alpha-Bar"));
    element("noise-text").textContent =
      `x_t = ${Math.sqrt(alphaBar).toFixed(3)} x_0 + ${Math.sqrt(1 - alphaBar).toFixed(3)} eps`;
  } catch (error) {
    if (error.name !== "AbortError" && mine === asking) element("noise-error").textContent = `${reason(error)}.`;
  }
}
