// What is shown large: a tile for each image of a sheet, any of which can be chosen to see it alone. Beside it, on the way,
// the network's guess; at the end, what can be done next with what was made.

import { copyLink, element, reason, toBase64 } from "./api.js";
import { describe, numberOfImages } from "./form.js";
import { callsOf, shortest, toHash } from "./recipe.js";

export const SHOWS = ["x_t", "x_0"]; // what is shown of each step: with noise, and the network's guess
const SMOOTH_PX = 128; // from this size on, pixels are not to be seen
const STRENGTH = 0.6; // of a variation

let model = null, page = null;
let count = 0; // tiles
let chosen = null; // the number of the image that is seen alone; null for all
let made = null; // see `finish`
let atEnd = false; // whether the last frame is shown
let alone = null; // the PNG of the chosen image: its URL

const tilesOf = (show) => [...element(show).children];
const imagesOf = (show) => [...element(show).querySelectorAll("img")];

/** @param {{run: (body: object) => void, edit: (picture: Blob) => void}} given what the actions beside the image lead to */
export function setUpStage(loaded, given) {
  model = loaded;
  page = given;
  document.body.classList.toggle("smooth", model.width_px >= SMOOTH_PX);
  document.body.classList.toggle("alpha", model.alpha);
  document.body.style.setProperty("--aspect", model.width_px / model.height_px);
}

/** Lay out tiles for so many images, with nothing in them. */
export function lay(n) {
  count = n;
  forget();
  for (const show of SHOWS) {
    element(show).replaceChildren(...Array.from({ length: n }, (_, number) => makeTile(show, number)));
  }
  choose(n === 1 ? 0 : null);
}

function makeTile(show, number) {
  const button = show === "x_t" && count > 1;
  const tile = Object.assign(document.createElement(button ? "button" : "div"), { className: "tile" });
  const image = Object.assign(new Image(), { alt: "", draggable: false });
  image.addEventListener("load", () => crop(image, number));
  const frame = Object.assign(document.createElement("span"), { className: "crop" });
  frame.append(image);
  tile.append(frame);
  if (button) {
    Object.assign(tile, { type: "button", ariaLabel: `Image ${number + 1} of ${count}` });
    tile.addEventListener("click", () => choose(chosen === null ? number : null));
  }
  return tile;
}

// The server has laid a sheet out.
const columnsOf = (width) => Math.max(1, Math.round(width / model.width_px));

// Of a sheet a tile shows its own image.
function crop(image, number) {
  const columns = columnsOf(image.naturalWidth);
  const rows = Math.max(1, Math.round(image.naturalHeight / model.height_px));
  const [across, down] = [number % columns, Math.floor(number / columns)];
  image.style.width = `${100 * columns}%`;
  image.style.height = `${100 * rows}%`;
  image.style.translate = `${(-100 * across) / columns}% ${(-100 * down) / rows}%`;
}

function choose(number) {
  chosen = number;
  const seen = chosen === null ? count : 1;
  const size = (columns) => Math.min(1 / columns, 1 / Math.ceil(seen / columns));
  const columns = Array.from({ length: seen }, (_, k) => k + 1).reduce((best, k) => (size(k) > size(best) ? k : best), 1);
  for (const show of SHOWS) {
    element(show).style.setProperty("--columns", columns);
    element(show).style.setProperty("--rows", Math.ceil(seen / columns));
    tilesOf(show).forEach((tile, k) => {
      tile.hidden = chosen !== null && k !== chosen;
      if (tile.type !== "button") return;
      tile.ariaPressed = String(k === chosen);
      tile.tabIndex = k === (chosen ?? 0) ? 0 : -1;
    });
  }
  element("all").hidden = chosen === null || count === 1;
  element("all").textContent = `All ${count}`;
  forgetAlone();
  element("made-error").textContent = "";
  tell();
}

/** Show the pictures of a frame; null for none. A picture that a frame lacks stays as it was. */
export function showPictures(frame) {
  for (const show of SHOWS) {
    const url = frame?.[show]?.url;
    for (const image of imagesOf(show)) {
      if (!frame || (!url && frame.step === 0)) image.removeAttribute("src");
      else if (url && image.src !== url) image.src = url;
      image.alt = "";
    }
    const [first] = imagesOf(show); // it speaks for all of them
    if (first && frame) first.alt = `${show} after step ${frame.step} of ${frame.steps}`;
  }
  atEnd = Boolean(frame) && frame.step === frame.steps;
  showBeside();
}

/**
 * Say what was made.
 * @param {{parameters: object, picture: Blob, image: (number: number, parameters: object) => Promise<Blob>, zip?: () => Promise<Blob>}} result
 *   picture: the PNG of all images; image: asks for the PNG of one, which these parameters make; zip: for all of them in a file
 */
export function finish(result) {
  forget();
  made = { ...result, url: URL.createObjectURL(result.picture) };
  element("made-error").textContent = "";
  tell();
  showBeside();
}

function forget() {
  if (made) URL.revokeObjectURL(made.url);
  made = null;
  forgetAlone();
}

function forgetAlone() {
  if (alone) URL.revokeObjectURL(alone);
  alone = null;
}

