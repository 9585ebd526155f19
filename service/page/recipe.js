// How an image is made, as text: in the address of this page, and in the text chunk of a PNG that tminus has made.

import { parse } from "./api.js";
import { toQuery } from "./path.js";

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const KEY = "tminus";
const MOST_BYTES = 2 ** 20; // of a text chunk
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
  if (!query.has("sampler") || !query.has("steps")) return null;
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
export function parametersOf(spec) {
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
export function recipeIn(buffer) {
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
