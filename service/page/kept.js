// What this tab keeps of each model until it is closed. Other weights under the same name are another model.

import { root } from "./api.js";

const key = ({ name, weights_hash: weights }, what) => `tminus ${root.pathname} ${name} ${weights} ${what}`;

export const recall = (model, what) => JSON.parse(sessionStorage.getItem(key(model, what)));
export const keep = (model, what, value) => sessionStorage.setItem(key(model, what), JSON.stringify(value));
