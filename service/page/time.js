// The timestep that is looked at. What shows one, shows the same.

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
