// A few settings to begin with, each a button that fills in the form.

import { element } from "./api.js";
import { fillFrom, guidable, isSame, parameters } from "./form.js";

const STRONG = 5, FEW = 8;

/** @returns {Object<string, [string, object]>} by name: what it is for, and parameters */
function presetsOf(model) {
  const best = model.recommended ?? { sampler: model.default_sampler, steps: model.num_timesteps, guidance: 1 };
  const table = model.tables.filter(({ guidance }) => guidance === 1).sort((a, b) => a.steps - b.steps)[0] ?? model.tables[0];
  const fewest = table
    ? { sampler: table.sampler, steps: table.steps, guidance: table.guidance }
    : { sampler: model.samplers.includes("unipc") ? "unipc" : model.default_sampler, steps: FEW };
  const presets = {
    Best: ["What the checkpoint recommends", best],
  };
  if (!isSame(fewest, best)) presets.Fast = ["As few steps as still give good images", fewest];
  if (model.samplers.includes("ddpm")) {
    const all = { sampler: "ddpm", steps: model.num_timesteps, n: 1 };
    presets["Every step"] = ["DDPM as it was published: all steps, to watch", all];
  }
  if (model.conditional && model.null_class !== null) {
    presets.Guided = ["Pushed hard towards the class", { ...guidable(best), guidance: STRONG }];
  }
  return presets;
}

export function showPresets(model) {
  element("presets").replaceChildren(
    ...Object.entries(presetsOf(model)).map(([name, [title, given]]) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: name, title });
      button.className = "chip";
      button.addEventListener("click", () => {
        const { class_label, seed, n, guidance } = parameters();
        fillFrom({ class_label, seed, n, guidance, ...given });
      });
      return button;
    }),
  );
}
