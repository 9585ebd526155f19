// One durable job: asked for, followed by server-sent events until it ends, found again by the address of the page.

import { ask, base, element, getJson, parse, Refusal, seconds, toJson } from "./api.js";
import { addFrame, clearFrames } from "./frames.js";

const MOST_FRAMES = 200; // of a job; each is kept
const MOST_BYTES = 100e6; // that they may take: noise hardly compresses
const AGAIN_MS = 2000; // until a server that is away is looked for again

// A job that is being followed: {id, source, ended}. Whoever waits for an answer looks whether it is this one still.
let current = null;

export const jobInAddress = () => /^#job=([0-9a-f]{32})$/.exec(location.hash)?.[1];

// Ask for a job. Raises what `ask` does. A retry with the same key is the same job, so the browser may repeat it.
export async function create(spec) {
  const key = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
  const job = parse(await (await ask("jobs", { method: "POST", headers, body: toJson(spec) })).text());
  history.replaceState(null, "", `#job=${job.id}`);
  return job;
}

// Show a job until it ends. tell: what to do with its end, {done, over}; `over` is called however it ends.
export function follow(job, model, tell) {
  leave();
  clearFrames();
  element("progress").value = 0;
  element("progress-text").textContent = "";
  const { n, steps } = job;
  const frameBytes = 2 * n * model.width_px * model.height_px * model.channels;
  const most = Math.max(10, Math.min(MOST_FRAMES, Math.floor(MOST_BYTES / frameBytes)));
  const query = new URLSearchParams({ every: Math.max(1, Math.ceil(steps / most)) });
  for (const show of ["x_t", "x_0"]) query.append("show", show);
  current = { id: job.id, tell, url: new URL(`jobs/${job.id}/events?${query}`, base), ended: false };
  foresee(job);
  listen(current);
}

// Look no longer; the job goes on.
export function leave() {
  current?.source?.close();
  current = null;
}

export async function cancel() {
  if (!current) return;
  say("Cancelling…");
  await ask(`jobs/${current.id}/cancel`, { method: "POST" });
}

function listen(job) {
  const source = (job.source = new EventSource(job.url));
  const on = (name, act) => source.addEventListener(name, (event) => job === current && act(parse(event.data)));
  on("waiting", foresee);
  on("frame", (frame) => {
    say("Running.");
    element("progress").value = frame.step / frame.steps;
    element("progress-text").textContent =
      `Step ${frame.step} of ${frame.steps}, t = ${frame.t}, ${seconds(frame.eta_s)} left`;
    addFrame(frame, { [frame.show]: `data:${frame.media_type};base64,${frame.data}` });
  });
  for (const name of ["done", "failed", "cancelled"]) on(name, (ended) => end(job, ended));
  source.onerror = () => {
    if (job !== current || job.ended) return;
    say("The connection broke. The job goes on; looking for the server…");
    if (source.readyState === EventSource.CLOSED) setTimeout(() => lookAgain(job), AGAIN_MS); // it does not by itself
  };
}

async function lookAgain(job) {
  if (job !== current) return;
  try {
    await getJson(`jobs/${job.id}`);
  } catch (error) {
    if (error instanceof Refusal && error.status === 404) {
      over(job, "The server knows nothing of this job any more.");
      job.tell.complain(error.message);
    } else {
      setTimeout(() => lookAgain(job), AGAIN_MS);
    }
    return;
  }
  if (job === current) listen(job);
}

async function end(job, ended) {
  job.ended = true;
  job.source.close();
  if (ended.state === "done") {
    try {
      const url = URL.createObjectURL(await (await ask(`jobs/${ended.id}/image`)).blob());
      if (job !== current) return;
      element("progress").value = 1;
      element("progress-text").textContent = "";
      addFrame({ step: ended.steps, steps: ended.steps, t: 0 }, { x_t: url, x_0: url });
      job.tell.done(ended, url);
      over(job, `Done in ${seconds((new Date(ended.finished) - new Date(ended.created)) / 1000)}.`);
    } catch (error) {
      over(job, "Done.");
      job.tell.complain(`The images could not be had: ${error.message}`);
    }
  } else if (ended.state === "cancelled") {
    over(job, "Cancelled.");
  } else {
    over(job, "Not done.");
    job.tell.complain(`${ended.problem.detail}.`, ended.problem.field);
  }
}

function over(job, text) {
  if (job !== current) return;
  say(text);
  leave();
  job.tell.over();
}

function foresee({ state, position, eta_s: eta }) {
  if (state === "running") say("Running.");
  else if (eta === null || eta === undefined) say("Waiting.");
  else if (position) say(`Waiting: ${position === 1 ? "1 job" : `${position} jobs`} ahead, done in about ${seconds(eta)}.`);
  else say(`Begun, done in about ${seconds(eta)}.`);
}

export function say(text) {
  if (element("status").textContent !== text) element("status").textContent = text; // a reader says each change
}
