// A picture of one's own, at the model's size, and the mask over it: a file as it came, or what has been drawn. Forward it is
// shown with noise at any t, backward it is denoised.

import { ask, element, reason, toBase64 } from "./api.js";
import { onTime, setTime } from "./film.js";
import { parameters } from "./form.js";
import { offer } from "./recipe.js";
import { shownPicture } from "./stage.js";

const canvas = element("canvas"), board = canvas.getContext("2d");
const RED = [226, 61, 61, 255], COVER = 0.55; // how the mask is shown
const LUMA = [0.299, 0.587, 0.114]; // ITU-R 601, as the server makes images grey
const MOST_BYTES = 2 ** 20; // of a file that is sent as it came; the session keeps what is being asked for
const PRESETS = {
  none: () => false,
  top: (_, y, __, height) => y < height / 2,
  bottom: (_, y, __, height) => y >= height / 2,
  left: (x, _, width) => x < width / 2,
  right: (x, _, width) => x >= width / 2,
};
const RECTANGLE = ["rect-x", "rect-y", "rect-w", "rect-h"].map(element);
const PAUSE_MS = 150; // that t stands still before the server is asked, where others move it

let model = null, layer = null; // the picture without the mask, a 2d context
let mask = null; // Uint8Array, 1 where the image is made new
let file = null; // as it came, until somebody draws on it
let present = false;
// A picture has one, three or four channels, which need not be all of an image's.
const takesPictures = () => model.channels === model.shown_channels;
const hasPicture = () => present;
const hasMask = () => mask.includes(1);
const sizeOf = () => [canvas.width, canvas.height];

/** @param {{run: (body: object) => void, opened: Promise<boolean>}} page opened: whether a first sample is shown */
export function setUp(loaded, { run, opened }) {
  model = loaded;
  element("noise").hidden = !takesPictures();
  setUpPicture();
  setUpNoise();
  setUpEdit(run, opened);
}

/** Take a picture to edit it, and go there. */
export function edit(picture) {
  takePicture(picture);
  element("noise-name").textContent = "The image above. Paint over what should change.";
  element("brush").value = "mask";
  element("noise").scrollIntoView({ block: "start" });
  element("brush").focus({ preventScroll: true });
}

// --- the picture and the mask ---

function setUpPicture() {
  Object.assign(canvas, { width: model.width_px, height: model.height_px });
  layer = blankLayer();
  mask = new Uint8Array(canvas.width * canvas.height);
  draw();
}

function blankLayer() {
  const made = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const context = made.getContext("2d", { willReadFrequently: true });
  if (!model.alpha) context.fillRect(0, 0, canvas.width, canvas.height); // black, which is what transparent pixels become
  return context;
}

/** Take a file. Where the browser cannot show it, the server will say what is wrong with it. */
async function takeFile(given) {
  if (!takesPictures()) return;
  file = given;
  present = true;
  element("noise-name").textContent = given.name;
  layer = blankLayer();
  const image = await createImageBitmap(given).catch(() => null);
  if (given !== file) return;
  if (image) {
    const scale = Math.max(canvas.width / image.width, canvas.height / image.height); // cropped about its centre
    const [width, height] = [image.width * scale, image.height * scale];
    layer.imageSmoothingQuality = "high";
    layer.drawImage(image, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
    if (model.channels === 1) makeGrey();
  }
  draw();
  showNoise();
}

function makeGrey() {
  const pixels = layer.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const grey = LUMA.reduce((sum, share, channel) => sum + share * pixels.data[at + channel], 0);
    pixels.data.fill(Math.round(grey), at, at + 3);
  }
  layer.putImageData(pixels, 0, 0);
}

function clearPicture() {
  file = null;
  present = false;
  layer = blankLayer();
  element("noise-name").textContent = "Nothing is drawn yet.";
  setMask(() => false);
  showNoise();
}

/** Paint a square of the picture. colour: #rrggbb. */
function paint(x, y, size, colour) {
  const channels = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const grey = Math.round(LUMA.reduce((sum, share, channel) => sum + share * channels[channel], 0));
  layer.fillStyle = model.channels === 1 ? `rgb(${grey} ${grey} ${grey})` : colour;
  layer.fillRect(x, y, size, size);
  if (file) element("noise-name").textContent = `${file.name}, drawn on`;
  else element("noise-name").textContent = "Drawn here.";
  file = null;
  present = true;
  draw();
}

