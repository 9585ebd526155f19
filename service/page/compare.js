// Two to four settings from the same noise, asked for at the same time, and shown at the same t.

import { element, reason } from "./api.js";
import { classOptions, fill, guidable, isSame } from "./form.js";
import { lane } from "./lane.js";
import { askPath } from "./path.js";
import { player } from "./player.js";
import { onTime, setTime } from "./time.js";

const FIRST_DEADLINE_S = 3;

let lanes = [];
let shown = false; // whether there is anything to play
let asking = null; // what aborts the comparison under way; a newer one takes its place

export function setUp(model) {
  const slider = element("compare-t"), last = model.num_timesteps - 1;
  slider.max = last;
  element("compare-class-field").hidden = !model.conditional;
  fill(element("compare-class"), classOptions(model), String(Math.min(7, model.class_names.length - 1)));
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
  const best = model.recommended ?? { sampler: model.default_sampler, steps: 50, guidance: 1 };
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
  element("lanes").dataset.count = used().length;
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
  element("compare-status").textContent = deadline_s ? "" : "Asking for all lanes…";
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
  each.clear("Being denoised…");
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
