// The menu of the models that are served. Each has a page of its own, which choosing it opens.

import { element, getJson, keep, nameInAddress, recall, root } from "./api.js";

const menu = element("models");
let models = []; // that were served when the server was last asked
let here = nameInAddress; // the model of this page; the default page learns its name from the list

async function look() {
  const all = (await getJson(new URL("models", root))).models;
  models = all.filter(({ model }) => model); // one that is out of memory is loaded when it is asked for
  here ??= models.find((each) => each.default).name;
}

const find = (name) => models.find((each) => each.name === name)?.model;
const pageOf = (name, hash) => new URL(`models/${name}/${hash}`, root);

// Shown where there is anything to choose, and then for as long as the page is open. No list: all stays as it is.
export async function showMenu() {
  await look().catch(() => {});
  const options = models.map(({ name }) => [name, name]);
  if (here && !find(here)) options.unshift([here, `${here} (not loaded)`]);
  if (!models.length || (menu.options.length === 0 && options.length < 2)) return;
  const same = String(options) === String([...menu.options].map(({ value, text }) => [value, text]));
  if (!same) menu.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === here)));
  element("models-field").hidden = false;
  document.title = `tminus: ${here}`;
}

// Show a job of another model on that one's page. False: it is not served.
export async function openPageOf(name, hash) {
  await look();
  if (!find(name)) return false;
  location.replace(pageOf(name, hash));
  return true;
}

menu.addEventListener("focus", showMenu);
menu.addEventListener("change", () => {
  const [left, chosen] = [find(here), find(menu.value)];
  if (left) keep(left, "address", location.hash); // names the job that is shown, for when one comes back
  if (chosen) location.assign(pageOf(menu.value, recall(chosen, "address") ?? ""));
});
addEventListener("pageshow", () => (menu.value = here)); // a page that one goes back to may show what was chosen on it
element("metrics").href = new URL("metrics", root); // of the whole server
