// The page at /: asks for images over a WebSocket, shows the frames as they come, and keeps what came.

const MOST_FRAMES = 200; // of a job; each is kept, so that one can go back
const element = (id) => document.getElementById(id);
const form = element("form");
const base = new URL(".", document.baseURI);

let model, schedule;
let socket = null; // while a job runs
let frames = []; // of the last job: {step, steps, t, x_t, x_0}, the pictures as object URLs
let following = true; // whether the newest frame is shown; not while somebody looks back

// --- what is loaded ---

async function start() {
  [model, schedule] = await Promise.all(["model", "model/schedule"].map(getJson));
  element("model").textContent =
    `${model.name}: ${model.width_px}×${model.height_px}, T=${model.num_timesteps}, on ${model.device}`;
  fill(form.elements.sampler, model.samplers.map((name) => [name, name]), model.default_sampler);
  form.elements.steps.max = model.num_timesteps;
  form.elements.steps.value = Math.min(100, model.num_timesteps);
  form.elements.n.max = model.limits.max_n;
  if (model.conditional) {
    element("class-field").hidden = false;
    const classes = model.class_names.map((name, number) => [String(number), name]);
    const any = model.null_class === null ? [] : [["", "no class"]];
    fill(form.elements.class_label, [...classes, ...any], "0");
    element("guidance-field").hidden = model.null_class === null;
  }
  drawSchedule();
  form.elements.class_label.addEventListener("change", suitGuidance);
  suitGuidance();
}

async function getJson(path) {
  const response = await fetch(new URL(path, base));
  if (!response.ok) throw new Error(`GET /${path}: ${response.status}`);
  return response.json();
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

function suitGuidance() {
  form.elements.guidance.disabled = element("guidance-field").hidden || form.elements.class_label.value === "";
}

// --- one job ---

function parameters() {
  const given = Object.fromEntries(new FormData(form)); // what is disabled is left out
  const spec = { n: Number(given.n), steps: Number(given.steps), sampler: given.sampler };
  if (given.seed) spec.seed = given.seed;
  if (given.class_label) spec.class_label = Number(given.class_label);
  if (given.guidance !== undefined && model.conditional) spec.guidance = Number(given.guidance);
  return spec;
}

function run() {
  const spec = parameters();
  complain("");
  clearFrames();
  const url = new URL("sample/stream", base);
  url.protocol = url.protocol.replace("http", "ws");
  const ws = (socket = new WebSocket(url));
  ws.binaryType = "blob";
  busy(true);
  say("Connecting…");
  const job = { spec, frame: null, done: null, settled: false, finals: [] };
  ws.onopen = () =>
    ws.send(JSON.stringify({ ...spec, every: Math.max(1, Math.ceil(spec.steps / MOST_FRAMES)), show: ["x_t", "x_0"] }));
  ws.onmessage = (event) => {
    if (event.data instanceof Blob) takePicture(job, event.data);
    else takeMessage(job, JSON.parse(event.data));
  };
  ws.onclose = () => {
    if (!job.settled) {
      complain("The connection broke before the images were done. They are given up; ask again.");
      say("Broken off.");
    }
    socket = null;
    busy(false);
  };
}

function takeMessage(job, message) {
  if (message.type === "accepted") {
    job.spec.seed ??= String(message.seed); // one that was given may be too large for JavaScript's numbers
    const ahead = message.position === 1 ? "1 job" : `${message.position} jobs`;
    say(message.position ? `Waiting: ${ahead} ahead, done in about ${seconds(message.eta_s)}.` : "Running.");
  } else if (message.type === "frame") {
    job.frame = message;
    element("progress").value = message.step / message.steps;
    say(`Step ${message.step} of ${message.steps}, ${seconds(message.eta_s)} left.`);
  } else if (message.type === "done") {
    job.done = message;
  } else if (message.type === "cancelled") {
    job.settled = true;
    say("Cancelled.");
  } else {
    job.settled = true;
    const again = message.retry_after_s ? ` Try again in ${message.retry_after_s} s.` : "";
    complain(`${message.detail}${message.detail.includes("Try again") ? "" : again}`, message.field);
    say("Not done.");
  }
}

function takePicture(job, blob) {
  if (job.done) {
    job.settled = true;
    element("progress").value = 1;
    say(`Done in ${seconds(job.done.queue_s + job.done.denoise_s)}.`);
    const url = URL.createObjectURL(blob);
    addFrame({ step: job.spec.steps, steps: job.spec.steps, t: 0 }, { x_t: url, x_0: url });
    addResult(job.spec, url);
  } else {
    addFrame(job.frame, { [job.frame.show]: URL.createObjectURL(blob) });
  }
}

// --- frames ---

function addFrame({ step, steps, t }, pictures) {
  const last = frames.at(-1);
  if (last && last.step === step) Object.assign(last, pictures);
  else frames.push({ step, steps, t, ...pictures });
  const scrub = element("scrub");
  scrub.disabled = false;
  scrub.max = frames.length - 1;
  if (following) showFrame(frames.length - 1);
}

function showFrame(at) {
  const frame = frames[at];
  for (const show of ["x_t", "x_0"]) {
    if (!frame[show]) continue;
    element(show).src = frame[show];
    element(show).alt = `${show} after ${frame.step} of ${frame.steps} steps`;
  }
  const scrub = element("scrub");
  scrub.value = at;
  scrub.setAttribute("aria-valuetext", `step ${frame.step} of ${frame.steps}`);
  element("frame-text").textContent = `Frame ${at + 1} of ${frames.length}: after ${frame.step} steps, t = ${frame.t}`;
  markTime(frame.t);
}

function clearFrames() {
  const kept = new Set([...document.querySelectorAll("#gallery img")].map((img) => img.src));
  for (const frame of frames)
    for (const url of [frame.x_t, frame.x_0]) if (url && !kept.has(url)) URL.revokeObjectURL(url);
  frames = [];
  following = true;
  element("scrub").disabled = true;
  element("progress").value = 0;
}

element("scrub").addEventListener("input", (event) => {
  const at = Number(event.target.value);
  following = at === frames.length - 1;
  showFrame(at);
});

// --- the schedule: alpha_bar, beta and the signal-to-noise ratio alpha_bar / (1 - alpha_bar) ---

const WIDTH = 600, HEIGHT = 190, TOP = 10;

function drawSchedule() {
  const { alpha_bar: alphaBar, beta } = schedule;
  const snr = alphaBar.map((value) => Math.max(-6, Math.min(6, Math.log10(value / (1 - value)))));
  const most = Math.max(...beta);
  const chart = element("chart");
  const add = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    chart.append(node);
    return node;
  };
  const line = (values, share) =>
    values.map((value, t) => `${t ? "L" : "M"}${x(t).toFixed(1)} ${(TOP + (1 - share(value)) * HEIGHT).toFixed(1)}`).join("");
  add("line", { x1: 0, x2: WIDTH, y1: TOP + HEIGHT, y2: TOP + HEIGHT });
  add("path", { class: "alpha_bar", d: line(alphaBar, (value) => value) });
  add("path", { class: "beta", d: line(beta, (value) => value / most) });
  add("path", { class: "snr", d: line(snr, (value) => (value + 6) / 12) });
  add("text", { x: 4, y: TOP + HEIGHT + 16 }, "t = 0");
  add("text", { x: WIDTH - 50, y: TOP + HEIGHT + 16 }, `t = ${model.num_timesteps - 1}`);
  add("line", { id: "now", y1: TOP, y2: TOP + HEIGHT, x1: 0, x2: 0, visibility: "hidden" });
  element("chart-text").textContent = "";
  markTime(null);
}

