// Render one split of a set: `node render.mjs --set pixel-art|avatars --out DIR --split train|test [--n N]`.
//
// Image i of a split is the avatar of the seed "SPLIT-i", so the splits share no seed and N only says how many there are.
// Its class is i modulo the number of classes; all else that the avatar shows is drawn by its seed.
// It is written to DIR/SET-SPLIT/CLASS/i.png.

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import { createAvatar } from '@dicebear/core';
import * as lorelei from '@dicebear/lorelei';
import * as notionists from '@dicebear/notionists';
import * as openPeeps from '@dicebear/open-peeps';
import * as pixelArt from '@dicebear/pixel-art';
import { Resvg } from '@resvg/resvg-js';
import { PNG } from 'pngjs';

const BACKGROUNDS = ['b6e3f4', 'c0aede', 'd1d4f9', 'ffd5dc', 'ffdfbf'];

// The style's own names, "short.." and "long..", less four that do not look it: buns, spikes, and curls to the chin.
const HAIR = pixelArt.schema.properties.hair.items.enum.filter(
  (name) => !['long05', 'long14', 'long15', 'short11'].includes(name),
);
const HEADS = {
  'short-hair': { hair: HAIR.filter((name) => name.startsWith('short')), hatProbability: 0 },
  'long-hair': { hair: HAIR.filter((name) => name.startsWith('long')), hatProbability: 0 },
  hat: { hair: HAIR, hatProbability: 100 },
};
// Open Peeps has eye patches and sunglasses among its accessories; the others have glasses alone.
const GLASSES = openPeeps.schema.properties.accessories.items.enum.filter((name) => name.startsWith('glasses'));
const STYLES = {
  lorelei: [lorelei, 'glasses', {}],
  notionists: [notionists, 'glasses', {}],
  'open-peeps': [openPeeps, 'accessories', { accessories: GLASSES, maskProbability: 0 }],
  'pixel-art': [pixelArt, 'glasses', {}],
};

// Each class of a set: its name, the style, and the options that make it.
const withAndWithoutGlasses = ([name, [style, glasses, options]]) => [
  [name, style, { ...options, [`${glasses}Probability`]: 0 }],
  [`${name}-glasses`, style, { ...options, [`${glasses}Probability`]: 100 }],
];
const SETS = {
  'pixel-art': {
    sizePx: 32, // the design's grid is 16x16, so each of its pixels is a block of 2x2
    crisp: true,
    splits: { train: 60_000, test: 10_000 },
    classes: Object.entries(HEADS).flatMap(([name, head]) => withAndWithoutGlasses([name, [pixelArt, 'glasses', head]])),
  },
  avatars: {
    sizePx: 64,
    splits: { train: 40_000, test: 8_000 },
    classes: Object.entries(STYLES).flatMap(withAndWithoutGlasses),
  },
};

function draw(style, seed, size, attributes) {
  const avatar = createAvatar(style, { seed, size, backgroundColor: BACKGROUNDS, ...attributes });
  return new Resvg(avatar.toString(), { font: { loadSystemFonts: false } }).render().pixels; // RGBA
}

function isCrisp(rgba, size) {
  const pixels = new Uint32Array(rgba.buffer, rgba.byteOffset, size ** 2);
  return pixels.every((pixel, k) => pixel === pixels[k - (k % 2) - size * (Math.floor(k / size) % 2)]);
}

function encode(rgba, size) {
  const png = new PNG({ width: size, height: size });
  rgba.copy(png.data);
  return PNG.sync.write(png, { colorType: 2 }); // RGB: an avatar fills its background
}

const { values } = parseArgs({
  options: { set: { type: 'string' }, out: { type: 'string' }, split: { type: 'string' }, n: { type: 'string' } },
});
const set = SETS[values.set];
const n = Number(values.n ?? set?.splits[values.split]);
if (!values.out || !set || !(values.split in set.splits) || !Number.isInteger(n) || n < 1) {
  console.error('usage: node render.mjs --set pixel-art|avatars --out DIR --split train|test [--n N]');
  process.exit(2);
}

const folder = join(values.out, `${values.set}-${values.split}`);
for (const [name] of set.classes) mkdirSync(join(folder, name), { recursive: true });
for (let i = 0; i < n; i++) {
  const [name, style, attributes] = set.classes[i % set.classes.length];
  const rgba = draw(style, `${values.split}-${i}`, set.sizePx, attributes);
  if (set.crisp && !isCrisp(rgba, set.sizePx)) throw new Error(`${values.split}-${i}: not made of blocks of 2x2`);
  writeFileSync(join(folder, name, `${String(i).padStart(5, '0')}.png`), encode(rgba, set.sizePx));
}
console.log(`${folder}: ${n} images, ${set.classes.length} classes`);
