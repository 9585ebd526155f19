// The picture of one's own and the mask over it, at the model's size: a file as it came, or what has been drawn.

import { element } from "./api.js";

const canvas = element("canvas"), board = canvas.getContext("2d");
const RED = [226, 61, 61], COVER = 0.55; // how the mask is shown
const LUMA = [0.299, 0.587, 0.114]; // ITU-R 601, as the server makes images grey

let model = null, layer = null; // the picture without the mask, a 2d context
let mask = null; // Uint8Array, 1 where the image is made new
let file = null; // as it came, until somebody draws on it
let present = false;
const changed = [];

/** Call `listener` when the picture, not its mask, has changed. */
export const onPicture = (listener) => changed.push(listener);
export const hasPicture = () => present;
export const hasMask = () => mask.includes(1);
export const sizeOf = () => [canvas.width, canvas.height];

export function setUp(loaded) {
  model = loaded;
  Object.assign(canvas, { width: model.width_px, height: model.height_px });
  layer = blankLayer();
  mask = new Uint8Array(canvas.width * canvas.height);
  draw();
}

function blankLayer() {
  const made = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const context = made.getContext("2d", { willReadFrequently: true });
  context.fillRect(0, 0, canvas.width, canvas.height); // black, which is what transparent pixels become
  return context;
}

/** Take a file. Where the browser cannot show it, the server will say what is wrong with it. */
export async function takeFile(given) {
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
  tell();
}

function makeGrey() {
  const pixels = layer.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const grey = LUMA.reduce((sum, share, channel) => sum + share * pixels.data[at + channel], 0);
    pixels.data.fill(Math.round(grey), at, at + 3);
  }
  layer.putImageData(pixels, 0, 0);
}

export function clearPicture() {
  file = null;
  present = false;
  layer = blankLayer();
  element("noise-name").textContent = "Nothing is drawn yet.";
  setMask(() => false);
  tell();
}

/** Paint a square of the picture. colour: #rrggbb. */
export function paint(x, y, size, colour) {
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

/** Say that a stroke has ended. */
export function tell() {
  for (const listener of changed) listener();
}

/** covers: whether a pixel is made new, by its x and y. */
export function setMask(covers) {
  mask = mask.map((_, at) => Number(covers(at % canvas.width, Math.floor(at / canvas.width))));
  draw();
}

export function paintMask(x, y, size, value) {
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
export const pictureBlob = (exactly, mostBytes) =>
  file && (exactly || file.size <= mostBytes) ? Promise.resolve(file) : toPng(layer.canvas);

export function maskBlob() {
  const drawn = blankLayer();
  const pixels = drawn.getImageData(0, 0, canvas.width, canvas.height);
  mask.forEach((on, at) => pixels.data.fill(255 * on, 4 * at, 4 * at + 3));
  drawn.putImageData(pixels, 0, 0);
  return toPng(drawn.canvas);
}