/** covers: whether a pixel is made new, by its x and y. */
function setMask(covers) {
  mask = mask.map((_, at) => Number(covers(at % canvas.width, Math.floor(at / canvas.width))));
  draw();
}

function paintMask(x, y, size, value) {
  const [left, right] = [x, x + size].map((at) => Math.max(0, Math.min(canvas.width, at)));
  for (let row = Math.max(0, y); row < Math.min(canvas.height, y + size); row++) {
    mask.fill(value, row * canvas.width + left, row * canvas.width + right);
  }
  draw();
}

let drawing = false; // once for all strokes of an animation frame

function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    drawNow();
  });
}

function drawNow() {
  const pixels = layer.getImageData(0, 0, canvas.width, canvas.height);
  mask.forEach((on, at) => {
    if (on) RED.forEach((value, channel) => (pixels.data[4 * at + channel] += (value - pixels.data[4 * at + channel]) * COVER));
  });
  board.putImageData(pixels, 0, 0);
}

const toPng = (drawn) => new Promise((resolve) => drawn.toBlob(resolve, "image/png"));

/** The picture as it is sent. exactly: the file itself, however large, as long as nobody has drawn on it. */
const pictureBlob = (exactly, mostBytes) =>
  file && (exactly || file.size <= mostBytes) ? Promise.resolve(file) : toPng(layer.canvas);

function maskBlob() {
  const drawn = blankLayer();
  const pixels = drawn.getImageData(0, 0, canvas.width, canvas.height);
  mask.forEach((on, at) => pixels.data.set([255 * on, 255 * on, 255 * on, 255], 4 * at));
  drawn.putImageData(pixels, 0, 0);
  return toPng(drawn.canvas);
}

// --- drawing, masking, denoising ---

function setUpEdit(run, opened) {
  const [width, height] = sizeOf();
  element("size").max = Math.ceil(Math.max(width, height) / 4);
  element("size").value = Math.ceil(width / 16);
  RECTANGLE.forEach((input, at) => {
    const most = [width, height][at % 2];
    Object.assign(input, { max: most, value: most / (at < 2 ? 4 : 2) }); // the middle
  });
  showValues();
  element("canvas").addEventListener("pointerdown", begin);
  element("canvas").addEventListener("pointermove", stroke);
  for (const end of ["pointerup", "pointercancel"]) element("canvas").addEventListener(end, finish);
  for (const id of ["size", "strength"]) element(id).addEventListener("input", showValues);
  element("mask-preset").addEventListener("change", applyPreset);
  for (const input of RECTANGLE) input.addEventListener("input", applyPreset);
  element("blank").addEventListener("click", clearPicture);
  element("take").addEventListener("click", () => takeShown());
  element("edit").addEventListener("click", () => denoise(run));
  opened.then((shown) => shown && takeShown(hasPicture));
}

function showValues() {
  element("size-text").textContent = `${element("size").value} px`;
  element("strength-text").textContent = element("strength").value;
}

function applyPreset() {
  const name = element("mask-preset").value, [width, height] = sizeOf();
  element("rectangle").hidden = name !== "rectangle";
  if (name === "rectangle") {
    const [left, top, wide, high] = RECTANGLE.map((input) => Number(input.value));
    setMask((x, y) => x >= left && x < left + wide && y >= top && y < top + high);
  } else if (name) setMask((x, y) => PRESETS[name](x, y, width, height));
}

let last = null; // where the stroke was, in pixels of the picture

function pixelUnder(event) {
  const canvas = element("canvas"), box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
}

function begin(event) {
  event.preventDefault();
  element("canvas").setPointerCapture(event.pointerId);
  last = pixelUnder(event);
  stroke(event);
}

function stroke(event) {
  if (!last) return;
  const to = pixelUnder(event), from = last;
  const count = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1])));
  for (let k = 1; k <= count; k++) touch(...from.map((value, axis) => value + ((to[axis] - value) * k) / count));
  last = to;
}

