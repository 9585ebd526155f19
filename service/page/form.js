// The form: its fields from the parameters of a request, and back; its presets; parameters in words.

import { element, plainSeed } from "./api.js";

const SEED = "7"; // of what a page without a recipe opens with
const STRONG = 5, FEW = 8; // guidance and steps of presets
const EXTRAS = ["to_seed", "mix", "eta", "index", "guidance_rescale", "timestep_spacing", "clip", "guidance_from", "guidance_to"];

export const form = element("form");
const field = (name) => form.elements[name];
let model = null;
let stepsChosen = false; // by the user: another sampler does not change them

export function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

const SETTING = [
  "sampler", "steps", "guidance", "guidance_interval", "guidance_rescale", "timestep_spacing", "eta",
]; // what `quality=adaptive` chooses

/** The classes of a model as options of a select, by number. */
export const classOptions = ({ class_names: names }) => names.map((name, number) => [String(number), name]);

/** Set the form up for a model, with what it recommends. */
export function fillForm(loaded) {
  model = loaded;
  fill(field("sampler"), model.samplers.map((name) => [name, name]), model.recommended.sampler);
  suitSteps();
  field("guidance").value = model.recommended.guidance;
  field("n").max = model.limits.max_n;
  element("adaptive-field").hidden = model.ladder.length < 2;
  for (const name of ["guidance_from", "guidance_to"]) field(name).max = model.num_timesteps - 1;
  field("guidance_to").placeholder = model.num_timesteps - 1;
  if (model.conditional) {
    element("class-field").hidden = false;
    fill(field("class_label"), [...classOptions(model), ...noClass()]);
  }
  element("guidance-field").hidden = !(model.conditional && model.null_class !== null);
  field("class_label").addEventListener("change", suitGuidance);
  field("sampler").addEventListener("change", suitSteps);
  field("steps").addEventListener("input", () => {
    stepsChosen = true;
    tellWhen();
  });
  for (const name of ["steps", "guidance"]) field(name).addEventListener("change", suitTable);
  suitGuidance();
  showPresets();
}

/** The sample that a page without a recipe opens with: of the first class, as the form. */
export function usualOpening({ recommended, conditional, tables }) {
  const { sampler, steps, guidance } = recommended, parameters = { n: 1, steps, sampler, seed: SEED };
  if (conditional) Object.assign(parameters, { class_label: 0, guidance });
  if (tables.some((table) => table.sampler === sampler)) parameters.nearest = true;
  return parameters;
}

/** How many images the form asks for. */
export const numberOfImages = () => Number(field("n").value) || 1;

const noClass = () => (model.null_class === null ? [] : [["", "no class"]]);

const classNumber = (label) => (typeof label === "string" ? Number(label.replace("number:", "")) : label); // see requestOf

/** Fill in the parameters of a job. Those that it lacks are as they were, or as usual. */
export function fillFrom(spec) {
  for (const name of ["sampler", "steps", "n"]) if (spec[name] !== undefined) field(name).value = spec[name];
  field("seed").value = spec.seed ?? "";
  field("deadline_s").value = "";
  const labels = [spec.class_label ?? null].flat().map(classNumber), different = new Set(labels);
  const named = spec.sampler !== undefined || spec.steps !== undefined;
  if (!different.has(null)) field("guidance").value = spec.guidance ?? (named ? 1 : model.recommended.guidance); // else it had none
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

/** Let a field be used, or say at it why it cannot be. */
export function grey(input, why = "") {
  input.disabled = Boolean(why);
  const note = input.closest("label").querySelector(".why");
  note.dataset.usual ??= note.textContent;
  note.textContent = why ? `(${why})` : note.dataset.usual;
}

/** Why a sampler is not guided; undefined where it can be. */
export function unguided(sampler) {
  const tables = tablesOf(sampler);
  return tables.length && tables.every((table) => table.guidance === 1) ? `not with ${sampler}` : undefined;
}

function suitGuidance() {
  const some = field("class_label").value.split(",").every((label) => label !== "");
  const why = unguided(field("sampler").value) ?? (some ? undefined : "needs a class");
  grey(field("guidance"), why);
  for (const label of document.querySelectorAll("#more .guides")) label.hidden = element("guidance-field").hidden || Boolean(why);
}

export const tablesOf = (sampler) => model.tables.filter((table) => table.sampler === sampler);

/**
 * Of a sampler of tables, let inputs say what a table is for: of those that are guided, or not, as asked, the one of the
 * nearest steps, by ratio, then of the nearest guidance; of equals the larger. `told` says what was changed.
 */
export function takeTable(sampler, steps, guidance, told) {
  const asked = guidance.disabled ? 1 : Number(guidance.value || 1);
  const apart = (table) => Number(Math.abs(Math.log(table.steps / Math.max(1, Number(steps.value)))).toFixed(9));
  const off = (table) => Math.abs(table.guidance - asked);
  const [table] = tablesOf(sampler)
    .filter((each) => (each.guidance === 1) === (asked === 1))
    .sort((a, b) => apart(a) - apart(b) || off(a) - off(b) || b.steps - a.steps || b.guidance - a.guidance);
  if (!table || !steps.value) return;
  const words = (count, scale) => `${count} steps${scale === 1 ? "" : `, guidance ${scale}`}`;
  const [wanted, nearest] = [words(Number(steps.value), asked), words(table.steps, table.guidance)];
  steps.value = table.steps;
  if (!guidance.disabled) guidance.value = table.guidance;
  if (wanted !== nearest) told.textContent = `No table of ${sampler} has ${wanted}: the nearest has ${nearest}.`;
}

function tellWhen() {
  element("when").textContent = model.sampler_details[field("sampler").value]?.when ?? "";
}

const suitTable = () => takeTable(field("sampler").value, field("steps"), field("guidance"), element("when"));

function suitSteps() {
  const sampler = field("sampler").value, details = model.sampler_details[sampler];
  grey(field("eta"), sampler === "ddim" ? "" : "ddim only");
  grey(field("timestep_spacing"), tablesOf(sampler).length ? "by its table" : "");
  if (details) field("steps").max = details.max_steps;
  if (details && !stepsChosen) field("steps").value = suitableSteps(sampler);
  suitGuidance();
  tellWhen();
  suitTable();
}

export const suitableSteps = (sampler) => model.sampler_details[sampler]?.good_steps;

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
  const spec = settings(), seconds = field("deadline_s").value;
  if (!seconds) return spec;
  for (const name of SETTING) delete spec[name];
  return { ...spec, quality: "adaptive", deadline_s: Number(seconds) };
}

