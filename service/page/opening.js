// What the page shows before anybody has asked for anything: one small sample, the same one for everybody, so that a server
// has it ready after the first time. It is asked for with a deadline, which a busy server refuses at once and without work.

import { element, Refusal } from "./api.js";
import { clearFrames, showPath } from "./frames.js";
import { askPath } from "./path.js";

const SEED = "7", CLASS = 7, DEADLINE_S = 3;

let asking = null;

/** The sample that a page without a recipe opens with. */
export function usualOpening(model) {
  const sampler = model.recommended?.sampler ?? model.default_sampler;
  const steps = model.recommended?.steps ?? model.sampler_details[sampler].good_steps;
  const parameters = { n: 1, steps, sampler, seed: SEED };
  if (model.conditional) parameters.class_label = Math.min(CLASS, model.class_names.length - 1);
  if (model.conditional && model.recommended?.guidance) parameters.guidance = model.recommended.guidance;
  if (model.tables.some((table) => table.sampler === sampler)) parameters.nearest = true;
  return parameters;
}

const state = (name) => (document.body.dataset.opening = name);

/**
 * Show the way of a sample, if the server has time for it. Tells by the page's caption what is shown, or why nothing is.
 * describe: parameters in words. Returns whether it is shown.
 */
export async function open(parameters, model, describe) {
  leaveOpening();
  const mine = (asking = new AbortController());
  state("asked");
  element("caption").textContent = "A first sample is on its way.";
  try {
    const { frames } = await askPath({ ...parameters, deadline_s: DEADLINE_S }, model, mine.signal);
    if (mine !== asking) return false;
    showPath(frames);
    element("caption").textContent = `A sample of this model: ${describe(parameters)}.`;
    state("shown");
    return true;
  } catch (error) {
    if (mine !== asking) return false;
    clearFrames();
    element("caption").textContent = whyNot(error);
    state("absent");
    return false;
  }
}

/** A job of the user's takes its place. */
export function leaveOpening() {
  asking?.abort();
  asking = null;
  element("caption").textContent = "What you ask for, as it is made.";
  state("left");
}

function whyNot(error) {
  if (!(error instanceof Refusal)) return "The server gave no answer to a first sample.";
  if (error.status === 422 && error.field !== "deadline_s") return `A sample as in the link cannot be had: ${error.message}.`;
  if (error.code === "quota_exceeded") return `This key has nothing left for a first sample: ${error.message}.`;
  return "The server has no time for a first sample just now. You can still ask for yours.";
}