const x = (t) => (t / Math.max(1, model.num_timesteps - 1)) * WIDTH;

function markTime(t) {
  const legend = "Solid: alpha_bar, 0 to 1. Dashed: beta, to its greatest value. Dotted: signal-to-noise ratio, 10⁻⁶ to 10⁶.";
  if (t === null) {
    element("chart-text").textContent = legend;
    return;
  }
  const now = element("now");
  now.setAttribute("visibility", "visible");
  for (const end of ["x1", "x2"]) now.setAttribute(end, x(t).toFixed(1));
  const alphaBar = schedule.alpha_bar[t];
  const ratio = alphaBar / (1 - alphaBar);
  element("chart-text").textContent =
    `${legend} At t = ${t}: alpha_bar ${alphaBar.toPrecision(3)}, signal-to-noise ${ratio.toPrecision(3)}.`;
}

// --- results ---

function addResult(spec, url) {
  const entry = element("result").content.cloneNode(true);
  const query = new URLSearchParams(Object.entries(spec));
  const name = spec.class_label === undefined ? "no class" : model.class_names[spec.class_label];
  const what = `${spec.n} × ${name}, ${spec.steps} steps of ${spec.sampler}, seed ${spec.seed}`;
  entry.querySelector("img").src = url;
  entry.querySelector("img").alt = what;
  entry.querySelector(".what").textContent = what;
  const link = entry.querySelector(".png");
  link.href = url;
  link.download = `tminus-${spec.seed}.png`;
  entry.querySelector(".zip").addEventListener("click", () => downloadZip(spec));
  entry.querySelector(".curl").textContent = `curl -X POST '${new URL("sample", base)}?${query}' -o out.png`;
  entry.querySelector(".python").textContent = [
    "import httpx",
    "",
    `spec = ${JSON.stringify({ ...spec, seed: null }).replace('"seed":null', `"seed":${spec.seed}`)}`,
    `response = httpx.post("${new URL("sample", base)}", json=spec, timeout=None)`,
    'open("out.png", "wb").write(response.raise_for_status().content)',
  ].join("\n");
  element("no-results").hidden = true;
  element("gallery").prepend(entry);
}

async function downloadZip(spec) {
  try {
    const response = await fetch(new URL(`sample?${new URLSearchParams(Object.entries(spec))}`, base), {
      method: "POST",
      headers: { Accept: "application/zip" },
    });
    if (!response.ok) throw new Error((await response.json()).detail);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = `tminus-${spec.seed}.zip`;
    link.click();
  } catch (error) {
    complain(`The zip could not be had: ${error.message}`);
  }
}

// --- small things ---

function busy(yes) {
  element("go").disabled = yes;
  element("cancel").disabled = !yes;
}

function say(text) {
  element("status").textContent = text;
}

function complain(text, field) {
  element("error").textContent = text;
  for (const input of form.elements) input.removeAttribute("aria-invalid");
  const input = field && form.elements[field];
  if (input) {
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", "error");
    input.focus();
  }
}

function seconds(value) {
  return value < 90 ? `${value.toFixed(value < 10 ? 1 : 0)} s` : `${Math.round(value / 60)} min`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!socket) run();
});
element("cancel").addEventListener("click", () => {
  say("Cancelling…");
  socket?.send(JSON.stringify({ type: "cancel" }));
});

start().catch((error) => complain(`This page could not be set up: ${error.message}. Reload it when the server is ready.`));
