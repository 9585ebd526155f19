// The results of this session, as a strip that stays in view. The session remembers their jobs.

import { ask, element, getJson, isGone, keep, reason, recall } from "./api.js";
import { describe } from "./form.js";

const REMEMBERED = 30;

const remembered = (model) => recall(model, "results") ?? [];
let open = () => {}; // shows a job by its id

// Show what this session had before it was loaded again, the newest first; what the server has forgotten is gone.
export async function restore(model, openJob) {
  open = openJob;
  const problems = [];
  for (const id of remembered(model).reverse()) {
    if (element(`result-${id}`)) continue; // the job in the address
    try {
      const job = await getJson(`jobs/${id}`);
      const images = await (await ask(`jobs/${id}/image`)).blob();
      if (remembered(model).includes(id)) show(job, images, model); // else newer ones have taken its place meanwhile
    } catch (error) {
      if (isGone(error)) keep(model, "results", remembered(model).filter((each) => each !== id));
      else problems.push(reason(error));
    }
  }
  if (problems.length) {
    const which = problems.length === 1 ? "One earlier result" : `${problems.length} earlier results`;
    element("results-error").textContent = `${which} could not be had: ${problems[0]}. Load this page again to try again.`;
    element("results").hidden = false;
  }
}

/** Remember a job, and show it. */
export function addResult(job, images, model) {
  const all = remembered(model);
  if (!all.includes(job.id)) keep(model, "results", [...all, job.id].slice(-REMEMBERED));
  show(job, images, model);
}

function show(job, images, model) {
  if (element(`result-${job.id}`)) return;
  const url = URL.createObjectURL(images), what = describe(job.parameters);
  const entry = Object.assign(document.createElement("li"), { id: `result-${job.id}` });
  const button = Object.assign(document.createElement("button"), { type: "button", title: what });
  button.append(Object.assign(new Image(), { src: url, alt: what }));
  button.addEventListener("click", () => open(job.id));
  entry.append(button);
  element("results").hidden = false;
  place(entry, remembered(model));
}

/** Mark the job that is shown; null for none. */
export function markResult(id) {
  for (const entry of element("gallery").children) {
    const button = entry.firstElementChild;
    if (entry.id === `result-${id}`) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

// The newest result comes first, whenever it was had. What is no longer remembered goes, or the tab would grow without end.
function place(entry, ids) {
  const age = (each) => ids.indexOf(each.id.replace("result-", ""));
  const shown = [...element("gallery").children];
  for (const each of shown.filter((other) => age(other) < 0)) {
    URL.revokeObjectURL(each.querySelector("img").src);
    each.remove();
  }
  element("gallery").insertBefore(entry, shown.find((other) => other.isConnected && age(other) < age(entry)) ?? null);
}
