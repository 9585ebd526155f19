// The page at /: asks for images over a WebSocket, shows the frames as they come, and keeps what came.

const MOST_FRAMES = 200; // of a job; each is kept, so that one can go back
const MOST_BYTES = 100e6; // that they may take: noise hardly compresses
const POLL_MS = 1500; // how often a job that waits is asked about
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
  busy(false);
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
  if (given.seed) spec.seed = given.seed.replace(/^0+(?=\d)/, "");
  if (given.class_label) spec.class_label = Number(given.class_label);
  if (given.guidance !== undefined && model.conditional) spec.guidance = Number(given.guidance);
  return spec;
}

function run() {
  const spec = parameters();
  complain("");
  const url = new URL("sample/stream", base);
  url.protocol = url.protocol.replace("http", "ws");
  const ws = (socket = new WebSocket(url));
  ws.binaryType = "blob";
  busy(true);
  say("Connecting…");
  element("watch").scrollIntoView({ block: "nearest" });
  const job = { spec, opened: false, frame: null, done: null, settled: false };
  const frameBytes = 2 * spec.n * model.width_px * model.height_px * model.channels;
  const most = Math.max(10, Math.min(MOST_FRAMES, Math.floor(MOST_BYTES / frameBytes)));
  ws.onopen = () => {
    job.opened = true;
    ws.send(JSON.stringify({ ...spec, every: Math.max(1, Math.ceil(spec.steps / most)), show: ["x_t", "x_0"] }));
  };
  ws.onmessage = (event) => {
    if (event.data instanceof Blob) takePicture(job, event.data);
    else takeMessage(job, JSON.parse(event.data));
  };
  ws.onclose = () => {
    if (!job.settled && !job.opened) {
      complain("There is no connection: the server is not there, has too many streams open, or lets no page of here in.");
      say("Not begun.");
    } else if (!job.settled) {
      complain("The connection broke before the images were done. They are given up; ask again.");
      say("Broken off.");
    }
    job.settled = true;
    socket = null;
    busy(false);
  };
}

function takeMessage(job, message) {
  if (message.type === "accepted") {
    job.spec.seed ??= String(message.seed); // one that was given may be too large for JavaScript's numbers
    clearFrames();
    foresee(message);
    pollWhileWaiting(job, message.id);
  } else if (message.type === "frame") {
    if (!job.frame) say("Running.");
    job.frame = message;
    element("progress").value = message.step / message.steps;
    element("progress-text").textContent =
      `Step ${message.step} of ${message.steps}, t = ${message.t}, ${seconds(message.eta_s)} left`;
  } else if (message.type === "done") {
    job.done = message;
  } else if (message.type === "cancelled") {
    job.settled = true;
    say("Cancelled.");
  } else {
    job.settled = true;
    complain(`${message.detail}.`, message.field);
    say("Not done.");
  }
}

function foresee({ position, eta_s: eta }) {
  const ahead = position === 1 ? "1 job" : `${position} jobs`;
  say(position ? `Waiting: ${ahead} ahead, done in about ${seconds(eta)}.` : `Begun, done in about ${seconds(eta)}.`);
}

async function pollWhileWaiting(job, id) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    if (job.frame || job.done || job.settled) return;
    const status = await getJson(`jobs/${id}`).catch(() => null); // gone: it has just ended
    if (status && !job.frame && !job.done && !job.settled) foresee(status);
  }
}

