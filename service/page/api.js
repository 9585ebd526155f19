// What the page asks the server, how it says that something went wrong, and what it keeps and copies.

import { signIn } from "./key.js";

const LONGEST_WORD = 70; // that is shown whole: a hash is
const TOLD_MS = 2000;

export const base = new URL(".", document.baseURI);
// The page of a model is at models/NAME/ below the server's root; that at the root is the default model's.
const [, rootPath, name] = /^(.*\/)models\/([^/]+)\/$/.exec(base.pathname) ?? [null, base.pathname];
export const root = new URL(rootPath, base);
export const nameInAddress = name;
export const element = (id) => document.getElementById(id);

// A seed has 64 bits, of which JavaScript's numbers keep 53: seeds are strings here.
export function parse(text) {
  return JSON.parse(text.replace(/("(?:to_)?seed":\s*)(\d+)/g, '$1"$2"'));
}

export function toJson(spec) {
  return JSON.stringify(spec).replace(/("(?:to_)?seed":)"(\d+)"/g, "$1$2");
}

/** The parameters as a query; a list repeats its name. */
export function toQuery(parameters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const each of [value].flat()) query.append(name, each);
  }
  return query;
}

/**
 * Parameters as the server takes them. The page has classes by number; where a class has a number for a name, each gets
 * `number:` before it.
 */
export function requestOf(parameters, { class_names: names }) {
  if (parameters.class_label === undefined || !names.some((name) => /^\d+$/.test(name))) return parameters;
  const labels = [parameters.class_label].flat().map((number) => (number === null ? null : `number:${number}`));
  return { ...parameters, class_label: labels.length > 1 ? labels : labels[0] };
}

/** A seed as JSON has it: 007 is no number there. */
export const plainSeed = (text) => text.replace(/^0+(?=\d)/, "");

/** The bytes that base64 stands for, as an image. */
export const toBlob = (data, type = "image/png") =>
  new Blob([Uint8Array.from(atob(data), (character) => character.charCodeAt(0))], { type });

export async function toBase64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  return btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""));
}

// What a problem says has the value that was refused in it, which may be long: only that is cut.
export const shorten = (text) =>
  text.replace(/\S+/g, (word) => (word.length > LONGEST_WORD ? `${word.slice(0, LONGEST_WORD)}…` : word));

export class Refusal extends Error {
  constructor(status, problem) {
    const all = problem.errors?.map((each) => each.detail) ?? [problem.detail ?? `the server answered ${status}`];
    super(shorten(all.join("; ")));
    this.status = status;
    this.code = problem.code;
    this.field = problem.field;
  }
}

// Whether there is no use in asking again.
export const isGone = (error) => error instanceof Refusal && [404, 410].includes(error.status);

// fetch, and a body that breaks off, raise TypeError, with words that differ from browser to browser.
export const reason = (error) => (error instanceof TypeError ? "there is no connection" : error.message);

// Raises Refusal for what the server says no to, and TypeError where there is no server. A server that wants a key gets
// one from the user first.
export async function ask(path, options) {
  let response = await fetch(new URL(path, base), options);
  while (response.status === 401) {
    await signIn(new URL("login", root));
    response = await fetch(new URL(path, base), options);
  }
  return accepted(response);
}

/** Like `ask`, for what nobody has asked for: without a key it is refused, and no dialog opens. */
export const askQuietly = async (path, options) => accepted(await fetch(new URL(path, base), options));

async function accepted(response) {
  if (!response.ok) throw new Refusal(response.status, await response.json().catch(() => ({})));
  return response;
}

export async function getJson(path) {
  return parse(await (await ask(path)).text());
}

/** Ask for something by JSON parameters. accept: the media type of the answer. */
export function post(path, parameters, accept, signal) {
  const headers = { Accept: accept, "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: toJson(parameters), signal });
}

export function seconds(value) {
  return value < 90 ? `${value.toFixed(value < 10 ? 1 : 0)} s` : `${Math.round(value / 60)} min`;
}

// This tab keeps some things of each model until it is closed. Other weights under the same name are another model.
const key = ({ name, weights_hash: weights }, what) => `tminus ${root.pathname} ${name} ${weights} ${what}`;

export const recall = (model, what) => JSON.parse(sessionStorage.getItem(key(model, what)));
export const keep = (model, what, value) => sessionStorage.setItem(key(model, what), JSON.stringify(value));

/** Copy the address of this page with another hash; a page that is not secure has no clipboard, and shows it instead. */
export async function copyLink(button, hash) {
  const address = new URL(hash, location.href).href;
  const text = (button.dataset.text ??= button.textContent);
  try {
    await navigator.clipboard.writeText(address);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = text), TOLD_MS);
  } catch {
    prompt("The link:", address);
  }
}
