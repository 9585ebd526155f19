// Submits a job. Its key is kept until there is an answer: a repeated submit, even after a reload, gets that job.

import { ask, parse, Refusal } from "./api.js";
import { keep, recall } from "./kept.js";

const WAITS_MS = [500, 1000, 3000]; // between tries
const LEAVING_MS = 5000; // that a reload may take to replace the page

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
    history.replaceState(null, "", `#job=${job.id}`);
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
