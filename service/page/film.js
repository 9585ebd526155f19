// The frames of what is shown, from noise to image, and the timestep that all parts of the page look at: a filmstrip, a
// slider, players. A frame is {step, steps, t, x_t, x_0}, a picture being {url, bytes}.

import { element } from "./api.js";
import { showPictures, SHOWS } from "./stage.js";

export const MOST_BYTES = 100e6; // that the frames may take
const CELLS = 10; // of the strip
const DRAG_PX = 4; // that a pointer moves before it drags
const WHEEL_PX = 40, WHEEL_WHOLE_PX = 800; // that a wheel turns for a frame, and at most for all
const SCROLLING_MS = 300; // in which turns of a wheel belong together
const WHOLE_MS = 4000; // that a player takes, at speed 1
const END_MS = 1200; // that the end stands before a loop begins again

// --- the timestep that is looked at: what shows one, shows the same ---

const listeners = [];
export let time = null;

/** Call `listener(t, from)` at each change; `from` names what changed it. */
export const onTime = (listener) => listeners.push(listener);

/** t: a timestep, also between whole ones, or null for none. */
export function setTime(t, from) {
  time = t;
  for (const listener of listeners) listener(t, from);
}

/**
 * The number of a path's frame that is nearest to a time. At 0 it is the end: some samplers are there before their last step.
 * @param {{t: number}[]} frames
 */
export function frameAt(frames, t) {
  if (t <= 0) return frames.length - 1;
  const away = frames.map((frame) => Math.abs(frame.t - t));
  return away.indexOf(Math.min(...away));
}

// --- the frames ---

let frames = [];
let shown = 0; // the number of the frame that is shown; while it is the newest, newer ones take its place
let growing = false; // while a job runs

export const setGrowing = (yes) => (growing = yes);

// A step may come in two parts, and again after the connection broke. Pictures are blobs.
export function addFrame({ step, steps, t }, pictures) {
  if (frames.length && step < frames.at(-1).step) return;
  const follows = isNewest(shown);
  if (frames.at(-1)?.step !== step) frames.push({ step, steps, t });
  const last = frames.at(-1);
  take(last, pictures);
  if (frames.reduce((sum, frame) => sum + bytesOf(frame), 0) > MOST_BYTES) thinOut();
  drawFrames();
  showFrame(follows ? frames.length - 1 : shown, "live");
}

const isNewest = (at) => at >= frames.length - 1;

function take(frame, pictures) {
  for (const [show, blob] of Object.entries(pictures)) {
    if (show === "x_0" && frame.step === 0) continue; // before the first step the network has guessed nothing
    release(frame[show]);
    frame[show] = { url: URL.createObjectURL(blob), bytes: blob.size };
  }
}

function drawFrames() {
  const scrub = element("scrub");
  scrub.disabled = false;
  scrub.max = frames.at(-1).steps; // a frame's place on it is that on the strip
  element("play").ariaDisabled = String(frames.length < 2);
  drawStrip();
}

/** The last of the steps 0, every, 2 every, … before the newest frame that has no frame; -1 where each has one. */
export function lastMissing(every) {
  const known = new Set(frames.map(({ step }) => step));
  const wanted = Array.from({ length: Math.ceil((frames.at(-1)?.step ?? 0) / every) }, (_, k) => k * every);
  return wanted.findLast((step) => !known.has(step)) ?? -1;
}

/** Put in those of a path's frames that are missing. What is shown stays. */
export function fillIn(path) {
  const known = new Set(frames.map(({ step }) => step)), seen = frames[shown];
  for (const { step, t, pictures } of path.filter((each) => !known.has(each.step))) {
    const frame = { step, steps: seen.steps, t };
    take(frame, pictures);
    frames.push(frame);
  }
  frames.sort((one, other) => one.step - other.step);
  drawFrames();
  showFrame(frames.indexOf(seen), "live");
}

/** Show a whole path, its end first. frames: {step, steps, t, pictures}, the pictures being blobs. */
export function showPath(path) {
  clearFrames();
  for (const { pictures, ...frame } of path) addFrame(frame, pictures);
}

export function clearFrames() {
  frames.forEach(drop);
  frames = [];
  shown = 0;
  showPictures(null);
  Object.assign(element("scrub"), { disabled: true, max: 0, value: 0 });
  element("play").ariaDisabled = "true";
  element("frame-text").textContent = "";
  drawStrip();
  setTime(null, "frames");
}

