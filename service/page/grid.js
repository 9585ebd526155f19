// A grid: a row for each class, a column for each noise. Each row is one request, or for a walk one a column.

import { element, parse, plainSeed, post, reason, requestOf, toBlob } from "./api.js";
import { classOptions, describe, fill, usualOpening } from "./form.js";
import { askPath } from "./path.js";

const MOST_ROWS = 10, MOST_COLUMNS = 12;
const AT_ONCE = 4; // requests, so that there are connections left for the rest of the page

let urls = []; // of the images that are shown
let watching = null; // the question for an image's way; a newer one takes its place

/** @param {{watch: function, fillFrom: function}} page */
export function setUp(model, page) {
  const columns = Math.min(MOST_COLUMNS, model.limits.max_n);
  element("grid-class-field").hidden = !model.conditional;
  fill(element("grid-class"), classOptions(model));
  const rows = model.conditional ? Math.min(MOST_ROWS, model.class_names.length) : 1;
  for (const [id, max] of [["grid-rows", rows], ["grid-columns", columns]]) {
    const input = Object.assign(element(id), { max });
    input.value = within(input); // which somebody may have changed already
  }
  element("grid-go").addEventListener("click", () => make(model, page));
  element("grid-go").ariaDisabled = "false";
  // What is shown, or about to be, stays until there is more.
  const change = () => !urls.length && element("grid-go").ariaDisabled !== "true" && drawEmpty(model);
  for (const id of ["grid-rows", "grid-columns", "grid-class"]) element(id).addEventListener("input", change);
  drawEmpty(model);
}

/** Lay the grid out; returns what each row asks for, and its line of the table. */
function drawEmpty(model) {
  const [rows, columns] = ["grid-rows", "grid-columns"].map((id) => within(element(id)));
  const begins = { ...usualOpening(model), n: columns, seed: plainSeed(element("grid-seed").value || "0") };
  if (element("grid-to").value) begins.to_seed = plainSeed(element("grid-to").value);
  const first = Number(element("grid-class").value);
  const asked = Array.from({ length: model.conditional ? Math.min(rows, model.class_names.length - first) : 1 }, (_, row) =>
    model.conditional ? { ...begins, class_label: first + row } : begins,
  );
  const table = document.createElement("table");
  element("cells").replaceChildren(table);
  return asked.map((parameters) => [parameters, addLine(table, parameters, columns, model)]);
}

const within = (input) => Math.max(1, Math.min(Number(input.max), Math.floor(Number(input.value)) || 1));

async function make(model, page) {
  const button = element("grid-go");
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true";
  watching?.abort();
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [];
  const lines = drawEmpty(model);
  element("grid-status").textContent = `Making ${lines.length} × ${lines[0][0].n} images…`;
  const problem = await askAll(lines.flatMap(([parameters, line]) => requestsOf(line, parameters)), model, page);
  element("grid-status").textContent = problem ? `Some images are missing: ${problem}.` : "Done. Choose an image to see how it formed.";
  button.ariaDisabled = "false";
}

function addLine(table, { class_label: label }, columns, model) {
  const line = table.insertRow();
  const head = Object.assign(document.createElement("th"), { scope: "row", textContent: model.class_names[label] ?? "images" });
  line.append(head);
  for (let column = 0; column < columns; column++) line.insertCell();
  return line;
}

// The requests for a line of the table: [cells, parameters] each.
function requestsOf(line, parameters) {
  const cells = [...line.cells].slice(1);
  if (parameters.to_seed === undefined) return [[cells, parameters]];
  const share = (column) => column / Math.max(1, cells.length - 1);
  return cells.map((cell, column) => [[cell], { ...parameters, n: 1, mix: share(column) }]);
}

// What went wrong, or undefined.
async function askAll(requests, model, page) {
  const left = [...requests];
  let problem;
  async function goOn() {
    while (left.length) {
      const [cells, parameters] = left.shift();
      try {
        await askImages(cells, parameters, model, page);
      } catch (error) {
        problem ??= reason(error);
      }
    }
  }
  await Promise.all(Array.from({ length: AT_ONCE }, goOn));
  return problem;
}

async function askImages(cells, parameters, model, page) {
  const response = await post("sample", requestOf(parameters, model), "application/json");
  const { images } = parse(await response.text());
  images.forEach((image, k) => addImage(cells[k], image, parameters, model, page));
}

function addImage(cell, { png, index }, parameters, model, page) {
  const url = URL.createObjectURL(toBlob(png));
  urls.push(url);
  const alone = { ...parameters, n: 1, index };
  const button = document.createElement("button");
  Object.assign(button, { type: "button", ariaLabel: `Watch ${describe(alone)}` });
  button.append(Object.assign(new Image(), { src: url, alt: "" }));
  button.addEventListener("click", () => watch(alone, model, page));
  cell.replaceChildren(button);
}

async function watch(alone, model, page) {
  watching?.abort();
  const { signal } = (watching = new AbortController());
  element("grid-status").textContent = "Fetching its frames…";
  try {
    const path = await askPath(alone, model, signal);
    if (signal.aborted) return;
    page.watch(path, alone);
    page.fillFrom(alone);
    element("grid-status").textContent = "";
  } catch (error) {
    if (signal.aborted) return;
    element("grid-status").textContent = `It cannot be shown: ${reason(error)}.`;
  }
}
