// The page of a model: what it opens with, the form, and what becomes of it. The parts are in the other files.

import { ask, copyLink, element, getJson, nameInAddress, parse, post, reason, Refusal, requestOf, root, toJson } from "./api.js";
import { clearFrames, film, setGrowing, showPath } from "./film.js";
import { complain, describe, fillForm, fillFrom, form, parameters, settings, tablesOf, usualOpening } from "./form.js";
import { addJob, addPicture, dropJob, markJob, restore } from "./history.js";
import {
  addAnswered, cancel, cancelUnderWay, clear, create, follow, forgetAnswered, isFollowing, jobInAddress, say, underWay,
} from "./job.js";
import { showWho } from "./key.js";
import { openPageOf, showMenu } from "./models.js";
import { askPath } from "./path.js";
import { fromHash, toHash } from "./recipe.js";
import { drawSchedule } from "./schedule.js";
import { finish, lay, setUpStage } from "./stage.js";

// Below the first view, so they may come after it.
const LATER = ["studio", "compare", "grid", "batch"];
const MOST_PASSES = 2000; // of all images together, that a link alone may ask the server for
// Of a first sample, which a busy server refuses at once and without work; and of one that somebody was sent.
const DEADLINE_S = 3, LINK_DEADLINE_S = 30;
const BUSY = "The server is too busy to show a first sample. You can still press Sample.";
const LOADING = "The model is still loading. You can press Sample now; the job waits for it.";
const OF_LINK = "The form has the settings of the link. Press Sample to see the result.";

let model = null;
let sending = true; // a request for a job, or the page is not set up
let opening = null; // what aborts asking for a first sample

async function start() {
  const later = Promise.all(LATER.map((name) => import(`./${name}.js`)));
  const [loaded, schedule] = await Promise.all(["model", "model/schedule"].map(getJson));
  model = loaded;
  const unwanted = addAnswered(model);
  const runBody = (body) => !sending && run(toJson(requestOf(body, model)));
  setUpStage(model, { run: runBody, edit: async (picture) => (await later)[0].edit(picture) });
  fillForm(model);
  form.inert = false; // before, this would have written over what somebody chose
  drawSchedule(schedule);
  const { channels, shown_channels: shown } = model;
  const part = channels === shown ? "" : `, ${shown} of ${channels} channels shown`;
  element("model").textContent =
    `${model.name}: ${model.width_px}×${model.height_px}${part}, T=${model.num_timesteps}, on ${model.device}`;
  const opened = openingShown();
  showWho(await getJson(new URL("key", root)), new URL("logout", root));
  const parts = await later;
  for (const part of parts) part.setUp(model, { run: runBody, watch, fillFrom, opened });
  send(false);
  const body = underWay(model); // the page was loaded again before there was an answer
  if (body) {
    fillFrom(parse(body));
    await run(body);
  } else {
    await findAgain(unwanted);
  }
  await Promise.all([restore(model, showResult), opened]); // last, since all else can be used meanwhile
}

// --- a first sample, the same one for everybody, so that a server has it ready after the first time ---

// A page with a recipe in its address opens with that one; one with a job is about to show it. Returns whether it is shown.
async function openingShown() {
  if (underWay(model) || jobInAddress()) {
    leaveOpening();
    return false;
  }
  let linked = fromHash(location.hash);
  if (linked) fillFrom(linked);
  // What a link leaves out, and the steps of a table, are as the form has them.
  if (linked && (!linked.sampler || !linked.steps || tablesOf(linked.sampler).length)) linked = settings();
  const seeded = linked?.seed !== undefined && !(linked.n * linked.steps > MOST_PASSES);
  if (linked && !seeded) {
    leaveOpening();
    element("caption").textContent = OF_LINK;
    return false;
  }
  const shown = await (linked ? open(linked, LINK_DEADLINE_S, OF_LINK) : open(usualOpening(model), DEADLINE_S, BUSY));
  if (shown && !matchMedia("(prefers-reduced-motion: reduce)").matches) film.play();
  return shown;
}

/** Show the way of a sample, if the server has time for it, or say why nothing is shown. Returns whether it is shown. */
async function open(given, deadline_s, busyText) {
  leaveOpening();
  const mine = (opening = new AbortController());
  document.body.dataset.opening = "asked";
  element("caption").textContent = "Making a first sample…";
  try {
    const path = await askPath({ ...given, deadline_s }, model, mine.signal);
    if (mine !== opening) return false;
    showSample(path, given);
    document.body.dataset.opening = "shown";
    return true;
  } catch (error) {
    if (mine !== opening) return false;
    clearFrames();
    element("caption").textContent = whyNot(error, busyText);
    document.body.dataset.opening = "absent";
    return false;
  }
}

