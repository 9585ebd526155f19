// One of the lanes that are compared: its settings, and the path that they made.

import { element } from "./api.js";
import { fill, suitableSteps, tablesOf, takeTable } from "./form.js";
import { passesOf } from "./path.js";
import { SHOWS } from "./strip.js";
import { frameAt } from "./time.js";

/**
 * Make a lane.
 * @param {{sampler: string, steps: number, guidance: number}} begins
 */
export function lane(number, model, begins) {
  const node = element("lane").content.firstElementChild.cloneNode(true);
  const part = (name) => node.querySelector(`.${name}`);
  const guided = model.conditional && model.null_class !== null;
  let frames = []; // of the path that is shown: {step, steps, t, x_t, x_0}, a picture being a URL
  let caption = "";

  node.querySelector("legend").textContent = "ABCD"[number];
  fill(part("sampler"), model.samplers.map((name) => [name, name]), begins.sampler);
  part("steps").value = begins.steps;
  part("guidance").value = begins.guidance;
  for (const name of ["from", "to"]) part(name).max = model.num_timesteps - 1;
  part("to").placeholder = model.num_timesteps - 1;
  for (const each of node.querySelectorAll(".guides")) each.hidden = !guided;
  part("sampler").addEventListener("change", () => {
    part("steps").value = suitableSteps(part("sampler").value);
    suit();
  });
  for (const name of ["steps", "guidance"]) part(name).addEventListener("change", suitTable);
  suit();

  function suitTable() {
    takeTable(part("sampler").value, part("steps"), part("guidance"));
  }

  function suit() {
    const tables = tablesOf(part("sampler").value);
    const never = tables.length > 0 && tables.every((table) => table.guidance === 1);
    for (const name of ["guidance", "from", "to"]) part(name).disabled = never;
    part("steps").max = model.sampler_details[part("sampler").value].max_steps;
    suitTable();
  }

  /** What it asks for, beside what all lanes have in common. */
  function settings() {
    suitTable();
    const given = { sampler: part("sampler").value, steps: Number(part("steps").value) };
    const guidance = Number(part("guidance").value || 1);
    if (guided && !part("guidance").disabled && guidance !== 1) {
      given.guidance = guidance;
      const [from, to] = ["from", "to"].map((name) => part(name).value);
      if (from || to) given.guidance_interval = [Number(from || 0), Number(to || model.num_timesteps - 1)];
    }
    return given;
  }

  function clear(text = "") {
    for (const frame of frames) SHOWS.forEach((show) => URL.revokeObjectURL(frame[show]));
    frames = [];
    for (const show of SHOWS) part(show).removeAttribute("src");
    part("told").textContent = text;
  }

  function take({ frames: path, spec, milliseconds }) {
    clear();
    const url = (blob) => URL.createObjectURL(blob);
    frames = path.map(({ pictures, ...frame }) => ({ ...frame, x_t: url(pictures.x_t), x_0: url(pictures.x_0) }));
    const once = passesOf(spec, model), some = spec.guidance_interval ? `${once} to ${2 * once}` : 2 * once;
    const passes = spec.guidance === 1 ? once : some; // guided twice; the server knows for which timesteps
    const took = milliseconds === null ? "kept from before" : `${Math.round(milliseconds)} ms`;
    caption = `${passes} passes, ${took}`;
  }

  /** Show it as it was at a timestep. */
  function showAt(t) {
    if (!frames.length) return;
    const frame = frames[frameAt(frames, t)];
    for (const show of SHOWS) {
      if (part(show).src !== frame[show]) part(show).src = frame[show];
      part(show).alt = `Lane ${"ABCD"[number]}, ${show} after step ${frame.step} of ${frame.steps}`;
    }
    part("told").textContent = `Step ${frame.step} of ${frame.steps}. ${caption}.`;
  }

  return { node, settings, clear, take, showAt };
}
