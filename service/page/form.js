// The form: its fields from the parameters of a request, and back.

import { element, plainSeed } from "./api.js";

// The guidance, where the checkpoint recommends nothing.
const GUIDANCE = 2;
const EXTRAS = ["to_seed", "mix", "eta", "index", "guidance_rescale", "timestep_spacing", "clip", "guidance_from", "guidance_to"];

export const form = element("form");
const field = (name) => form.elements[name];
let model = null;
let stepsChosen = false; // by the user: another sampler does not change them

export function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

/** The classes of a model as options of a select, by number. */
export const classOptions = ({ class_names: names }) => names.map((name, number) => [String(number), name]);

/** Set the form up for a model, with what it recommends. */
export function fillForm(loaded) {
  model = loaded;
  const sampler = model.recommended?.sampler ?? model.default_sampler;
  fill(field("sampler"), model.samplers.map((name) => [name, name]), sampler);
  suitSteps();
  field("guidance").value = model.recommended?.guidance ?? GUIDANCE;
  field("n").max = model.limits.max_n;
  for (const name of ["guidance_from", "guidance_to"]) field(name).max = model.num_timesteps - 1;
  field("guidance_to").placeholder = model.num_timesteps - 1;
  if (model.conditional) {
    element("class-field").hidden = false;
    fill(field("class_label"), [...classOptions(model), ...noClass()], "0");
  }
  const guided = model.conditional && model.null_class !== null;
  for (const part of [element("guidance-field"), ...document.querySelectorAll("#more .guides")]) part.hidden = !guided;
  field("class_label").addEventListener("change", suitGuidance);
  field("sampler").addEventListener("change", suitSteps);
  field("steps").addEventListener("input", () => (stepsChosen = true));
  for (const name of ["steps", "guidance"]) field(name).addEventListener("change", suitTable);
  suitGuidance();
}

const noClass = () => (model.null_class === null ? [] : [["", "no class"]]);

const classNumber = (label) => (typeof label === "string" ? Number(label.replace("number:", "")) : label); // see requestOf

/** Fill in the parameters of a job. Those that it lacks are as they were, or as usual. */
export function fillFrom(spec) {
  for (const name of ["sampler", "steps", "n"]) if (spec[name] !== undefined) field(name).value = spec[name];
  field("seed").value = spec.seed ?? "";
  const labels = [spec.class_label ?? null].flat().map(classNumber), different = new Set(labels);
  if (!different.has(null)) field("guidance").value = spec.guidance ?? 1; // else it had none
  if (model.conditional) chooseClass(different.size === 1 ? labels.slice(0, 1) : labels);
  const [from = "", to = ""] = spec.guidance_interval ?? [];
  const extras = {
    to_seed: spec.to_seed ?? "", mix: spec.mix ?? "", eta: spec.eta || "", index: spec.index || "",
    guidance_rescale: spec.guidance_rescale || "",
    timestep_spacing: spec.timestep_spacing === model.timestep_spacings[spec.sampler] ? "" : spec.timestep_spacing ?? "",
    clip: [undefined, model.clip].includes(spec.clip) ? "" : String(spec.clip), guidance_from: from, guidance_to: to,
  };
  for (const name of EXTRAS) field(name).value = extras[name];
  if (EXTRAS.some((name) => extras[name] !== "")) element("more").open = true;
  stepsChosen = Number(spec.steps) !== suitableSteps(field("sampler").value);
  suitSteps();
}

// A job of several classes is one more option.
function chooseClass(labels) {
  const select = field("class_label"), value = labels.map((label) => label ?? "").join(",");
  select.querySelector("[data-several]")?.remove();
  if (labels.length > 1) {
    const option = new Option(labels.map((label) => model.class_names[label] ?? "no class").join(", "), value);
    option.dataset.several = "";
    select.append(option);
  }
  select.value = value;
}

function suitGuidance() {
  const tables = tablesOf(field("sampler").value);
  const never = tables.length > 0 && tables.every((table) => table.guidance === 1); // such a sampler is not guided
  const some = field("class_label").value.split(",").every((label) => label !== "");
  const off = element("guidance-field").hidden || never || !some;
  for (const name of ["guidance", "guidance_from", "guidance_to", "guidance_rescale"]) field(name).disabled = off;
}

export const tablesOf = (sampler) => model.tables.filter((table) => table.sampler === sampler);

/**
 * Of a sampler of tables, let inputs say what a table is for: of those that are guided, or not, as asked, the one of the
 * nearest steps, by ratio, then of the nearest guidance; of equals the larger.
 */