/** What is shown: all images, or the chosen one, as parameters that make it. */
function shownParameters() {
  const { parameters } = made;
  if (chosen === null) return parameters;
  const labels = [parameters.class_label ?? null].flat();
  const label = labels[chosen] ?? labels[0];
  const { class_label: _, ...rest } = parameters;
  return { ...rest, n: 1, index: (parameters.index ?? 0) + chosen, ...(label !== null && { class_label: label }) };
}

// On the way the guess, at the end what was made.
function showBeside() {
  const done = atEnd && made !== null;
  if (!done && element("made").contains(document.activeElement)) element("play").focus();
  element("guess").hidden = done;
  element("made").hidden = !done;
  element("on-the-way").hidden = atEnd;
  element("at-the-end").hidden = !atEnd;
}

// What was made, in words, and what it leads to.
function tell() {
  if (!made) return;
  const one = chosen !== null, parameters = shownParameters(), edited = parameters.image_sha256 !== undefined;
  const size = one ? `, ${model.width_px} × ${model.height_px}` : " of all";
  element("caption").textContent = `${describe(parameters)}${edited ? ", from a picture" : ""}.`;
  element("made-name").textContent = !one ? `${count} images` : count === 1 ? "One image" : `Image ${chosen + 1} of ${count}`;
  element("made-hint").textContent = !one ? "Choose one to see it large." : edited ? "There is no link and no code, since both would need your picture." : "";
  element("png").textContent = `PNG${size}`;
  element("vary").hidden = !one;
  element("edit-this").hidden = !one || model.channels !== model.shown_channels; // it is sent as a picture
  for (const id of ["another", "share", "code"]) element(id).hidden = edited;
  element("zip").hidden = one || !made.zip;
  linkPng(one && count > 1, parameters);
  const { curl, python } = callsOf(parameters, model);
  element("curl").textContent = curl;
  element("python").textContent = python;
}

function linkPng(single, { seed }) {
  const link = element("png"), url = single ? alone : made.url;
  link.download = single ? `tminus-${seed}-${chosen + 1}.png` : `tminus-${seed}.png`;
  if (url) link.href = url;
  else {
    link.removeAttribute("href");
    askForAlone(made, chosen);
  }
}

async function askForAlone(result, number) {
  try {
    const image = await result.image(number, shownParameters());
    if (made !== result || chosen !== number || alone) return;
    alone = URL.createObjectURL(image);
    element("png").href = alone;
  } catch (error) {
    if (made === result && chosen === number) element("made-error").textContent = `The PNG of this image could not be fetched: ${reason(error)}.`;
  }
}

/** The pixels of the chosen image, or of the first of several, as it became; null where there is none. */
export async function shownPicture() {
  const shown = imagesOf("x_t")[0]?.src, number = chosen ?? 0;
  if (!made && !shown) return null;
  const sheet = await createImageBitmap(made ? made.picture : await (await fetch(shown)).blob());
  const { width_px: width, height_px: height } = model, columns = columnsOf(sheet.width);
  const drawn = Object.assign(document.createElement("canvas"), { width, height });
  drawn.getContext("2d").drawImage(sheet, -(number % columns) * width, -Math.floor(number / columns) * height);
  return new Promise((resolve) => drawn.toBlob(resolve, "image/png"));
}

// Parameters but for those of these names.
function without(parameters, ...names) {
  return Object.fromEntries(Object.entries(parameters).filter(([name]) => !names.includes(name)));
}

function run(body) {
  if (element("another").ariaDisabled === "true") return;
  element("cancel").focus(); // or the focus would go with what is pressed
  page.run(body);
}

function showAll() {
  const number = chosen;
  if (number === null || count === 1) return;
  choose(null);
  tilesOf("x_t")[number].focus();
}

// The tiles are one stop of Tab; the arrow keys go on among them.
element("x_t").addEventListener("keydown", (event) => {
  const tiles = tilesOf("x_t"), from = tiles.indexOf(document.activeElement);
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1, Home: -count, End: count }[event.key];
  if (!by || from < 0 || chosen !== null) return;
  event.preventDefault();
  const to = Math.max(0, Math.min(count - 1, from + by));
  tiles.forEach((tile, number) => (tile.tabIndex = number === to ? 0 : -1));
  tiles[to].focus();
});
element("all").addEventListener("click", showAll);
document.querySelector(".first").addEventListener("keydown", (event) => event.key === "Escape" && showAll());
element("share").addEventListener("click", ({ target }) => copyLink(target, toHash(shortest(shownParameters(), model))));
element("another").addEventListener("click", () => run(without(shownParameters(), "seed", "index")));
element("vary").addEventListener("click", async () => {
  const like = without(shownParameters(), "seed", "index", "to_seed", "mix", "image_sha256", "mask_sha256");
  const n = numberOfImages(), picture = await shownPicture();
  run({ ...like, n, strength: STRENGTH, image: await toBase64(picture) });
});
element("edit-this").addEventListener("click", async () => page.edit(await shownPicture()));
element("zip").addEventListener("click", async ({ target }) => {
  if (target.ariaDisabled === "true") return;
  target.ariaDisabled = "true";
  element("made-error").textContent = "";
  const result = made;
  try {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await result.zip());
    link.download = `tminus-${result.parameters.seed}.zip`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    element("made-error").textContent = `The zip could not be fetched: ${reason(error)}.`;
  }
  target.ariaDisabled = "false";
});
