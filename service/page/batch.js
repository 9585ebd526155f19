// The batch of the server as it is now: each job a line, its rows at their own timestep.

import { askQuietly, element, parse, post, reason, requestOf, root, seconds } from "./api.js";
import { usualOpening } from "./form.js";

const LOOK_MS = 250, REST_MS = 2000; // between looks: while something runs, while nothing does
const MOST_DOTS = 24; // rows that are drawn of a job

let seen = false; // whether the section is on the screen
let timer = null;
let asked = []; // seeds of what this section has asked for

export function setUp(model) {
  new IntersectionObserver(([entry]) => {
    seen = entry.isIntersecting;
    look();
  }).observe(element("batch"));
  document.addEventListener("visibilitychange", look);
  element("load").addEventListener("click", () => load(model));
  element("load").ariaDisabled = "false";
}

async function look() {
  clearTimeout(timer);
  timer = null;
  if (!seen || document.hidden) return;
  let next = REST_MS;
  try {
    const batch = parse(await (await askQuietly(new URL("batch", root))).text());
    draw(batch);
    if (batch.jobs.length) next = LOOK_MS;
  } catch (error) {
    const why = error.status === 401 ? "it needs a key" : reason(error);
    element("batch-text").textContent = `The server's work cannot be shown: ${why}.`;
    element("jobs").replaceChildren();
  }
  clearTimeout(timer);
  timer = setTimeout(look, next);
}

function draw({ rows_active: active, max_batch: most, jobs, more }) {
  const rows = jobs.reduce((sum, job) => sum + job.n, 0);
  const others = more ? ` ${more === 1 ? "1 more job is" : `${more} more jobs are`} not shown.` : "";
  const last = `The last forward pass had ${active} rows of at most ${most}.`;
  element("batch-text").textContent = jobs.length
    ? `${last} ${rows} rows of ${jobs.length === 1 ? "1 job" : `${jobs.length} jobs`} are in progress.${others}`
    : `The server is idle. Its next forward pass has room for ${most} rows.`;
  const lines = new Map([...element("jobs").children].map((line) => [line.id, line]));
  const now = jobs.map((job) => {
    const line = lines.get(`batch-${job.number}`) ?? addLine(job);
    update(line, job);
    return line;
  });
  element("jobs").replaceChildren(...now);
}

function addLine(job) {
  const line = Object.assign(document.createElement("li"), { id: `batch-${job.number}` });
  for (const name of ["whose", "track", "where"]) line.append(Object.assign(document.createElement("span"), { className: name }));
  const dots = document.createElement("span");
  dots.className = "dots";
  for (let k = 0; k < Math.min(job.n, MOST_DOTS); k++) dots.append(document.createElement("i"));
  line.querySelector(".track").append(dots);
  return line;
}

function update(line, { id, number, yours, n, step, steps, t, num_timesteps: most, state, seed, position, eta_s: eta }) {
  const part = (name) => line.querySelector(`.${name}`);
  const own = (seed !== null && asked.includes(String(seed))) || (id !== null && element(`result-${id}`) !== null);
  line.classList.toggle("own", own);
  line.classList.toggle("waits", state === "waiting");
  part("whose").textContent = own ? "from this page" : yours ? `job ${number}` : `another user's job ${number}`;
  part("dots").style.setProperty("--share", Math.max(0, Math.min(1, 1 - t / Math.max(1, most - 1))));
  const ahead = position === 0 ? "next" : position === 1 ? "1 job ahead" : `${position} jobs ahead`;
  const where = state === "waiting" ? ahead : `step ${step} of ${steps}, t = ${Math.round(t)}`;
  part("where").textContent = `${n === 1 ? "1 row" : `${n} rows`}, ${where}, ${seconds(eta)} left`;
}

// Three requests that have nothing in common. They leave nothing behind.
async function load(model) {
  const button = element("load");
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true";
  const most = Math.min(8, model.limits.max_n), begins = usualOpening(model);
  const plain = model.samplers.includes("ddpm") ? { ...begins, sampler: "ddpm", nearest: undefined } : begins;
  const specs = [
    { ...plain, n: most, steps: Math.min(200, model.num_timesteps) },
    { ...plain, n: Math.min(4, most), steps: Math.min(60, model.num_timesteps), guidance: undefined },
    { ...begins, n: 1 },
  ].map((spec) => ({ ...spec, seed: String(crypto.getRandomValues(new Uint32Array(1))[0]) }));
  asked = specs.map(({ seed }) => seed);
  element("load-error").textContent = "";
  setTimeout(look);
  const answers = await Promise.allSettled(specs.map(async (spec) => (await post("sample", requestOf(spec, model), "image/png")).blob()));
  const failed = answers.find(({ status }) => status === "rejected");
  if (failed) element("load-error").textContent = `Not all requests succeeded: ${reason(failed.reason)}.`;
  button.ariaDisabled = "false";
}
