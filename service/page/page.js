// The page of a model: what it opens with, the form, and what becomes of it. The parts are in the other files.

import { element, getJson, nameInAddress, parse, reason, Refusal, requestOf, root, toJson } from "./api.js";
import { addAnswered, cancelUnderWay, create, forgetAnswered, underWay } from "./asking.js";
import { complain, describe, fillForm, fillFrom, form, parameters, tablesOf } from "./form.js";
import { frameCount, goTo, setGrowing, showPath } from "./frames.js";
import { addResult, restore } from "./gallery.js";
import { cancel, clear, follow, jobInAddress } from "./job.js";
import { showWho } from "./key.js";
import { copyLink } from "./link.js";
import { openPageOf, showMenu } from "./models.js";
import { leaveOpening, open, usualOpening } from "./opening.js";
import { player } from "./player.js";
import { showPresets } from "./presets.js";
import { fromHash, toHash } from "./recipe.js";
import { drawSchedule } from "./schedule.js";
import { say } from "./standing.js";

// Below the first view, so they may come after it.
const LATER = ["picture", "noise", "edit", "compare", "grid", "batch"];
const MOST_PASSES = 2000; // of all images together, that a link alone may ask the server for

let model = null;
let running = true; // or about to

const player1 = player(element("play"), {
  show: (share) => frameCount() && goTo(Math.round(share * (frameCount() - 1))),
  share: () => (frameCount() > 1 ? Number(element("scrub").value) / (frameCount() - 1) : 0),
});

async function start() {
  const later = Promise.all(LATER.map((name) => import(`./${name}.js`)));
  const [loaded, schedule] = await Promise.all(["model", "model/schedule"].map(getJson));
  model = loaded;
  const unwanted = addAnswered(model);
  fillForm(model);
  form.elements.class_label.value = usualOpening(model).class_label ?? "";
  form.inert = false; // before, this would have written over what somebody chose
  showPresets(model);
  drawSchedule(schedule);
  element("model").textContent =
    `${model.name}: ${model.width_px}×${model.height_px}, T=${model.num_timesteps}, on ${model.device}`;
  const opened = openingShown();
  showWho(await getJson(new URL("key", root)), new URL("logout", root));
  const parts = await later;
  for (const part of parts) part.setUp(model, { run: (body) => run(toJson(requestOf(body, model))), watch, fillFrom, opened });
  busy(false);
  const body = underWay(model); // the page was loaded again before there was an answer
  if (body) {
    fillFrom(parse(body));
    await run(body);
  } else {
    await findAgain(unwanted);
  }
  await Promise.all([restore(model), opened]); // last, since all else can be used meanwhile
}

// A page with a recipe in its address opens with that one; one with a job is about to show it. Returns whether it is shown.
async function openingShown() {
  if (underWay(model) || jobInAddress()) {
    leaveOpening();
    return false;
  }
  let linked = fromHash(location.hash);
  if (linked) fillFrom(linked);
  if (linked && tablesOf(linked.sampler).length) linked = parameters(); // the steps of a table, as the form has them
  const seeded = linked?.seed !== undefined && !(linked.n * linked.steps > MOST_PASSES);
  if (linked && !seeded) {
    leaveOpening();
    element("caption").textContent = "The form has the settings of the link. Press Sample to see what they make.";
    return false;
  }
  const shown = await open(linked ?? usualOpening(model), model, describe);
  if (shown && !matchMedia("(prefers-reduced-motion: reduce)").matches) player1.play();
  return shown;
}

/** Show a path that is had whole, as one of the grid's. Returns whether it is shown: not while a job is. */
function watch(frames, text) {
  if (running) return false;
  leaveOpening();
  rest();
  showPath(frames);
  element("caption").textContent = text;
  toTop();
  return true;
}

// Whose address names a job, as after a reload, shows it.
async function findAgain(unwanted = null) {
  const id = jobInAddress();
  if (!model || !id || underWay(model)) return; // the answer will change the address
  try {
    const job = await getJson(`jobs/${id}`);
    if (id !== jobInAddress()) return;
    if (job.model !== model.name) {
      if (await openPageOf(job.model, location.hash)) return;
      complain(`The job in the address of this page is of the model ${job.model}, which is not loaded.`);
    } else if (job.durable) {
      leaveOpening();
      fillFrom(job.parameters);
      show(job);
      if (id === unwanted) cancel();
    } else complain("The job in the address of this page cannot be followed: it is not durable, and ends with its request.");
  } catch (error) {
    complain(`The job in the address of this page cannot be shown: ${reason(error)}.`);
  }
}

async function run(body) {
  if (running) return; // something else was begun while this was made ready
  complain("");
  busy(true);
  leaveOpening();
  clear();
  say("Asking…");
  toTop();
  try {
    const { job, cancelled } = await create(model, body, () => say("There is no answer. Trying again…"));
    show(job, parse(body));
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

/** Nothing of the user's is shown any more. */
function rest() {
  clear();
  complain("");
  say("Press Sample to make your own.");
}

// Scroll to what is being made, unless one sees it.
function toTop() {
  const pictures = document.querySelector("#watch .pair").getBoundingClientRect();
  if (pictures.top < 0 || pictures.top > innerHeight / 2) element("watch").scrollIntoView({ block: "start" });
}

function giveUp() {
  if (!underWay(model)) {
    cancel();
    return;
  }
  say("Cancelling…");
  cancelUnderWay(model);
}

// image, mask: those that an edit was asked for with, where the page still has them.
function show(job, { image, mask } = {}) {
  player1.pause();
  element("caption").textContent = `Yours: ${describe(job.parameters)}.`;
  busy(true);
  const tell = { done: (ended, picture) => addResult(ended, picture, model), over: () => busy(false), complain };
  follow(job, model, tell, { ...(image && { image }), ...(mask && { mask }) });
}

function busy(yes) {
  running = yes;
  setGrowing(yes);
  // Not disabled: disabling a pressed button would lose the focus.
  for (const id of ["go", "edit"]) element(id).ariaDisabled = String(yes);
  element("cancel").ariaDisabled = String(!yes);
}

const isUnloaded = (error) => error.code === "model_not_found";

function tellUnloaded() {
  complain(`The model ${nameInAddress} is not loaded. The menu at the top has those that are.`);
  showMenu();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (model && !running) run(toJson(requestOf(parameters(), model)));
});
element("cancel").addEventListener("click", () => {
  if (model && running) giveUp();
});
element("link").addEventListener("click", ({ target }) => model && copyLink(target, toHash(parameters())));
addEventListener("hashchange", () => {
  if (model) forgetAnswered(model); // somebody wants to see something else
  const linked = model && !running && fromHash(location.hash);
  if (!linked) {
    findAgain();
    return;
  }
  rest();
  openingShown();
});

showMenu();
start().catch((error) => {
  document.body.dataset.opening = "absent";
  element("caption").textContent = "There is nothing to show yet.";
  if (isUnloaded(error)) {
    element("model").textContent = `${nameInAddress}: not loaded`;
    tellUnloaded();
  } else complain(`This page could not be set up: ${reason(error)}. Reload it when the server is ready.`);
});