export function takeTable(sampler, steps, guidance) {
  const asked = guidance.disabled ? 1 : Number(guidance.value || 1);
  const apart = (table) => Number(Math.abs(Math.log(table.steps / Math.max(1, Number(steps.value)))).toFixed(9));
  const off = (table) => Math.abs(table.guidance - asked);
  const [table] = tablesOf(sampler)
    .filter((each) => (each.guidance === 1) === (asked === 1))
    .sort((a, b) => apart(a) - apart(b) || off(a) - off(b) || b.steps - a.steps || b.guidance - a.guidance);
  if (!table || !steps.value) return;
  steps.value = table.steps;
  if (!guidance.disabled) guidance.value = table.guidance;
}

const suitTable = () => takeTable(field("sampler").value, field("steps"), field("guidance"));

function suitSteps() {
  const sampler = field("sampler").value, details = model.sampler_details[sampler];
  field("eta").disabled = sampler !== "ddim";
  field("timestep_spacing").disabled = tablesOf(sampler).length > 0;
  element("when").textContent = details?.when ?? "";
  if (details) field("steps").max = details.max_steps;
  if (details && !stepsChosen) field("steps").value = suitableSteps(sampler);
  suitGuidance();
  suitTable();
}

export function suitableSteps(sampler) {
  const { recommended } = model;
  return recommended?.sampler === sampler ? recommended.steps : model.sampler_details[sampler]?.good_steps;
}

/** Whether two settings are the same sampler, steps and guidance. */
export const isSame = (one, other) => ["sampler", "steps", "guidance"].every((name) => one[name] === other[name]);

/** What a checkpoint recommends; where that is a sampler of tables, by one that takes any guidance. */
export function guidable(best) {
  if (!tablesOf(best.sampler).length) return best;
  const sampler = model.samplers.includes("dpmpp_2m") ? "dpmpp_2m" : model.default_sampler;
  return { ...best, sampler, steps: suitableSteps(sampler) };
}

const toLabel = (text) => (text === "" ? null : Number(text));

/** What the form asks for, as parameters of POST /sample. */
export function parameters() {
  suitTable();
  const given = Object.fromEntries([...new FormData(form)].filter(([, value]) => value !== "")); // nor what is disabled
  const spec = { n: Number(given.n), steps: Number(given.steps), sampler: given.sampler };
  if (given.seed) spec.seed = plainSeed(given.seed);
  if (given.class_label?.includes(",")) spec.class_label = given.class_label.split(",").map(toLabel);
  else if (given.class_label) spec.class_label = Number(given.class_label);
  if (given.guidance !== undefined && model.conditional) {
    spec.guidance = Number(given.guidance);
    if (given.guidance_rescale) spec.guidance_rescale = Number(given.guidance_rescale);
    if (given.guidance_from || given.guidance_to) {
      spec.guidance_interval = [Number(given.guidance_from ?? 0), Number(given.guidance_to ?? model.num_timesteps - 1)];
    }
  }
  if (given.to_seed) spec.to_seed = plainSeed(given.to_seed);
  if (given.mix) spec.mix = Number(given.mix);
  for (const name of ["eta", "index"]) if (given[name]) spec[name] = Number(given[name]);
  if (given.timestep_spacing) spec.timestep_spacing = given.timestep_spacing;
  if (given.clip) spec.clip = given.clip === "true";
  return spec;
}

const percent = (share) => `${Math.round(100 * share)} %`;

/** Parameters in a few words. */
export function describe({ n, class_label: label, steps, sampler, seed, to_seed: other, mix, guidance }) {
  const labels = new Set([label ?? null].flat());
  const [first] = labels;
  const name = labels.size > 1 ? "several classes" : first === null ? "no class" : model.class_names[first] ?? first;
  const what = model.conditional ? (n > 1 ? `${n} × ${name}` : name) : n > 1 ? `${n} images` : "one image";
  const guided = guidance !== undefined && Number(guidance) !== 1 ? `, guidance ${guidance}` : "";
  const walk = other === undefined || mix === undefined ? "" : `${percent(mix)} of the way to seed ${other} from `;
  return `${what}, ${steps} steps of ${sampler}${guided}${seed === undefined ? "" : `, ${walk}seed ${seed}`}`;
}

const FIELDS = { guidance_interval: "guidance_from" }; // where the name is another

/** Say what is wrong, or that nothing is, and go to the field. */
export function complain(text, name) {
  element("error").textContent = text;
  for (const input of form.elements) {
    input.removeAttribute("aria-invalid");
    if (input.name !== "sampler") input.removeAttribute("aria-describedby");
  }
  const input = name && form.elements[FIELDS[name] ?? name];
  if (!input) return;
  if (element("more").contains(input)) element("more").open = true;
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", "error");
  input.focus();
}
