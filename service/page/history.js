// The jobs of this session, as a strip: their images, or that they are on their way. The session remembers them.

import { ask, element, getJson, isGone, keep, reason, recall } from "./api.js";
import { describe } from "./form.js";

const REMEMBERED = 30;
const LOOK_MS = 2000; // between looks at jobs that run while another is shown

const remembered = (model) => recall(model, "results") ?? [];
let open = () => {}; // shows a job by its id

/** Show what this session had before it was loaded again; what the server has forgotten is gone. openJob: shows a job. */
export async function restore(model, openJob) {
  open = openJob;
  const problems = [];
  for (const id of remembered(model).reverse()) {
    if (element(`result-${id}`)) continue; // the job in the address
    try {
      await look(id, model);
    } catch (error) {
      problems.push(reason(error));
    }
  }
  if (problems.length) {
    const which = problems.length === 1 ? "One earlier result" : `${problems.length} earlier results`;
    element("results-error").textContent = `${which} could not be fetched: ${problems[0]}. Reload this page to try again.`;
  }
  setInterval(() => lookAtRunning(model), LOOK_MS);
}

/** Show a job as it is now, or forget it. Raises what `ask` does, but where the server has forgotten it too. */
async function look(id, model) {
  try {
    const job = await getJson(`jobs/${id}`);
    const picture = job.state === "done" && (await (await ask(`jobs/${id}/image`)).blob());
    if (!remembered(model).includes(id)) return; // newer ones have taken its place meanwhile
    if (["failed", "cancelled"].includes(job.state)) dropJob(id, model);
    else place(job, model);
    if (picture) addPicture(job, picture);
  } catch (error) {
    if (!isGone(error)) throw error;
    dropJob(id, model);
  }
}

// Those that run while another is shown. What cannot be had now is looked at again.
function lookAtRunning(model) {
  if (document.hidden) return;
  for (const entry of element("gallery").children) {
    if (entry.querySelector("img, [aria-current]")) continue; // that one is followed
    look(entry.id.replace("result-", ""), model).catch(() => {});
  }
}

/** Remember a job, and mark it as the one that is shown. */
export function addJob(job, model) {
  const all = remembered(model);
  if (!all.includes(job.id)) keep(model, "results", [...all, job.id].slice(-REMEMBERED));
  place(job, model);
  markJob(job.id);
}

/** Show the images of a job in its place. */
export function addPicture({ id }, picture) {
  const button = element(`result-${id}`)?.firstElementChild;
  if (!button || button.querySelector("img")) return;
  button.replaceChildren(Object.assign(new Image(), { src: URL.createObjectURL(picture), alt: "" }));
}

/** Forget a job that has no image. */
export function dropJob(id, model) {
  keep(model, "results", remembered(model).filter((each) => each !== id));
  remove(element(`result-${id}`));
}

function remove(entry) {
  const image = entry?.querySelector("img");
  if (image) URL.revokeObjectURL(image.src);
  entry?.remove();
}

/** Mark the job that is shown; null for none. */
export function markJob(id) {
  for (const entry of element("gallery").children) {
    const button = entry.firstElementChild;
    if (entry.id === `result-${id}`) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

// The newest comes first, whenever it was had. What is no longer remembered goes, or the tab would grow without end.
function place(job, model) {
  if (element(`result-${job.id}`)) return;
  const entry = Object.assign(document.createElement("li"), { id: `result-${job.id}` });
  const what = describe(job.parameters);
  const button = Object.assign(document.createElement("button"), { type: "button", title: what, ariaLabel: what, textContent: "…" });
  button.addEventListener("click", () => open(job.id));
  entry.append(button);
  const ids = remembered(model), age = (each) => ids.indexOf(each.id.replace("result-", ""));
  const shown = [...element("gallery").children];
  shown.filter((other) => age(other) < 0).forEach(remove);
  element("gallery").insertBefore(entry, shown.find((other) => other.isConnected && age(other) < age(entry)) ?? null);
}
