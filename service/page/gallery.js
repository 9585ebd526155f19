// The results of this session, each with the calls that make it again. The session remembers their jobs.

import { ask, base, element, getJson, isGone, reason, requestOf, toJson } from "./api.js";
import { signedIn } from "./key.js";
import { describe } from "./form.js";
import { keep, recall } from "./kept.js";
import { copyLink } from "./link.js";
import { toHash } from "./recipe.js";

const REMEMBERED = 30;
// How the calls that are shown send a key, which is in the variable TMINUS_KEY.
const KEY_IN_CALLS = [
  ' -H "Authorization: Bearer $TMINUS_KEY"',
  ", headers={'Authorization': 'Bearer ' + os.environ['TMINUS_KEY']}",
  ["import os"],
];

const remembered = (model) => recall(model, "results") ?? [];

// Show what this session had before it was loaded again, the newest first; what the server has forgotten is gone.
export async function restore(model) {
  const problems = [];
  for (const id of remembered(model).reverse()) {
    if (element(`result-${id}`)) continue; // the job in the address
    try {
      const job = await getJson(`jobs/${id}`);
      const images = await (await ask(`jobs/${id}/image`)).blob();
      if (remembered(model).includes(id)) show(job, images, model); // else newer ones have taken its place meanwhile
    } catch (error) {
      if (isGone(error)) forget(id, model);
      else problems.push(reason(error));
    }
  }
  if (problems.length) {
    const which = problems.length === 1 ? "One earlier result" : `${problems.length} earlier results`;
    element("results-error").textContent = `${which} could not be had: ${problems[0]}. Load this page again to try again.`;
  }
}

export function addResult(job, images, model) {
  const all = remembered(model);
  if (!all.includes(job.id)) keep(model, "results", [...all, job.id].slice(-REMEMBERED));
  show(job, images, model);
}

function show(job, images, model) {
  if (element(`result-${job.id}`)) return;
  const picture = URL.createObjectURL(images);
  const spec = shortest(job.parameters, model);
  const body = toJson(requestOf(spec, model));
  const url = new URL("sample", base).href.replaceAll("'", "%27");
  const entry = element("result").content.firstElementChild.cloneNode(true);
  entry.id = `result-${job.id}`;
  const part = (selector) => entry.querySelector(selector);
  part("img").src = picture;
  part("img").alt = "The images";
  const edited = spec.image_sha256 !== undefined;
  part(".what").textContent = `${describe(spec)}${edited ? ", from a picture" : ""}`;
  for (const calls of entry.querySelectorAll("details, .share")) calls.hidden = edited; // they would need the picture
  part(".share").addEventListener("click", ({ target }) => copyLink(target, toHash(spec)));
  part(".png").href = picture;
  part(".png").download = `tminus-${spec.seed}.png`;
  part(".zip").addEventListener("click", (event) => downloadZip(job.id, spec.seed, event.target, part(".complaint")));
  const [keyOption, keyHeader, importOs] = signedIn ? KEY_IN_CALLS : ["", "", []];
  part(".curl").textContent =
    `curl --fail-with-body -sS${keyOption} '${url}' -d '${body.replaceAll("'", "'\\''")}' -o out.png`;
  part(".python").textContent = [
    ...importOs,
    "import pathlib",
    "import httpx",
    "",
    `spec = ${body.replaceAll("true", "True").replaceAll("false", "False").replaceAll("null", "None")}`,
    `response = httpx.post("${url}", json=spec, timeout=None${keyHeader})`,
    'pathlib.Path("out.png").write_bytes(response.raise_for_status().content)',
  ].join("\n");
  element("no-results").hidden = true;
  place(entry, remembered(model));
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

function forget(id, model) {
  keep(model, "results", remembered(model).filter((each) => each !== id));
}

// The parameters without those that the server would fill in alike.
function shortest(parameters, model) {
  const spec = { ...parameters };
  const labels = spec.class_label;
  if (labels && new Set(labels).size === 1) spec.class_label = labels[0] ?? undefined;
  if (spec.index === 0) delete spec.index;
  if (spec.guidance === 1) delete spec.guidance;
  if (spec.clip === model.clip) delete spec.clip;
  if (spec.eta === 0) delete spec.eta;
  delete spec.table; // the steps and the guidance name it
  if (spec.timestep_spacing === model.timestep_spacings[spec.sampler]) delete spec.timestep_spacing;
  return spec;
}

async function downloadZip(id, seed, button, complaint) {
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true";
  complaint.textContent = "";
  try {
    const response = await ask(`jobs/${id}/image`, { headers: { Accept: "application/zip" } });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = `tminus-${seed}.zip`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    complaint.textContent = `The zip could not be had: ${reason(error)}`;
  }
  button.ariaDisabled = "false";
}
