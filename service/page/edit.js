// Drawing on the picture, masking it, and having it denoised.

import { element } from "./api.js";
import { parameters } from "./form.js";
import { lastPicture } from "./frames.js";
import {
  clearPicture, hasMask, hasPicture, maskBlob, paint, paintMask, pictureBlob, setMask, sizeOf, takeFile, tell,
} from "./picture.js";

const MOST_BYTES = 2 ** 20; // of a file that is sent as it came; the session keeps what is being asked for
const PRESETS = {
  none: () => false,
  top: (_, y, __, height) => y < height / 2,
  bottom: (_, y, __, height) => y >= height / 2,
  left: (x, _, width) => x < width / 2,
  right: (x, _, width) => x >= width / 2,
};
const RECTANGLE = ["rect-x", "rect-y", "rect-w", "rect-h"].map(element);

/** @param {{run: (body: object) => void, opened: Promise<boolean>}} page opened: whether a first sample is shown */
export function setUp(model, { run, opened }) {
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
  element("take").addEventListener("click", takeShown);
  element("edit").addEventListener("click", () => denoise(run));
  opened.then((shown) => shown && !hasPicture() && takeShown());
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
  if (element("brush").value === "picture") tell();
  else element("mask-preset").value = "";
}

async function takeShown() {
  const url = lastPicture();
  if (!url) return;
  const [width, height] = sizeOf();
  const first = await createImageBitmap(await (await fetch(url)).blob(), 0, 0, width, height); // of a sheet of several
  const drawn = Object.assign(document.createElement("canvas"), { width, height });
  drawn.getContext("2d").drawImage(first, 0, 0);
  drawn.toBlob((blob) => takeFile(new File([blob], "The image above", { type: blob.type })), "image/png");
}

const toBase64 = async (blob) => {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  return btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""));
};

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
