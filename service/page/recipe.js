// How an image is made, as text: in the address of this page, as a call, and in the text chunk of a PNG that tminus has made,
// which can be made again here.

import { base, element, parse, post, reason, requestOf, shorten, toJson, toQuery } from "./api.js";
import { describe, fillFrom } from "./form.js";
import { signedIn } from "./key.js";

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const KEY = "tminus";
const MOST_BYTES = 2 ** 20; // of a text chunk
const MOST_FILE_BYTES = 2 ** 25; // of a file that is read
// What a link may hold; pictures are too long for one.
const NAMES = [
  "n", "steps", "sampler", "seed", "to_seed", "mix", "index", "eta", "class_label",
  "guidance", "guidance_interval", "guidance_rescale", "timestep_spacing", "clip",
];
// What a PNG's spec has by the same name; its labels are of another form, and eta is always in it.
const IN_PNGS = [...NAMES.filter((name) => !["class_label", "eta"].includes(name)), "table"];
const ONE_OR_LIST = "class_label", LIST = "guidance_interval", TEXTS = ["sampler", "seed", "to_seed", "timestep_spacing"];

/** The hash of an address that holds these parameters. */
export function toHash(parameters) {
  const kept = Object.entries(parameters).filter(([name, value]) => NAMES.includes(name) && ![undefined, null].includes(value));
  return `#${toQuery(Object.fromEntries(kept.map(([name, value]) => [name, [value].flat().map((each) => each ?? "")])))}`;
}

/** The parameters in the hash of an address, or null. */
export function fromHash(hash) {
  const query = new URLSearchParams(hash.slice(1));
  if (!NAMES.some((name) => query.has(name))) return null;
  const parameters = {};
  for (const name of NAMES.filter((each) => query.has(each))) {
    const values = query.getAll(name).map((text) => read(name, text));
    const isList = name === LIST || (name === ONE_OR_LIST && values.length > 1);
    parameters[name] = isList ? values : values[0];
  }
  parameters.n ??= 1;
  return parameters;
}

function read(name, text) {
  if (TEXTS.includes(name)) return text;
  if (["true", "false"].includes(text)) return text === "true";
  return text === "" ? null : Number(text);
}

/**
 * The parameters that a PNG's spec stands for; see `parameters_of` of the server. Whatever else a PNG says is not asked for,
 * nor is a picture that it was made from.
 */
function parametersOf(spec) {
  const { class_labels: labels, eta } = spec;
  const parameters = Object.fromEntries(IN_PNGS.map((name) => [name, spec[name] ?? null]));
  if (labels) parameters.class_label = new Set(labels).size === 1 ? labels[0] : labels;
  if (spec.sampler === "ddim") parameters.eta = eta ?? null;
  if (spec.table) delete parameters.timestep_spacing; // the table has the timesteps
  return Object.fromEntries(Object.entries(parameters).filter(([, value]) => value !== null));
}

/**
 * What a PNG of tminus says of itself, {spec, weights, fingerprint}; null for any other file.
 * @param {ArrayBuffer} buffer
 */
function recipeIn(buffer) {
  const bytes = new Uint8Array(buffer), view = new DataView(buffer);
  if (!SIGNATURE.every((byte, at) => bytes[at] === byte)) return null;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at), type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const text = type === "iTXt" && length <= MOST_BYTES && textOf(bytes.subarray(at + 8, at + 8 + length));
    if (text) return understand(text);
    at += 12 + length;
  }
  return null;
}

// Keyword, 0, not compressed (0), 0, language, 0, translated keyword, 0, text: of PNG, section 11.3.3.4.
function textOf(chunk) {
  const decode = (from, to) => new TextDecoder().decode(chunk.subarray(from, to));
  const end = chunk.indexOf(0);
  if (decode(0, end) !== KEY || chunk[end + 1] !== 0) return null;
  const language = chunk.indexOf(0, end + 3);
  return decode(chunk.indexOf(0, language + 1) + 1);
}