// Every other frame goes, the newest stays.
function thinOut() {
  const odd = (at) => (frames.length - 1 - at) % 2;
  frames.filter((_, at) => odd(at)).forEach(drop);
  frames = frames.filter((_, at) => !odd(at));
  shown = Math.floor(shown / 2);
}

const bytesOf = (frame) => SHOWS.reduce((sum, show) => sum + (frame[show]?.bytes ?? 0), 0);
const drop = (frame) => SHOWS.forEach((show) => release(frame[show]));

function release(picture) {
  if (picture) URL.revokeObjectURL(picture.url); // which would keep the bytes for as long as the page is open
}

function showFrame(at, from) {
  const frame = frames[at];
  shown = at;
  showPictures(frame);
  const scrub = element("scrub");
  scrub.value = frame.step;
  scrub.setAttribute("aria-valuetext", `step ${frame.step} of ${frame.steps}`);
  element("frame-text").textContent = `Frame ${at + 1} of ${frames.length}: after step ${frame.step}, t = ${frame.t}`;
  markStrip(at);
  if (from !== "time") setTime(frame.t, from);
}

/** Show a frame by its number, as somebody who looks back does. */
const goTo = (at) => showFrame(at, "frames");
const goBy = (count) => goTo(Math.max(0, Math.min(frames.length - 1, shown + count)));

/** The number of the frame that is nearest to a step. */
function nearestTo(step) {
  const away = frames.map((frame) => Math.abs(frame.step - step));
  return away.indexOf(Math.min(...away));
}

element("scrub").addEventListener("input", ({ target }) => goTo(nearestTo(Number(target.value))));
element("scrub").addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
  if (!by) return;
  event.preventDefault(); // a frame may be many steps away
  goBy(by);
});

onTime((t, from) => {
  if (t === null || !frames.length || ["frames", "live"].includes(from)) return;
  if (growing && isNewest(shown) && from === "hover") return; // a mouse on its way does not stop what is watched
  showFrame(frameAt(frames, t), "time");
});

// --- the filmstrip: a few frames, each a button at its place between noise and image ---

const strip = element("strip");
let chosen = []; // the numbers of the frames that are on it

// Of a short path every frame; else for each place the frame nearest to it, if there is one yet.
function choose() {
  const steps = frames.at(-1)?.steps ?? 0;
  if (steps < CELLS) return frames.map((_, at) => at);
  const places = Array.from({ length: CELLS }, (_, k) => (k * steps) / (CELLS - 1));
  const near = places.map(nearestTo);
  return [...new Set(near.filter((at, k) => Math.abs(frames[at].step - places[k]) <= steps / (CELLS - 1) / 2))];
}

function drawStrip() {
  chosen = frames.length ? choose() : [];
  while (strip.children.length > chosen.length) {
    for (const image of strip.lastChild.querySelectorAll("img")) image.removeAttribute("src"); // its picture may be let go
    strip.lastChild.remove();
  }
  while (strip.children.length < chosen.length) strip.append(makeCell(strip.children.length));
  chosen.forEach((number, k) => {
    const cell = strip.children[k], { step, steps, t, ...pictures } = frames[number];
    const place = steps < CELLS ? step / steps : Math.round((step / steps) * (CELLS - 1)) / (CELLS - 1);
    cell.style.setProperty("--place", place);
    [...cell.querySelectorAll("img")].forEach((image, at) => {
      const url = pictures[SHOWS[at]]?.url;
      if (!url) image.removeAttribute("src");
      else if (image.src !== url) image.src = url;
    });
    cell.lastElementChild.textContent = step === 0 ? "noise" : step === steps ? "image" : Math.round(t);
    cell.ariaLabel = `t = ${Math.round(t)}, after step ${step}`;
  });
}

function makeCell(k) {
  const cell = Object.assign(document.createElement("button"), { type: "button", tabIndex: -1 });
  cell.append(...SHOWS.map(() => Object.assign(new Image(), { alt: "", draggable: false })), document.createElement("span"));
  cell.addEventListener("click", () => goTo(chosen[k]));
  return cell;
}

/** Mark the cell nearest to a frame; it is the one that Tab reaches. */
function markStrip(at) {
  const away = chosen.map((number) => Math.abs(number - at));
  const nearest = away.indexOf(Math.min(...away));
  [...strip.children].forEach((cell, k) => {
    cell.tabIndex = k === nearest ? 0 : -1;
    if (k === nearest) cell.setAttribute("aria-current", "true");
    else cell.removeAttribute("aria-current");
  });
}

