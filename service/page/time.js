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
 * The number of a path's frame at a time: the first that has come down to t. At 0 it is the end.
 * @param {{t: number}[]} frames in order, t falling
 */
export function frameAt(frames, t) {
  if (t <= 0) return frames.length - 1; // some samplers are at 0 before their last step
  const at = frames.findIndex((frame) => frame.t <= t);
  return at < 0 ? frames.length - 1 : at;
}
