// Plays something from its beginning to its end: a button that is play or pause, a speed, a loop. One at a time plays.

import { element } from "./api.js";
import { onTime } from "./time.js";

const WHOLE_MS = 4000; // at speed 1
const END_MS = 1200; // that the end stands before a loop begins again

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
