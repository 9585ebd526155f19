// The filmstrip: a few frames of the path, evenly chosen. Each is a button that goes there.

import { element } from "./api.js";

const CELLS = 10;
export const SHOWS = ["x_t", "x_0"]; // what is shown of each step

let chosen = []; // the number of the frame in each cell
let pick = () => {};

/** goTo: is called with the number of a frame that is chosen. */
export const onPick = (goTo) => (pick = goTo);

const cells = Array.from({ length: CELLS }, (_, number) => {
  const cell = document.createElement("button");
  cell.type = "button";
  cell.tabIndex = -1;
  cell.disabled = true;
  cell.append(...SHOWS.map(() => Object.assign(new Image(), { alt: "", hidden: true })), document.createElement("span"));
  cell.addEventListener("click", () => pick(chosen[number]));
  return cell;
});
element("strip").append(...cells);

export function drawStrip(frames) {
  const count = Math.min(CELLS, frames.length);
  const numbers = Array.from({ length: count }, (_, k) => Math.round((k * (frames.length - 1)) / Math.max(1, count - 1)));
  cells.forEach((cell, k) => {
    const frame = frames[numbers[k]];
    cell.disabled = !frame;
    [...cell.querySelectorAll("img")].forEach((image, at) => {
      const picture = frame?.[SHOWS[at]];
      image.hidden = !picture;
      if (!picture) image.removeAttribute("src");
      else if (image.src !== picture.url) image.src = picture.url;
    });
    const t = frame ? Math.round(frame.t) : "";
    cell.lastElementChild.textContent = t;
    cell.ariaLabel = frame ? `t = ${t}, after step ${frame.step}` : "no frame";
  });
  chosen = numbers;
}

/** Mark the cell nearest to a frame; it is the one that Tab reaches. */
export function markStrip(at) {
  const distances = chosen.map((number) => Math.abs(number - at));
  const nearest = distances.indexOf(Math.min(...distances));
  cells.forEach((cell, k) => {
    cell.tabIndex = k === nearest ? 0 : -1;
    if (k === nearest) cell.setAttribute("aria-current", "true");
    else cell.removeAttribute("aria-current");
  });
}

drawStrip([]);
element("strip").addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1, Home: -CELLS, End: CELLS }[event.key];
  const from = cells.indexOf(document.activeElement);
  if (!by || from < 0) return;
  event.preventDefault();
  const to = Math.max(0, Math.min(chosen.length - 1, from + by));
  pick(chosen[to]);
  cells[to].focus();
});