function whyNot(error, busyText) {
  if (!(error instanceof Refusal)) return "The server did not answer when asked for a first sample.";
  if (error.status === 422 && error.field !== "deadline_s") return `The sample of this link cannot be made: ${error.message}.`;
  if (error.code === "quota_exceeded") return `The quota of this key does not allow a first sample: ${error.message}.`;
  return error.code === "model_loading" ? LOADING : busyText;
}

/** Something else takes its place. */
function leaveOpening() {
  opening?.abort();
  opening = null;
  element("caption").textContent = "Your images appear here as they form.";
  document.body.dataset.opening = "left";
}

/** Show a path that is had whole, with what made it. */
function showSample({ frames, image }, { nearest: _, ...made }) {
  lay(made.n);
  showPath(frames);
  const one = async (_, alone) => (await post("sample", requestOf(alone, model), "image/png")).blob();
  finish({ parameters: made, picture: image, image: one });
}

/** Show a path, as one of the grid's. */
function watch(path, made) {
  leaveOpening();
  rest();
  showSample(path, made);
  toTop();
}

// --- jobs ---

function showResult(id) {
  if (jobInAddress() === id) findAgain();
  else location.hash = `#job=${id}`;
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
      complain(`The address of this page names a job of the model ${job.model}, which is not loaded.`);
    } else if (job.durable) {
      fillFrom(job.parameters);
      show(job);
      if (id === unwanted) cancel();
    } else complain("The job in the address of this page cannot be shown: it is not a durable job.");
  } catch (error) {
    complain(`The job in the address of this page cannot be shown: ${reason(error)}.`);
  }
}

async function run(body) {
  if (sending) return; // something else was begun while this was made ready
  complain("");
  send(true);
  say("Sending…");
  toTop();
  try {
    const { job, cancelled } = await create(model, body, () => say("No answer. Trying again…"));
    send(false);
    show(job, parse(body));
    if (cancelled) cancel();
  } catch (error) {
    send(false);
    if (error instanceof Refusal) {
      say("Not started.");
      if (isUnloaded(error)) tellUnloaded();
      else complain(`${error.message}.`, error.field);
    } else {
      say("No answer.");
      complain("The server did not answer. Press Sample again with the same settings to get the same job.");
    }
  }
}

/** Nothing of the user's is shown any more. */
function rest() {
  clear();
  markJob(null);
  suit();
  lay(1);
  complain("");
  say("Press Sample to make your own.");
}

// Scroll to what is being made, unless one sees it.
function toTop() {
  const pictures = element("x_t").getBoundingClientRect();
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
  complain("");
  leaveOpening();
  film.pause();
  lay(job.n);
  element("caption").textContent = `${describe(job.parameters)}.`;
  addJob(job, model);
  const lost = () => dropJob(job.id, model);
  follow(job, model, { done, lost, over: suit, complain }, { ...(image && { image }), ...(mask && { mask }) });
  suit();
}

function done(job, picture) {
  const images = async (query, accept) => (await ask(`jobs/${job.id}/image${query}`, { headers: { Accept: accept } })).blob();
  finish({
    parameters: job.parameters,
    picture,
    image: (number) => images(`?index=${number}`, "image/png"),
    zip: () => images("", "application/zip"),
  });
  addPicture(job, picture);
}

function send(yes) {
  sending = yes;
  suit();
}

// A job may be asked for while others run: the server queues it, and the one that was shown is in the history.
function suit() {
  const running = sending || isFollowing();
  setGrowing(running);
  // Not disabled: disabling a pressed button would lose the focus.
  for (const id of ["go", "edit", "another", "vary"]) element(id).ariaDisabled = String(sending);
  element("cancel").ariaDisabled = String(!running);
  element("cancel").title = running ? "" : "Nothing is running";
}

const isUnloaded = (error) => error.code === "model_not_found";

function tellUnloaded() {
  complain(`The model ${nameInAddress} is not loaded. The menu at the top lists the loaded models.`);
  showMenu();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (model && !sending) run(toJson(requestOf(parameters(), model)));
});
form.addEventListener("invalid", () => (element("more").open = true), { capture: true }); // or the browser could not show where
element("cancel").addEventListener("click", ({ target }) => target.ariaDisabled !== "true" && giveUp());
element("link").addEventListener("click", ({ target }) => model && copyLink(target, toHash(settings())));
addEventListener("hashchange", () => {
  if (model) forgetAnswered(model); // somebody wants to see something else
  const linked = model && !sending && fromHash(location.hash);
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
  } else complain(`This page could not start: ${reason(error)}. Reload it when the server is ready.`);
});
