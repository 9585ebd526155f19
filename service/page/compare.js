// Two to four settings from the same noise, asked for at the same time, and shown at the same t.

import { element, reason } from "./api.js";
import { frameAt, onTime, player, setTime } from "./film.js";
import { classOptions, fill, grey, guidable, isSame, suitableSteps, takeTable, unguided } from "./form.js";
import { askPath, passesOf } from "./path.js";
import { SHOWS } from "./stage.js";

const FIRST_DEADLINE_S = 3;

let lanes = [];
let shown = false; // whether there is anything to play
let asking = null; // what aborts the comparison under way; a newer one takes its place

export function setUp(model) {
  const slider = element("compare-t"), last = model.num_timesteps - 1;
  slider.max = last;
  element("compare-class-field").hidden = !model.conditional;
  fill(element("compare-class"), classOptions(model));
  lanes = beginnings(model).map((begins, number) => lane(number, model, begins));
  element("lanes").replaceChildren(...lanes.map(({ node }) => node));
  element("compare-count").addEventListener("change", showLanes);
  showLanes();

  // The slider goes from noise at its left to the image at its right, as t does in the plot.
  slider.addEventListener("input", () => setTime(last - Number(slider.value), "compare"));
  const playing = player(element("compare-play"), {
    show: (share) => shown && setTime(Math.round(last * (1 - share)), "compare"),
    share: () => Number(slider.value) / last,
  });
  onTime((t, from) => t !== null && from !== "live" && showAll(t, last)); // a job's frames do not move the lanes
  element("compare-go").addEventListener("click", () => compare(model, playing));
  element("compare-go").ariaDisabled = "false";
  // Whoever comes here sees something at once, if the server has time for it.
  const first = new IntersectionObserver(([{ isIntersecting: seen }]) => {
    if (!seen) return;
    first.disconnect();
    if (!shown) compare(model, playing, FIRST_DEADLINE_S);
  });
  first.observe(element("lanes"));
}

function beginnings(model) {
  const best = model.recommended;
  const table = model.tables.find((each) => !isSame(each, best));
  const quarter = { ...best, steps: Math.max(1, Math.round(best.steps / 4)) };
  const few = table ?? (model.tables.length ? guidable(best) : quarter);
  const all = model.samplers.includes("ddpm") ? "ddpm" : best.sampler;
  return [
    { ...few },
    { ...best },
    { ...best, sampler: all, steps: Math.min(100, model.num_timesteps) },
    model.null_class === null ? { ...best, guidance: 1 } : { ...guidable(best), guidance: 5 },
  ];
}

/** The lanes that are to be seen. */
const used = () => lanes.slice(0, Number(element("compare-count").value));

function showLanes() {
  lanes.forEach(({ node }, number) => (node.hidden = number >= used().length));
}

function showAll(t, last) {
  if (!shown) return;
  element("compare-t").value = last - t;
  element("compare-t").setAttribute("aria-valuetext", `t = ${t}`);
  element("compare-t-text").textContent = `t = ${Math.round(t)}`;
  for (const each of used()) each.showAt(t);
}

/** deadline_s: given where nobody has pressed the button; then a refusal is no news either */
async function compare(model, playing, deadline_s) {
  const button = element("compare-go");
  if (button.ariaDisabled === "true") return;
  asking?.abort();
  const mine = (asking = new AbortController());
  button.ariaDisabled = String(!deadline_s);
  playing.pause();
  shown = false;
  const common = { n: 1, seed: element("compare-seed").value || "0" };
  if (model.conditional) common.class_label = Number(element("compare-class").value);
  if (deadline_s) common.deadline_s = deadline_s;
  element("compare-status").textContent = deadline_s ? "" : "Making all lanes…";
  const answers = await Promise.all(used().map((each) => ask(each, common, model, mine.signal)));
  if (mine !== asking) return;
  button.ariaDisabled = "false";
  const done = answers.filter(Boolean).length;
  shown = done > 0;
  const told = done === answers.length ? "Done." : `${done} of ${answers.length} lanes are done.`;
  element("compare-status").textContent = deadline_s ? "" : told;
  element("compare-t").disabled = !shown;
  element("compare-play").ariaDisabled = String(!shown);
  if (shown) setTime(0, "compare");
  if (shown && !matchMedia("(prefers-reduced-motion: reduce)").matches) playing.play();
}

async function ask(each, common, model, signal) {
  each.clear("Denoising…");
  try {
    const answer = await askPath({ ...common, ...each.settings() }, model, signal);
    if (signal.aborted) return false; // the lane is another comparison's now
    each.take(answer);
    return true;
  } catch (error) {
    if (signal.aborted) return false;
    each.clear(common.deadline_s ? "" : `Not done: ${reason(error)}.`);
    return false;
  }
}

// --- one lane: its settings, and the path that they made ---

/**
 * Make a lane.
 * @param {{sampler: string, steps: number, guidance: number}} begins
 */
function lane(number, model, begins) {
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
  part("guidance").closest("label").hidden = !guided;
  part("sampler").addEventListener("change", () => {
    part("steps").value = suitableSteps(part("sampler").value);
    suit();
  });
  for (const name of ["steps", "guidance"]) part(name).addEventListener("change", suitTable);
  suit();

  function suitTable() {
    takeTable(part("sampler").value, part("steps"), part("guidance"), part("when"));
  }

  function suit() {
    const why = unguided(part("sampler").value);
    grey(part("guidance"), why);
    for (const name of ["from", "to"]) part(name).closest("label").hidden = !guided || Boolean(why);
    part("steps").max = model.sampler_details[part("sampler").value].max_steps;
    part("when").textContent = "";
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
    const took = milliseconds === null ? "from the cache" : `${Math.round(milliseconds)} ms`;
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
