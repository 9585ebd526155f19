// What the tests ask of a server by OpenAI's own library for JavaScript: node openai.mjs BASE_URL; prints one JSON object.
import { createReadStream } from "node:fs";
import OpenAI from "openai";

const [baseURL, image, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const sneaker = { prompt: "Sneaker", seed: 7, steps: 10, sampler: "dpmpp_2m", guidance: 1.5 };
const said = {};

const answer = await client.images.generate({ ...sneaker, n: 2 });
said.images = answer.data.map((each) => each.b64_json);
said.indices = answer.data.map((each) => each.index);

said.events = [];
for await (const event of await client.images.generate({ ...sneaker, stream: true, partial_images: 2 })) {
    said.events.push([event.type, event.partial_image_index ?? null]);
    said.streamed = event.b64_json;
}

const edited = await client.images.edit({
    ...sneaker, image: createReadStream(image), mask: createReadStream(mask), guidance: 2, guidance_interval: [100, 900],
});
said.edited = edited.data[0].b64_json;

said.models = [];
for await (const model of client.models.list()) said.models.push(model.id);
said.model = (await client.models.retrieve(said.models[0])).owned_by;

const refusal = async (members) => {
    try {
        await client.images.generate(members);
    } catch (error) {
        return [error.constructor.name, error.status, error.code, error.param, Boolean(error.requestID)];
    }
    return null;
};
said.refusals = [await refusal({ prompt: "a red shoe" }), await refusal({ ...sneaker, model: "gpt-image-1" })];

const stopped = await client.images.generate({ prompt: "bag", steps: 1000, sampler: "ddpm", n: 2, stream: true, partial_images: 3 });
for await (const event of stopped) {
    said.stopped = event.type;
    break;
}
console.log(JSON.stringify(said));