function touch(x, y) {
  const size = Number(element("size").value), brush = element("brush").value;
  const corner = [x, y].map((value) => Math.round(value - size / 2));
  if (brush === "picture") paint(...corner, size, element("colour").value);
  else paintMask(...corner, size, Number(brush === "mask"));
}

function finish() {
  if (!last) return;
  last = null;
  if (element("brush").value === "picture") showNoise();
  else element("mask-preset").value = "";
}

// unwanted: whether, by the time the picture is had, somebody has another.
async function takeShown(unwanted = () => false) {
  const picture = await shownPicture();
  if (picture && !unwanted()) takePicture(picture);
}

const takePicture = (picture) => takeFile(new File([picture], "The image above", { type: picture.type }));

async function denoise(run) {
  if (element("edit").ariaDisabled === "true") return;
  if (!hasPicture()) {
    element("noise-error").textContent = "There is no picture yet: choose one, or draw.";
    return;
  }
  const strength = Number(element("strength").value);
  const body = { ...parameters(), image: await toBase64(await pictureBlob(false, MOST_BYTES)) };
  if (hasMask()) body.mask = await toBase64(await maskBlob());
  if (strength < 1 || !body.mask) body.strength = strength;
  run(body);
}

// --- with noise ---

let asking = null; // the question under way; a newer one takes its place
let shownUrl = null;
let later = null;

function setUpNoise() {
  const slider = element("noise-t");
  slider.max = model.num_timesteps - 1;
  slider.value = Math.floor(model.num_timesteps / 4);
  slider.addEventListener("input", () => {
    setTime(Number(slider.value), "noise");
    showNoise();
  });
  element("noise-seed").addEventListener("change", showNoise);
  const take = (file) => {
    if (!file) return;
    element("noise").scrollIntoView({ block: "nearest" });
    takeFile(file);
    offer(file, model);
  };
  element("noise-file").addEventListener("click", ({ target }) => (target.value = "")); // the same file again is news too
  element("noise-file").addEventListener("change", (event) => take(event.target.files[0]));
  addEventListener("dragover", (event) => event.preventDefault()); // or the browser would open the file
  addEventListener("drop", (event) => {
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  onTime((t, from) => {
    if (t === null || ["noise", "live"].includes(from)) return;
    slider.value = Math.round(t);
    tellTime(slider.value);
    clearTimeout(later);
    if (hasPicture()) later = setTimeout(showNoise, PAUSE_MS);
  });
  tellTime(slider.value);
}

function tellTime(t) {
  element("noise-t-text").textContent = `t = ${t}`;
  element("noise-t").setAttribute("aria-valuetext", `t = ${t}`);
}

function leaveNoise() {
  asking?.abort();
  asking = null;
  element("noise-image").removeAttribute("src");
  if (shownUrl) URL.revokeObjectURL(shownUrl);
  shownUrl = null;
  element("noise-image").alt = "";
  element("noise-text").hidden = true;
  element("noise-error").textContent = "";
}

/** Show the picture with noise at the timestep that is looked at. */
async function showNoise() {
  const t = Number(element("noise-t").value);
  tellTime(t);
  if (!hasPicture()) return leaveNoise();
  asking?.abort();
  const mine = (asking = new AbortController());
  try {
    const query = new URLSearchParams({ t, seed: element("noise-seed").value || "0" });
    const headers = { "Content-Type": "application/octet-stream" };
    const body = await pictureBlob(true);
    const response = await ask(`noise?${query}`, { method: "POST", headers, body, signal: mine.signal });
    const url = URL.createObjectURL(await response.blob());
    if (mine !== asking) return URL.revokeObjectURL(url);
    if (shownUrl) URL.revokeObjectURL(shownUrl);
    shownUrl = url;
    element("noise-image").src = url;
    element("noise-image").alt = `The image at t = ${t}`;
    element("noise-error").textContent = "";
    const alphaBar = Number(response.headers.get("X-Alpha-Bar"));
    element("noise-text").hidden = false;
    element("noise-signal").textContent = Math.sqrt(alphaBar).toFixed(3);
    element("noise-spread").textContent = Math.sqrt(1 - alphaBar).toFixed(3);
  } catch (error) {
    if (error.name !== "AbortError" && mine === asking) element("noise-error").textContent = `${reason(error)}.`;
  }
}