/** The same with the settings of the form, also where the server is to choose. */
export function settings() {
  suitTable();
  const given = Object.fromEntries([...new FormData(form)].filter(([, value]) => value !== "")); // nor what is disabled
  const spec = { n: Number(given.n), steps: Number(given.steps), sampler: given.sampler };
  if (given.seed) spec.seed = plainSeed(given.seed);
  if (given.class_label?.includes(",")) spec.class_label = given.class_label.split(",").map(toLabel);
  else if (given.class_label) spec.class_label = Number(given.class_label);
  if (given.guidance !== undefined && !element("guidance-field").hidden) {
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

const nameOf = (label) => (/^\d*$/.test(model.class_names[label] ?? "") ? `class ${model.class_names[label] ?? label}` : model.class_names[label]);

const percent = (share) => `${Math.round(100 * share)} %`;

/** Parameters in a few words. */
export function describe({ n, class_label: label, steps, sampler, seed, to_seed: other, mix, guidance, index }) {
  const labels = new Set([label ?? null].flat());
  const [first] = labels;
  const name = labels.size > 1 ? "several classes" : first === null ? "no class" : nameOf(first);
  const what = model.conditional ? (n > 1 ? `${n} × ${name}` : name) : n > 1 ? `${n} images` : "one image";
  const guided = guidance !== undefined && Number(guidance) !== 1 ? `, guidance ${guidance}` : "";
  const walk = other === undefined || mix === undefined ? "" : `${percent(mix)} of the way to seed ${other} from `;
  const setting = steps === undefined ? "as good as time allows" : `${steps} steps of ${sampler}${guided}`;
  return `${what}, ${setting}${seed === undefined ? "" : `, ${walk}seed ${seed}`}${index ? `, index ${index}` : ""}`;
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

// --- presets: a few settings to begin with, each a button that fills in the form ---

/** @returns {Object<string, [string, object]>} by name: what it is for, and parameters */
function presetsOf() {
  const best = model.recommended;
  const table = model.tables.filter(({ guidance }) => guidance === 1).sort((a, b) => a.steps - b.steps)[0] ?? model.tables[0];
  const fewest = table
    ? { sampler: table.sampler, steps: table.steps, guidance: table.guidance }
    : { sampler: model.samplers.includes("unipc") ? "unipc" : model.default_sampler, steps: FEW };
  const presets = { Best: ["The settings recommended for this model", best] };
  if (!isSame(fewest, best)) presets.Fast = ["The fewest steps that still give good images", fewest];
  if (model.samplers.includes("ddpm")) {
    const all = { sampler: "ddpm", steps: model.num_timesteps, n: 1 };
    presets["Every step"] = ["DDPM as published, with all steps", all];
  }
  if (model.conditional && model.null_class !== null) {
    presets.Guided = ["A high guidance scale", { ...guidable(best), guidance: STRONG }];
  }
  return presets;
}

function showPresets() {
  element("presets").replaceChildren(
    ...Object.entries(presetsOf()).map(([name, [title, given]]) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: name, title });
      button.className = "chip";
      button.addEventListener("click", () => {
        const { class_label, seed, n, guidance } = settings();
        fillFrom({ class_label, seed, n, guidance, ...given });
      });
      return button;
    }),
  );
}
