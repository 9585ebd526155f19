// The frames of a job as they come, kept so that one can go back: {step, steps, t, x_t, x_0}, a picture being {url, bytes}.

import { element } from "./api.js";
import { drawStrip, markStrip, onPick, SHOWS } from "./strip.js";
import { frameAt, onTime, setTime } from "./time.js";

export const MOST_BYTES = 100e6; // that the frames may take

let frames = [];
let following = true; // whether the newest frame is shown; not while the user views an earlier frame
let growing = false; // while a job runs

export const frameCount = () => frames.length;
/** The URL of the end, or of what there is of it. */
export const lastPicture = () => frames.at(-1)?.x_t?.url;
export const setGrowing = (yes) => (growing = yes);

// A step may come in two parts, and again after the connection broke. Pictures are blobs.
export function addFrame({ step, steps, t }, pictures) {
  if (frames.length && step < frames.at(-1).step) return;
  if (frames.at(-1)?.step !== step) frames.push({ step, steps, t });
  const last = frames.at(-1);
  take(last, pictures);
  if (frames.reduce((sum, frame) => sum + bytesOf(frame), 0) > MOST_BYTES) thinOut();
  drawFrames();
  showFrame(following ? frames.length - 1 : Number(element("scrub").value), "live");
}

function take(frame, pictures) {
  for (const [show, blob] of Object.entries(pictures)) {
    release(frame[show]);
    frame[show] = { url: URL.createObjectURL(blob), bytes: blob.size };
  }
}

function drawFrames() {
  const scrub = element("scrub");
  scrub.disabled = false;
  scrub.max = frames.length - 1;
  element("play").ariaDisabled = String(frames.length < 2);
  drawStrip(frames);
}

/** The last of the steps 0, every, 2 every, … before the newest frame that has no frame; -1 where each has one. */
export function lastMissing(every) {
  const known = new Set(frames.map(({ step }) => step));
  const wanted = Array.from({ length: Math.ceil((frames.at(-1)?.step ?? 0) / every) }, (_, k) => k * every);
  return wanted.findLast((step) => !known.has(step)) ?? -1;
}

/** Put in those of a path's frames that are missing. What is shown stays. */
export function fillIn(path) {
  const known = new Set(frames.map(({ step }) => step)), shown = frames[Number(element("scrub").value)];
  for (const { step, t, pictures } of path.filter((each) => !known.has(each.step))) {
    const frame = { step, steps: shown.steps, t };
    take(frame, pictures);
    frames.push(frame);
  }
  frames.sort((one, other) => one.step - other.step);
  drawFrames();
  showFrame(frames.indexOf(shown), "live");
}

/** Show a whole path, its end first. frames: {step, steps, t, pictures}, the pictures being blobs. */
export function showPath(path) {
  clearFrames();
  for (const { pictures, ...frame } of path) addFrame(frame, pictures);
}

export function clearFrames() {
  frames.forEach(drop);
  frames = [];
  following = true;
  for (const show of SHOWS) {
    element(show).removeAttribute("src");
    element(show).alt = "";
  }
  Object.assign(element("scrub"), { disabled: true, max: 0, value: 0 });
  element("play").ariaDisabled = "true";
  element("frame-text").textContent = "";
  drawStrip(frames);
  setTime(null, "frames");
}

// Every other frame goes, the newest stays.
function thinOut() {
  const odd = (at) => (frames.length - 1 - at) % 2;
  const shown = Math.floor(Number(element("scrub").value) / 2);
  frames.filter((_, at) => odd(at)).forEach(drop);
  frames = frames.filter((_, at) => !odd(at));
  if (!following) showFrame(Math.min(shown, frames.length - 1), "live");
}

const bytesOf = (frame) => SHOWS.reduce((sum, show) => sum + (frame[show]?.bytes ?? 0), 0);
const drop = (frame) => SHOWS.forEach((show) => release(frame[show]));

function release(picture) {
  if (picture) URL.revokeObjectURL(picture.url); // which would keep the bytes for as long as the page is open
}

function showFrame(at, from) {
  const frame = frames[at];
  for (const show of SHOWS) {
    if (!frame[show] || element(show).src === frame[show].url) continue;
    element(show).src = frame[show].url;
    element(show).alt = `${show} after step ${frame.step} of ${frame.steps}`;
  }
  const scrub = element("scrub");
  scrub.value = at;
  scrub.setAttribute("aria-valuetext", `step ${frame.step} of ${frame.steps}`);
  element("frame-text").textContent = `Frame ${at + 1} of ${frames.length}: after step ${frame.step}, t = ${frame.t}`;
  markStrip(at);
  if (from !== "time") setTime(frame.t, from);
}

/** Show a frame by its number, as somebody who looks back does. */
export function goTo(at) {
  following = at === frames.length - 1;
  showFrame(at, "frames");
}

onPick(goTo);
element("scrub").addEventListener("input", (event) => goTo(Number(event.target.value)));

onTime((t, from) => {
  if (t === null || !frames.length || ["frames", "live"].includes(from)) return;
  if (growing && following && from === "hover") return; // a mouse on its way does not stop what is watched
  const at = frameAt(frames, t);
  following = at === frames.length - 1;
  showFrame(at, "time");
});
