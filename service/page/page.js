// The page of a model: the form, and what becomes of it. The parts are in the other files.

import { element, getJson, nameInAddress, parse, Refusal, root, toJson } from "./api.js";
import { cancelUnderWay, create, underWay } from "./asking.js";
import { addResult, restore } from "./gallery.js";
import { cancel, clear, follow, jobInAddress } from "./job.js";
import { showWho } from "./key.js";
import { openPageOf, showMenu } from "./models.js";
import { setUpNoise } from "./noise.js";
import { drawSchedule } from "./schedule.js";
import { say } from "./standing.js";

// The guidance, where the checkpoint recommends nothing.
const GUIDANCE = 2;

const form = element("form");
let model = null;
let stepsChosen = false; // by the user: another sampler does not change them
let running = true; // or about to

async function start() {
  const [loaded, schedule] = await Promise.all(["model", "model/schedule"].map(getJson));
  model = loaded;
  fillForm();
  drawSchedule(schedule);
  setUpNoise(model);
  element("model").textContent =
    `${model.name}: ${model.width_px}×${model.height_px}, T=${model.num_timesteps}, on ${model.device}`;
  showWho(await getJson(new URL("key", root)), new URL("logout", root));
  await restore(model);
  busy(false);
  const body = underWay(model); // the page was loaded again before there was an answer
  if (body) {
    fillFrom(parse(body));
    await run(body);
  } else {
    await findAgain();
  }
}

// Whose address names a job, as after a reload, shows it.
async function findAgain() {
  const id = jobInAddress();
  if (!model || !id || underWay(model)) return; // the answer will change the address
  try {
    const job = await getJson(`jobs/${id}`);
    if (id !== jobInAddress()) return;
    if (job.model !== model.name) {
      if (await openPageOf(job.model, location.hash)) return;
      complain(`The job in the address of this page is of the model ${job.model}, which is not loaded.`);
    } else if (job.durable) {
      fillFrom(job.parameters);
      show(job);
    } else complain("The job in the address of this page cannot be followed: it is not durable, and ends with its request.");
  } catch (error) {
    complain(`The job in the address of this page cannot be shown: ${error.message}.`);
  }
}

function fillForm() {
  const sampler = model.recommended?.sampler ?? model.default_sampler;
  fill(form.elements.sampler, model.samplers.map((name) => [name, name]), sampler);
  suitSteps();
  form.elements.guidance.value = model.recommended?.guidance ?? GUIDANCE;
  form.elements.n.max = model.limits.max_n;
  if (model.conditional) {
    element("class-field").hidden = false;
    const classes = model.class_names.map((name, number) => [String(number), name]);
    const any = model.null_class === null ? [] : [["", "no class"]];
    fill(form.elements.class_label, [...classes, ...any], "0");
    element("guidance-field").hidden = model.null_class === null;
  }
  form.elements.class_label.addEventListener("change", suitGuidance);
  form.elements.sampler.addEventListener("change", suitSteps);
  form.elements.steps.addEventListener("input", () => (stepsChosen = true));
  suitGuidance();
}

// Fill in what a job was asked for, as far as there are fields for it.
function fillFrom(spec) {
  for (const name of ["sampler", "steps", "n"]) form.elements[name].value = spec[name];
  form.elements.seed.value = spec.seed ?? "";
  const labels = new Set([spec.class_label ?? null].flat());
  if (!labels.has(null)) form.elements.guidance.value = spec.guidance ?? 1; // else it had none
  if (labels.size === 1) form.elements.class_label.value = [...labels][0] ?? "";
  stepsChosen = spec.steps !== suitableSteps(spec.sampler);
  suitGuidance();
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

function suitGuidance() {
  const tables = tablesOf(form.elements.sampler.value);
  const never = tables.length > 0 && tables.every((table) => table.guidance === 1); // such a sampler is not guided
  const hidden = element("guidance-field").hidden;
  form.elements.guidance.disabled = hidden || never || form.elements.class_label.value === "";
}

function tablesOf(sampler) {
  return model.tables.filter((table) => table.sampler === sampler);
}

function suitSteps() {
  const sampler = form.elements.sampler.value;
  form.elements.steps.max = model.sampler_details[sampler].max_steps;
  element("when").textContent = model.sampler_details[sampler].when;
  if (!stepsChosen) form.elements.steps.value = suitableSteps(sampler);
  suitGuidance();
}

function suitableSteps(sampler) {
  const { recommended } = model;
  return recommended?.sampler === sampler ? recommended.steps : model.sampler_details[sampler].good_steps;
}

function parameters() {
  const given = Object.fromEntries(new FormData(form)); // what is disabled is left out
  const spec = { n: Number(given.n), steps: Number(given.steps), sampler: given.sampler };
  if (given.seed) spec.seed = given.seed.replace(/^0+(?=\d)/, "");
  if (given.class_label) spec.class_label = Number(given.class_label);
  if (given.guidance !== undefined && model.conditional) spec.guidance = Number(given.guidance);
  if (tablesOf(spec.sampler).length) spec.nearest = true; // there are tables for some steps
  return spec;
}

async function run(body) {
  complain("");
  busy(true);
  clear();
  say("Asking…");
  const [above, below] = [form, element("watch")].map((part) => part.getBoundingClientRect());
  if (below.top >= above.bottom) element("watch").scrollIntoView({ block: "nearest" }); // else it is beside the form
  try {
    const { job, cancelled } = await create(model, body, () => say("There is no answer. Trying again…"));
    show(job);
    if (cancelled) cancel();
  } catch (error) {
    busy(false);
    if (error instanceof Refusal) {
      say("Not begun.");
      if (isUnloaded(error)) tellUnloaded();
      else complain(`${error.message}.`, error.field);
    } else {
      say("Nothing is known of the job.");
      complain("There is no connection: no answer came. Sample, with the same parameters, asks for the same job again.");
    }
  }
}

function giveUp() {
  if (!underWay(model)) {
    cancel();
    return;
  }
  say("Cancelling…");
  cancelUnderWay(model);
}

function show(job) {
  busy(true);
  follow(job, model, {
    done: (ended, picture) => addResult(ended, picture, model),
    over: () => busy(false),
    complain,
  });
}

function busy(yes) {
  running = yes;
  // Not disabled: disabling a pressed button would lose the focus.
  element("go").ariaDisabled = String(yes);
  element("cancel").ariaDisabled = String(!yes);
}

function complain(text, field) {
  element("error").textContent = text;
  for (const input of form.elements) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
  const input = field && form.elements[field];
  if (input) {
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", "error");
    input.focus();
  }
}

const isUnloaded = (error) => error.code === "model_not_found";

function tellUnloaded() {
  complain(`The model ${nameInAddress} is not loaded. The menu at the top has those that are.`);
  showMenu();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (model && !running) run(toJson(parameters()));
});
element("cancel").addEventListener("click", () => {
  if (model && running) giveUp();
});
addEventListener("hashchange", findAgain);

showMenu();
start().catch((error) => {
  if (isUnloaded(error)) {
    element("model").textContent = `${nameInAddress}: not loaded`;
    tellUnloaded();
  } else complain(`This page could not be set up: ${error.message}. Reload it when the server is ready.`);
});
