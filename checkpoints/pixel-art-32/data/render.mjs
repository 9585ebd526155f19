// Render one split of the data: `node render.mjs --out DIR --split train|test [--n N]`.
//
// Image i of a split is the avatar of the seed "SPLIT-i", so the splits share no seed and N only says how many there are.
// Its class is i modulo the number of classes; all else that the avatar shows is drawn by its seed.
// It is written to DIR/pixel-art-SPLIT/CLASS/i.png.

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import { createAvatar } from '@dicebear/core';
import * as pixelArt from '@dicebear/pixel-art';
import { Resvg } from '@resvg/resvg-js';
import { PNG } from 'pngjs';

const SIZE_PX = 32; // the design's grid is 16x16, so each of its pixels is a block of 2x2
const SPLITS = { train: 60_000, test: 10_000 };
const BACKGROUNDS = ['b6e3f4', 'c0aede', 'd1d4f9', 'ffd5dc', 'ffdfbf'];

// The style's own names, "short.." and "long..", less four that do not look it: buns, spikes, and curls to the chin.
const HAIR = pixelArt.schema.properties.hair.items.enum.filter(
  (name) => !['long05', 'long14', 'long15', 'short11'].includes(name),
);
const SHORT = { hair: HAIR.filter((name) => name.startsWith('short')), hatProbability: 0 };
const LONG = { hair: HAIR.filter((name) => name.startsWith('long')), hatProbability: 0 };
const HAT = { hair: HAIR, hatProbability: 100 };

const CLASSES = Object.entries({ 'short-hair': SHORT, 'long-hair': LONG, hat: HAT }).flatMap(([name, head]) => [
  [name, { ...head, glassesProbability: 0 }],
  [`${name}-glasses`, { ...head, glassesProbability: 100 }],
]);

function draw(seed, attributes) {
  const avatar = createAvatar(pixelArt, { seed, size: SIZE_PX, backgroundColor: BACKGROUNDS, ...attributes });
  return new Resvg(avatar.toString(), { font: { loadSystemFonts: false } }).render().pixels; // RGBA
}

function isCrisp(rgba) {
  const pixels = new Uint32Array(rgba.buffer, rgba.byteOffset, SIZE_PX ** 2);
  return pixels.every((pixel, k) => pixel === pixels[k - (k % 2) - SIZE_PX * (Math.floor(k / SIZE_PX) % 2)]);
}

function encode(rgba) {
  const png = new PNG({ width: SIZE_PX, height: SIZE_PX });
  rgba.copy(png.data);
  return PNG.sync.write(png, { colorType: 2 }); // RGB: an avatar fills its background
}

const { values } = parseArgs({
  options: { out: { type: 'string' }, split: { type: 'string' }, n: { type: 'string' } },
});
const n = Number(values.n ?? SPLITS[values.split]);
if (!values.out || !(values.split in SPLITS) || !Number.isInteger(n) || n < 1) {
  console.error('usage: node render.mjs --out DIR --split train|test [--n N]');
  process.exit(2);
}

const folder = join(values.out, `pixel-art-${values.split}`);
for (const [name] of CLASSES) mkdirSync(join(folder, name), { recursive: true });
for (let i = 0; i < n; i++) {
  const [name, attributes] = CLASSES[i % CLASSES.length];
  const rgba = draw(`${values.split}-${i}`, attributes);
  if (!isCrisp(rgba)) throw new Error(`${values.split}-${i}: not made of blocks of 2x2`);
  writeFileSync(join(folder, name, `${String(i).padStart(5, '0')}.png`), encode(rgba));
}
console.log(`${folder}: ${n} images, ${CLASSES.length} classes`);
