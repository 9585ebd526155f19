// One durable job, from the question until it ends: how it is asked for, where it stands, and how it is followed, by
// server-sent events, or by looking at it where those are refused.

import {
  ask, base, element, getJson, isGone, keep, parse, reason, recall, Refusal, seconds, shorten, toBlob,
} from "./api.js";
import { addFrame, clearFrames, fillIn, lastMissing, MOST_BYTES } from "./film.js";
import { askBeginning, frameBytes } from "./path.js";
import { SHOWS } from "./stage.js";

const MOST_FRAMES = 200; // of a job
const AGAIN_MS = 2000; // until a job is looked at again
const FILL_TRIES = 30; // at AGAIN_MS each, for frames that were missed
const LOOKS = 5; // to one attempt at events that were refused
const ENDS = ["done", "failed", "cancelled"];
const WAITS_MS = [500, 1000, 3000]; // between tries
const LEAVING_MS = 5000; // that a reload may take to replace the page

// --- asking: a key is kept until there is an answer, so a repeated submit, even after a reload, gets the same job ---

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// A reload begins before the page ends. An address that is set in between is not that of the page that comes.
let leaving = false;
addEventListener("beforeunload", () => (leaving = true));
addEventListener("pageshow", () => (leaving = false)); // the browser may have kept the page, and shows it again

// What has no answer yet: {key, body}, with underWay while it is being asked, and cancelled if its job is not wanted
// any more. Then, for as long as a reload may take, the job: {answered, cancelled}. The session keeps it, so that the
// next load of the page knows.
const remembered = (model) => recall(model, "asked");
const remember = (model, asked) => keep(model, "asked", asked);

// The body of what is being asked, or was when the page was left; undefined if there is nothing.
export function underWay(model) {
  const asked = remembered(model);
  return asked?.underWay ? asked.body : undefined;
}

export function cancelUnderWay(model) {
  remember(model, { ...remembered(model), cancelled: true });
}

// The page is here by a reload that may have begun before the answer came: then the job of that answer is put into the
// address, which the reload has from before. Returns the job's id if it is to be cancelled, else null.
export function addAnswered(model) {
  const { answered, cancelled } = remembered(model) ?? {};
  if (!answered) return null;
  const [navigation] = performance.getEntriesByType("navigation");
  if (navigation.type !== "reload") {
    forgetAnswered(model);
    return null;
  }
  setTimeout(forgetAnswered, LEAVING_MS, model, answered); // there may be another reload on its way
  history.replaceState(null, "", `#job=${answered}`);
  return cancelled ? answered : null;
}

// id: of the only job that is meant; else of any.
export function forgetAnswered(model, id) {
  const { answered } = remembered(model) ?? {};
  if (answered && answered === (id ?? answered)) remember(model, null);
}

// Ask for a job: {job, cancelled}. Raises what `ask` does; tryingAgain is called before each further try.
export async function create(model, body, tryingAgain) {
  const before = remembered(model);
  const { key, ...rest } = before?.body === body ? before : { key: newKey(), body };
  remember(model, { key, ...rest, underWay: true });
  try {
    const job = parse(await insist(key, body, tryingAgain));
    if (leaving) await sleep(LEAVING_MS); // the page that comes asks again; this goes on only if none comes
    leaving = false;
    const cancelled = remembered(model)?.cancelled;
    if (jobInAddress()) history.pushState(null, "", `#job=${job.id}`); // so that one can go back to the one before
    else history.replaceState(null, "", `#job=${job.id}`);
    remember(model, { answered: job.id, cancelled }); // a reload that has begun takes the address from before
    setTimeout(forgetAnswered, LEAVING_MS, model, job.id);
    return { job, cancelled };
  } catch (error) {
    // A 5xx may be a proxy's, about an answer that it has lost.
    if (error instanceof Refusal && error.status < 500) remember(model, null);
    else remember(model, { key, body });
    throw error;
  }
}

async function insist(key, body, tryingAgain) {
  const options = { method: "POST", headers: { "Content-Type": "application/json", "Idempotency-Key": key }, body };
  for (const wait of WAITS_MS) {
    try {
      return await (await ask("jobs", options)).text();
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // that was an answer
    }
    tryingAgain();
    await sleep(wait);
  }
  return (await ask("jobs", options)).text();
}