strip.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1, Home: -CELLS, End: CELLS }[event.key];
  const from = [...strip.children].indexOf(document.activeElement);
  if (!by || from < 0) return;
  event.preventDefault();
  const to = Math.max(0, Math.min(chosen.length - 1, from + by));
  goTo(chosen[to]);
  strip.children[to].focus();
});

// Where a drag began; `moves` once it is one, so that a click on a cell stays a click.
let drag = null;

strip.addEventListener("pointerdown", ({ clientX, button }) => {
  if (button === 0 && frames.length > 1) drag = { x: clientX, moves: false };
});
strip.addEventListener("pointermove", ({ clientX, pointerId, buttons }) => {
  if (!(buttons & 1)) drag = null; // it was let go elsewhere
  if (!drag || frames.length < 2) return;
  if (!drag.moves && Math.abs(clientX - drag.x) < DRAG_PX) return;
  if (!drag.moves) strip.setPointerCapture(pointerId);
  drag.moves = true;
  const box = strip.getBoundingClientRect(), half = strip.firstChild.offsetWidth / 2;
  const share = (clientX - box.left - half) / (box.width - 2 * half);
  goTo(nearestTo(share * frames.at(-1).steps));
});
for (const end of ["pointerup", "pointercancel"]) strip.addEventListener(end, () => (drag = null));

// A wheel that comes scrolling from elsewhere goes on scrolling, and at the film's ends it scrolls the page again.
let turned = 0, scrolled_ms = -SCROLLING_MS;
addEventListener("wheel", ({ target, timeStamp }) => strip.contains(target) || (scrolled_ms = timeStamp), { passive: true });
strip.addEventListener(
  "wheel",
  (event) => {
    const by = event.deltaX || event.deltaY;
    const atItsEnd = by < 0 ? shown === 0 : isNewest(shown);
    if (event.timeStamp - scrolled_ms < SCROLLING_MS) scrolled_ms = event.timeStamp;
    else if (frames.length > 1 && !event.ctrlKey && !atItsEnd) {
      event.preventDefault();
      const framePx = Math.min(WHEEL_PX, WHEEL_WHOLE_PX / frames.length);
      turned = Math.sign(turned) === Math.sign(by) ? turned + by : by;
      const count = Math.trunc(turned / framePx);
      turned -= count * framePx;
      if (count) goBy(count);
    }
  },
  { passive: false },
);

// --- players: a button that plays from the beginning to the end, or pauses. One at a time plays ---

let pauseActive = null; // pauses the one that plays; null while none does
let moving = false; // while that one changes the time itself

// Whoever else changes it, but for a job that brings its next frame, takes over.
onTime((_, from) => !moving && from !== "live" && pauseActive?.());

/**
 * @param {HTMLButtonElement} button
 * @param {{show: (share: number) => void, share: () => number}} shown how to show a share of the way, and which is shown
 * @returns {{play: () => void, pause: () => void}}
 */
export function player(button, { show, share }) {
  let frame = null; // the animation frame that is waited for
  let before = null; // when the last one came; the first one may have begun before it was asked for
  let at = 0;

  function label(playing) {
    button.ariaLabel = playing ? "Pause" : "Play";
    button.classList.toggle("playing", playing);
  }

  function pause() {
    if (frame !== null) cancelAnimationFrame(frame);
    frame = null;
    if (pauseActive === pause) pauseActive = null;
    label(false);
  }

  function move(to) {
    moving = true;
    show(to);
    moving = false;
  }

  function tick(now) {
    at += ((now - (before ?? now)) / WHOLE_MS) * Number(element("speed").value);
    before = now;
    const over = 1 + END_MS / WHOLE_MS;
    if (at >= 1 && !element("loop").checked) {
      move(1);
      pause();
      return;
    }
    if (at >= over) at = 0;
    move(Math.min(1, at));
    if (frame !== null) frame = requestAnimationFrame(tick);
  }

  function play() {
    pauseActive?.();
    pauseActive = pause;
    at = share() >= 1 ? 0 : share();
    before = null;
    label(true);
    frame = requestAnimationFrame(tick);
  }

  button.addEventListener("click", () => {
    if (button.ariaDisabled === "true") return;
    if (frame === null) play();
    else pause();
  });
  return { play, pause };
}

/** The player of the frames. */
export const film = player(element("play"), {
  show: (share) => frames.length && goTo(Math.round(share * (frames.length - 1))),
  share: () => (frames.length > 1 ? shown / (frames.length - 1) : 0),
});