function understand(text) {
  try {
    const recipe = parse(text), spec = recipe?.spec;
    const isList = (value) => (value ?? null) === null || Array.isArray(value);
    return typeof spec?.sampler === "string" && isList(spec.class_labels) && isList(spec.guidance_interval) ? recipe : null;
  } catch {
    return null;
  }
}

// How the calls that are shown send a key, which is in the variable TMINUS_KEY.
const KEY_IN_CALLS = [
  ' -H "Authorization: Bearer $TMINUS_KEY"',
  ", headers={'Authorization': 'Bearer ' + os.environ['TMINUS_KEY']}",
  ["import os"],
];

/** The calls that make an image. */
export function callsOf(parameters, model) {
  const body = toJson(requestOf(shortest(parameters, model), model));
  const url = new URL("sample", base).href.replaceAll("'", "%27");
  const [keyOption, keyHeader, importOs] = signedIn ? KEY_IN_CALLS : ["", "", []];
  const json = `-H 'Content-Type: application/json' -d '${body.replaceAll("'", "'\\''")}'`;
  const curl = `curl --fail-with-body -sS${keyOption} '${url}' ${json} -o out.png`;
  const python = [
    ...importOs,
    "import pathlib",
    "import httpx",
    "",
    `spec = ${body.replaceAll("true", "True").replaceAll("false", "False").replaceAll("null", "None")}`,
    `response = httpx.post("${url}", json=spec, timeout=None${keyHeader})`,
    'pathlib.Path("out.png").write_bytes(response.raise_for_status().content)',
  ].join("\n");
  return { curl, python };
}

/** The parameters without those that the server would fill in alike. */
export function shortest(parameters, model) {
  const spec = { ...parameters };
  const labels = [spec.class_label].flat();
  if (new Set(labels).size === 1) spec.class_label = labels[0] ?? undefined;
  if (spec.index === 0) delete spec.index;
  if (spec.guidance === 1) delete spec.guidance;
  if (spec.clip === model.clip) delete spec.clip;
  if (spec.eta === 0) delete spec.eta;
  delete spec.table; // the steps and the guidance name it
  if (spec.timestep_spacing === model.timestep_spacings[spec.sampler]) delete spec.timestep_spacing;
  return spec;
}

// --- a PNG that somebody has given the page: what it says of itself, and whether this server makes the same ---

let newest = null; // the file that was given last
let given = null; // what was read of it, {bytes, parameters, recipe}; null where it has no recipe

/** Look at a file; if it is a PNG of tminus, fill in the form and offer to make it again. Returns whether it is. */
export async function offer(file, model) {
  newest = file;
  given = null;
  const bytes = file.size <= MOST_FILE_BYTES ? await file.arrayBuffer() : new ArrayBuffer(0);
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
    `${file.name} contains its settings: ${shorten(describe(parameters))}. It was made by ${weights} and ${build}. ` +
    (unknown
      ? `This model has no sampler ${shorten(parameters.sampler)}.`
      : edited
        ? "It was made from a picture that is not in the file, so it cannot be made again here."
        : "The form now has these settings.");
  element("again").ariaDisabled = String(edited || unknown);
  element("recipe-answer").textContent = "";
  return true;
}

async function again() {
  const mine = given, { bytes, parameters, recipe, model } = mine;
  const say = (text) => mine === given && (element("recipe-answer").textContent = text);
  say("Making it…");
  try {
    const response = await post("sample", requestOf(parameters, model), "image/png");
    const made = new Uint8Array(await response.arrayBuffer());
    const same = response.headers.get("X-Fingerprint") === recipe.fingerprint;
    const build = `The build is ${same ? "the same" : "different"}.`;
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
  return most ? `Not the same: pixels differ by up to ${most} of 255.` : "The same pixels, but the bytes of the file differ.";
}

element("again").addEventListener("click", () => {
  if (given && element("again").ariaDisabled !== "true") again();
});