function takePicture(job, blob) {
  if (job.done) {
    job.settled = true;
    element("progress").value = 1;
    element("progress-text").textContent = "";
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
  for (const show of ["x_t", "x_0"]) {
    element(show).removeAttribute("src");
    element(show).alt = "";
  }
  Object.assign(element("scrub"), { disabled: true, max: 0, value: 0 });
  element("progress").value = 0;
  element("progress-text").textContent = element("frame-text").textContent = "";
  markTime(null);
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
  const add = (name, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    chart.append(node);
    return node;
  };
  const line = (values, share) =>
    values.map((value, t) => `${t ? "L" : "M"}${x(t).toFixed(1)} ${(TOP + (1 - share(value)) * HEIGHT).toFixed(1)}`).join("");
  add("line", { x1: 0, x2: WIDTH, y1: TOP + HEIGHT, y2: TOP + HEIGHT });
  add("path", { class: "alpha_bar", d: line(alphaBar, (value) => value) });
  add("path", { class: "beta", d: line(beta, (value) => value / most) });
  add("path", { class: "snr", d: line(snr, (value) => (value + 6) / 12) });
  element("last-t").textContent = `t = ${model.num_timesteps - 1}`;
  add("line", { id: "now", y1: TOP, y2: TOP + HEIGHT, x1: 0, x2: 0, visibility: "hidden" });
  markTime(null);
}

const x = (t) => (t / Math.max(1, model.num_timesteps - 1)) * WIDTH;

function markTime(t) {
  const legend = "Solid: alpha_bar, 0 to 1. Dashed: beta, to its greatest value. Dotted: signal-to-noise ratio, 10⁻⁶ to 10⁶.";
  const now = element("now");
  now.setAttribute("visibility", t === null ? "hidden" : "visible");
  if (t === null) {
    element("chart-text").textContent = legend;
    return;
  }
  for (const end of ["x1", "x2"]) now.setAttribute(end, x(t).toFixed(1));
  const alphaBar = schedule.alpha_bar[t];
  const ratio = alphaBar / (1 - alphaBar);
  element("chart-text").textContent =
    `${legend} At t = ${t}: alpha_bar ${alphaBar.toPrecision(3)}, signal-to-noise ${ratio.toPrecision(3)}.`;
}

// --- results ---

function addResult(spec, picture) {
  const entry = element("result").content.cloneNode(true);
  const name = spec.class_label === undefined ? "no class" : model.class_names[spec.class_label];
  const what = `${spec.n} × ${name}, ${spec.steps} steps of ${spec.sampler}, seed ${spec.seed}`;
  const body = toJson(spec);
  const url = new URL("sample", base).href.replaceAll("'", "%27");
  entry.querySelector("img").src = picture;
  entry.querySelector("img").alt = "The images";
  entry.querySelector(".what").textContent = what;
  const link = entry.querySelector(".png");
  link.href = picture;
  link.download = `tminus-${spec.seed}.png`;
  const zip = entry.querySelector(".zip");
  zip.addEventListener("click", () => downloadZip(spec, zip, zip.parentElement.nextElementSibling));
  entry.querySelector(".curl").textContent = `curl --fail-with-body -sS '${url}' -d '${body}' -o out.png`;
  entry.querySelector(".python").textContent = [
    "import pathlib",
    "import httpx",
    "",
    `spec = ${body}`,
    `response = httpx.post("${url}", json=spec, timeout=None)`,
    'pathlib.Path("out.png").write_bytes(response.raise_for_status().content)',
  ].join("\n");
  element("no-results").hidden = true;
  element("gallery").prepend(entry);
}

function toJson(spec) {
  const text = JSON.stringify({ ...spec, seed: null });
  return text.replace('"seed":null', () => `"seed":${spec.seed}`); // all 64 bits of it
}

async function downloadZip(spec, button, complaint) {
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true";
  complaint.textContent = "";
  try {
    const headers = { Accept: "application/zip", "Content-Type": "application/json" };
    const response = await fetch(new URL("sample", base), { method: "POST", headers, body: toJson(spec) });
    if (!response.ok) throw new Error((await response.json().catch(() => ({}))).detail ?? `status ${response.status}`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = `tminus-${spec.seed}.zip`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    complaint.textContent = `The zip could not be had: ${error.message}`;
  }
  button.ariaDisabled = "false";
}

// --- small things ---

function busy(yes) {
  // Not disabled: who has just pressed one would lose the focus.
  element("go").ariaDisabled = String(yes);
  element("cancel").ariaDisabled = String(!yes);
}

function say(text) {
  element("status").textContent = text;
}

function complain(text, field) {
  element("error").textContent = text;
  for (const input of form.elements) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
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
  if (model && schedule && !socket) run();
});
element("cancel").addEventListener("click", () => {
  if (!socket) return;
  say("Cancelling…");
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type: "cancel" }));
  else socket.close();
});

start().catch((error) => complain(`This page could not be set up: ${error.message}. Reload it when the server is ready.`));