function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// --- where it stands, in words and as a bar ---

export function say(text) {
  if (element("status").textContent !== text) element("status").textContent = text; // a reader says each change
}

// Of a job that waits or runs.
function showForecast({ state, position, eta_s: eta }) {
  if (state === "running") say("Running.");
  else if (eta === null || eta === undefined) say("Waiting.");
  else if (position) say(`Waiting: ${position === 1 ? "1 job" : `${position} jobs`} ahead, done in about ${seconds(eta)}.`);
  else say(`Started, done in about ${seconds(eta)}.`);
}

// t is not told by a GET, and eta_s may not be known.
function showStep({ step, steps, t, eta_s: eta }) {
  const parts = [`Step ${step} of ${steps}`];
  if (t !== undefined) parts.push(`t = ${t}`);
  showProgress(step / steps, parts.join(", "));
  if (typeof eta === "number") element("left-text").textContent = `, ${seconds(eta)} left`;
}

function showProgress(share, text) {
  element("progress").value = share;
  element("step-text").textContent = text;
  element("left-text").textContent = "";
  tellTitle(share > 0 && share < 1 ? `${Math.floor(100 * share)} % ` : "");
}

/** Begin the title of the tab with how far a job is. */
function tellTitle(progress) {
  document.title = progress + document.title.replace(/^\d+ % /, "");
}

// --- following it ---

// The job that is being followed. After each await, check that it is still the current job.
let current = null;
let filling = null; // what aborts asking for frames that were missed, of the job that is shown

export const jobInAddress = () => /^#job=([0-9a-f]{32})$/.exec(location.hash)?.[1];

// Show a job until it ends. tell: what to do with its end, {done, lost, over, complain}; `lost`
// is called where there is no image, `over` however it ends.
// edit: the picture and mask that it began with, where the page still has them.
export function follow(job, model, tell, edit = {}) {
  clear();
  const every = stepsBetweenFrames(job, model), query = new URLSearchParams({ every });
  for (const show of SHOWS) query.append("show", show);
  const url = new URL(`jobs/${job.id}/events?${query}`, base);
  // looks: since events came; look: the number of the newest, which makes older ones void.
  current = { id: job.id, url, tell, source: null, timer: null, looks: 0, look: 0, broken: false, ended: false };
  Object.assign(current, { model, every, edit });
  showForecast(job);
  goOn(current, job);
}

/** Whether a job is shown that has not ended. */
export const isFollowing = () => current !== null;

/** Leave the job that is shown, and show none. */
export function clear() {
  leave();
  filling?.abort();
  clearFrames();
  showProgress(0, "");
}

// So many that all frames together stay below MOST_BYTES: noise hardly compresses, and comes in base64.
function stepsBetweenFrames({ n, steps }, model) {
  const most = Math.max(1, Math.min(MOST_FRAMES, Math.floor(MOST_BYTES / (frameBytes({ n }, model) * (4 / 3)))));
  return Math.max(1, Math.ceil(steps / most));
}

// Look no longer; the job goes on.
function leave() {
  if (current) pause(current);
  current = null;
}

export async function cancel() {
  const job = current;
  if (!job) return;
  say("Cancelling…");
  try {
    const ended = parse(await (await ask(`jobs/${job.id}/cancel`, { method: "POST" })).text());
    if (job === current) end(job, ended);
  } catch (error) {
    if (job !== current) return; // it has ended meanwhile
    say("Cancelling failed.");
    job.tell.complain(`It could not be cancelled: ${reason(error)}.`);
  }
}

// found: the job as a GET has told it.
function goOn(job, found) {
  if (ENDS.includes(found.state)) {
    end(job, found);
    return;
  }
  if (!document.hidden && job.looks++ % LOOKS === 0) {
    listen(job);
  } else {
    showForecast(found);
    if (found.state === "running") {
      say("Running. There are no frames at the moment.");
      showStep(found);
    }
    lookLater(job);
  }
}

