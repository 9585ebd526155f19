// A PNG of tminus that somebody has given the page: what it says of itself, and whether this server makes the same.

import { ask, element, reason, requestOf, shorten, toJson } from "./api.js";
import { describe, fillFrom } from "./form.js";
import { parametersOf, recipeIn } from "./recipe.js";

const MOST_BYTES = 2 ** 25; // of a file that is read

let newest = null; // the file that was given last
let given = null; // what was read of it, {bytes, parameters, recipe}; null where it has no recipe

/** Look at a file; if it is a PNG of tminus, fill in the form and offer to make it again. Returns whether it is. */
export async function offer(file, model) {
  newest = file;
  given = null;
  const bytes = file.size <= MOST_BYTES ? await file.arrayBuffer() : new ArrayBuffer(0);
  if (file !== newest) return false;
  const recipe = recipeIn(bytes);
  const fits = recipe !== null && (recipe.spec.class_labels ?? []).length <= model.limits.max_n;
  element("recipe").hidden = !fits;
  if (!fits) return false;
  const parameters = parametersOf(recipe.spec);
  given = { bytes: new Uint8Array(bytes), parameters, recipe, model };
  fillFrom(parameters);
  const weights = recipe.weights === model.weights_hash ? "this model" : "another model, or other weights";
  const build = recipe.fingerprint === model.fingerprint ? "this build" : "another build, so a few bits may differ";
  const edited = (recipe.spec.image_sha256 ?? null) !== null, unknown = !model.samplers.includes(parameters.sampler);
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
  const mine = given, { bytes, parameters, recipe, model } = mine;
  const say = (text) => mine === given && (element("recipe-answer").textContent = text);
  say("Making it…");
  try {
    const headers = { Accept: "image/png", "Content-Type": "application/json" };
    const response = await ask("sample", { method: "POST", headers, body: toJson(requestOf(parameters, model)) });
    const made = new Uint8Array(await response.arrayBuffer());
    const same = response.headers.get("X-Fingerprint") === recipe.fingerprint;
    const build = `The build is ${same ? "the same" : "another"}.`;
    if (made.length === bytes.length && made.every((byte, at) => byte === bytes[at])) say(`The same, byte for byte. ${build}`);
    else say(`${await differences(bytes, made)} ${build}`);
  } catch (error) {
    say(`It cannot be made: ${reason(error)}.`);
  }
}

// Width and height, of the first chunk of a PNG.
function sizeIn(bytes) {
  const view = new DataView(bytes.buffer);
  return [view.getUint32(16), view.getUint32(20)];
}

async function pixels(bytes) {
  const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

async function differences(before, after) {
  // Before it is decoded: a file may claim any size; what the server makes is bounded.
  if (String(sizeIn(before)) !== String(sizeIn(after))) return "Not the same: the sizes differ.";
  const [one, other] = await Promise.all([before, after].map(pixels));
  let most = 0;
  one.data.forEach((value, at) => (most = Math.max(most, Math.abs(value - other.data[at]))));
  return most ? `Not the same: pixels differ by up to ${most} of 255.` : "The same pixels, in a file of other bytes.";
}

element("again").addEventListener("click", () => {
  if (given && element("again").ariaDisabled !== "true") again();
});
