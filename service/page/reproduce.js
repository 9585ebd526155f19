// A PNG of tminus that somebody has given the page: what it says of itself, and whether this server makes the same.

import { ask, element, reason, shorten, toJson } from "./api.js";
import { describe, fillFrom } from "./form.js";
import { parametersOf, recipeIn } from "./recipe.js";

let given = null; // {bytes, parameters, recipe}

/** Look at a file; if it is a PNG of tminus, fill in the form and offer to make it again. Returns whether it is. */
export async function offer(file, model) {
  const bytes = await file.arrayBuffer();
  const recipe = recipeIn(bytes);
  const fits = recipe !== null && (recipe.spec.class_labels ?? []).length <= model.limits.max_n;
  element("recipe").hidden = !fits;
  if (!fits) return false;
  const parameters = parametersOf(recipe.spec);
  given = { bytes: new Uint8Array(bytes), parameters, recipe };
  fillFrom(parameters);
  const weights = recipe.weights === model.weights_hash ? "this model" : "another model, or other weights";
  const build = recipe.fingerprint === model.fingerprint ? "this build" : "another build, so a few bits may differ";
  const edited = "image_sha256" in parameters, unknown = !model.samplers.includes(parameters.sampler);
  element("recipe-text").textContent =
    `${file.name} says how it was made: ${shorten(describe(parameters))}. It is of ${weights}, and ${build}. ` +
    (unknown
      ? `This model has no sampler ${shorten(parameters.sampler)}.`
      : edited
        ? "It was made from a picture, which is not in it, so it cannot be made again here."
        : "The form has its settings now.");
  element("again").ariaDisabled = String(edited || unknown);
  element("recipe-answer").textContent = "";
  return true;
}

async function again() {
  const { bytes, parameters, recipe } = given;
  const say = (text) => (element("recipe-answer").textContent = text);
  say("Making it…");
  try {
    const headers = { Accept: "image/png", "Content-Type": "application/json" };
    const response = await ask("sample", { method: "POST", headers, body: toJson(parameters) });
    const made = new Uint8Array(await response.arrayBuffer());
    const same = response.headers.get("X-Fingerprint") === recipe.fingerprint;
    const build = `The build is ${same ? "the same" : "another"}.`;
    if (made.length === bytes.length && made.every((byte, at) => byte === bytes[at])) say(`The same, byte for byte. ${build}`);
    else say(`${await differences(bytes, made)} ${build}`);
  } catch (error) {
    say(`It cannot be made: ${reason(error)}.`);
  }
}

async function pixels(bytes) {
  const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

async function differences(before, after) {
  const [one, other] = await Promise.all([before, after].map(pixels));
  if (one.width !== other.width || one.height !== other.height) return "Not the same: the sizes differ.";
  let most = 0;
  one.data.forEach((value, at) => (most = Math.max(most, Math.abs(value - other.data[at]))));
  return most ? `Not the same: pixels differ by up to ${most} of 255.` : "The same pixels, in a file of other bytes.";
}

element("again").addEventListener("click", () => {
  if (element("again").ariaDisabled !== "true") again();
});