function listen(job) {
  const source = (job.source = new EventSource(job.url));
  const on = (name, act) => source.addEventListener(name, (event) => job === current && act(parse(event.data)));
  on("waiting", showForecast);
  on("progress", (progress) => {
    say("Running.");
    showStep(progress);
  });
  on("frame", (frame) => {
    say("Running.");
    showStep(frame);
    addFrame(frame, { [frame.show]: toBlob(frame.data, frame.media_type) });
  });
  for (const name of ENDS) on(name, (ended) => end(job, ended));
  source.onopen = () => {
    if (job.broken) say("Connected again.");
    job.broken = false;
    job.looks = 0;
  };
  source.onerror = () => {
    if (job !== current || job.ended) return;
    if (source.readyState === EventSource.CLOSED) lookLater(job); // it was refused, and does not try again by itself
    else broke(job);
  };
}

function lookLater(job) {
  job.timer = setTimeout(() => look(job), AGAIN_MS);
}

async function look(job) {
  const number = ++job.look;
  const stale = () => job !== current || job.ended || number !== job.look;
  let found;
  try {
    found = await getJson(`jobs/${job.id}`);
  } catch (error) {
    if (stale()) return;
    if (isGone(error)) {
      job.tell.lost();
      over(job, "The server no longer has this job.");
      job.tell.complain(`${error.message}.`);
    } else {
      broke(job);
      lookLater(job);
    }
    return;
  }
  if (!stale()) goOn(job, found);
}

function broke(job) {
  job.broken = true;
  say("No connection. Trying again…");
}

function pause(job) {
  job.source?.close();
  clearTimeout(job.timer);
  job.look++;
}

// Over HTTP/1.1 a browser opens six connections to a server, for all tabs: a hidden tab must not hold one. It looks now and
// then, for its title.
document.addEventListener("visibilitychange", () => {
  if (!current || current.ended) return;
  pause(current);
  current.looks = 0;
  look(current);
});

async function end(job, ended) {
  if (job.ended) return; // the answer to a cancel may come before the event
  job.ended = true;
  pause(job);
  if (ended.state === "done") {
    await showImages(job, ended);
  } else if (ended.state === "cancelled") {
    job.tell.lost();
    over(job, "Cancelled.");
  } else {
    job.tell.lost();
    over(job, "Not done.");
    job.tell.complain(`${shorten(ended.problem.detail)}.`, ended.problem.field);
  }
}

async function showImages(job, ended) {
  try {
    const images = await (await ask(`jobs/${ended.id}/image`)).blob();
    if (job !== current) return;
    showProgress(1, "");
    addFrame({ step: ended.steps, steps: ended.steps, t: 0 }, { x_t: images, x_0: images });
    job.tell.done(ended, images);
    over(job, `Done in ${seconds((new Date(ended.finished) - new Date(ended.created)) / 1000)}.`);
    fill(job, ended);
  } catch (error) {
    if (job !== current) return;
    over(job, "Done.");
    job.tell.complain(`The images could not be fetched: ${reason(error)}.`);
  }
}

// The film begins with the noise, and has a frame after every so many steps. Those that came before the page listened, or
// that were dropped on their way, are made again: they depend on nothing but the parameters.
async function fill({ model, every, edit }, { parameters, fingerprint }) {
  const until = lastMissing(every), isEdit = "image_sha256" in parameters;
  if (until < 0 || (isEdit && !edit.image)) return;
  const { signal } = (filling = new AbortController());
  for (let tries = 0; tries < FILL_TRIES && !signal.aborted; tries++) {
    try {
      const beginning = await askBeginning({ ...parameters, ...edit }, { every, until }, model, signal);
      if (!signal.aborted && beginning.fingerprint === fingerprint) fillIn(beginning.frames);
      return;
    } catch (error) {
      if (error instanceof Refusal && ![429, 503].includes(error.status)) return; // the film stays as it is
    }
    await sleep(AGAIN_MS);
  }
}

function over(job, text) {
  if (job !== current) return;
  say(text);
  element("left-text").textContent = "";
  tellTitle("");
  leave();
  job.tell.over();
}
