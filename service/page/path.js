// The whole way from noise to an image, asked for at once: every frame, in one answer. Nothing of it is kept by the server.

import { ask, parse, post, requestOf, toBlob, toQuery } from "./api.js";
import { SHOWS } from "./stage.js";

const MOST_FRAMES = 40, MOST_BYTES = 2 ** 24; // of pixels: more the server refuses

/** How many passes through the network the images of a request take, each. */
export function passesOf({ sampler, steps }, model) {
  const { passes_per_step: each = 1, passes_to_start: more = 0, steps_to_start: first = 1 } = model.sampler_details[sampler] ?? {};
  return steps < 2 ? steps : each * (steps - 1) + 1 + (steps > first ? more : 0);
}

/** How many bytes the pixels of a frame take: x_t and x_0 of each image. */
export const frameBytes = ({ n }, { width_px: width, height_px: height, channels }) => 2 * n * width * height * channels;

const pictures = ({ x_t, x_0 }) => ({ x_t: toBlob(x_t), x_0: toBlob(x_0) });

function request(parameters, model, signal) {
  const asked = requestOf(parameters, model);
  // A query cannot say that there is no class among others, and has no room for a picture.
  const inBody = [parameters.class_label].flat().includes(null) || parameters.image;
  if (inBody) return post("sample", asked, "application/json", signal);
  return ask(`sample?${toQuery(asked)}`, { headers: { Accept: "application/json" }, signal });
}

/**
 * Ask for the beginning of a path, of which no more steps are taken than that. Raises what `ask` does.
 * every, until: the steps of the frames; fewer frames come where the server would refuse so many.
 */
export async function askBeginning(parameters, { every, until }, model, signal) {
  const most = Math.max(1, Math.floor(MOST_BYTES / frameBytes(parameters, model)) - 1);
  const fewer = every * Math.max(1, Math.ceil(until / every / most));
  const asked = { ...parameters, every: fewer, until, show: SHOWS };
  const { frames, fingerprint } = parse(await (await request(asked, model, signal)).text());
  return { frames: frames.map(({ step, t, ...data }) => ({ step, t, pictures: pictures(data) })), fingerprint };
}

/**
 * Ask for a path. Raises what `ask` does.
 * @returns {Promise<{frames: {step: number, steps: number, t: number, pictures: Object<string, Blob>}[], image: Blob,
 *   spec: object, milliseconds: ?number}>} milliseconds: what denoising took; null where the server knew the answer
 */
export async function askPath(parameters, model, signal) {
  const most = Math.max(1, Math.min(MOST_FRAMES, Math.floor(MOST_BYTES / frameBytes(parameters, model))));
  const every = Math.ceil(passesOf(parameters, model) / most) || 1;
  const response = await request({ ...parameters, every, show: SHOWS }, model, signal);
  const { frames, sheet, spec } = parse(await response.text());
  const image = toBlob(sheet);
  const steps = passesOf(spec, model);
  const path = frames.map(({ step, t, ...data }) => ({ step, steps, t, pictures: pictures(data) }));
  path.push({ step: steps, steps, t: 0, pictures: { x_t: image, x_0: image } });
  const took = /denoise;dur=([\d.]+)/.exec(response.headers.get("Server-Timing") ?? "");
  return { frames: path, image, spec, milliseconds: took ? Number(took[1]) : null };
}
