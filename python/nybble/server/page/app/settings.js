// The settings of each model, which the browser keeps, and their dialog.

import { $, kept } from "./dom.js";
import { reasoningOf } from "./api.js";

/** Parameters that are numbers, with the values that the server uses if they are left out. */
const NUMBERS = {
  temperature: "0.8", top_p: "0.95", min_p: "0.05", repetition_penalty: "1", top_k: "40", max_tokens: "", seed: "",
};
const OTHERS = ["system", "reasoning", "effort"];
const NAMES = [...Object.keys(NUMBERS), ...OTHERS];

const KEY = "nybble.models";
/** Where earlier versions kept one set for all models. */
const FORMER_KEY = "nybble.settings";

let model = "";

const parsed = key => { try { return JSON.parse(kept.get(key)) ?? {}; } catch { return {}; } };
const fieldsOf = name => document.querySelectorAll(`[data-setting="${name}"]`);

/** The settings of a model that differ from the defaults, as text by name. */
function settingsOf(name) {
  const found = parsed(KEY)[name] ?? parsed(FORMER_KEY);
  return Object.fromEntries(NAMES.filter(each => typeof found[each] === "string" && found[each] !== "").map(each => [each, found[each]]));
}

/** Keeps the settings of a model. Other tabs may have changed those of other models. */
function keep(name, values) {
  const all = parsed(KEY);
  // An empty set means the defaults, and not the former settings.
  all[name] = Object.fromEntries(Object.entries(values).filter(([, value]) => value !== ""));
  kept.set(KEY, JSON.stringify(all));
}

/** Shows the settings of a model. */
export function useModel(card) {
  model = card.id;
  $("max_tokens").max = card.context_length ?? "";
  $("settings-model").textContent = card.id;
  show(settingsOf(model));
}

function show(values) {
  for (const name of NAMES) {
    const value = values[name] ?? "";
    if ($(name).value !== value) $(name).value = value;  // Typing is not interrupted.
    showValue(name);
  }
}

/** Brings the slider and the number of a setting together. An empty number is the default, at which the slider rests. */
function showValue(name, changed = $(name)) {
  for (const field of fieldsOf(name)) {
    if (field === changed) continue;
    if (field.type === "range") field.value = changed.value === "" ? NUMBERS[name] : changed.value;
    else field.value = changed.value;
  }
  const field = $(name);
  if (!(name in NUMBERS)) return;
  field.setAttribute("aria-invalid", String(!field.checkValidity()));
  $(`${name}-fault`).textContent = field.checkValidity() ? "" : faultOf(field);
}

function faultOf(field) {
  const { min, max, step } = field;
  const range = max ? `from ${min} to ${Number(max).toLocaleString("en")}` : `of ${min} or more`;
  return `Not used: expected a ${step === "1" ? "whole number" : "number"} ${range}.`;
}

/** The parameters of a request by these settings. Those that are not set are left to the server. */
export function parameters() {
  const values = {};
  for (const name of Object.keys(NUMBERS)) {
    const field = $(name);
    if (field.value !== "" && field.checkValidity()) values[name] = Number(field.value);
  }
  if ($("reasoning").value) values.enable_thinking = $("reasoning").value === "on";
  if ($("effort").value && values.enable_thinking !== false) values.reasoning_effort = $("effort").value;
  return values;
}

export const systemPrompt = () => $("system").value.trim();

/** Offers what the template of the model knows. */
async function showReasoning() {
  const asked = model;
  let known = { toggle: false, effort: false };
  try { known = await reasoningOf(asked); } catch { /* The dialog offers no switches if the server sends no template. */ }
  if (asked !== model) return;
  // A value that was set before remains visible, so that it can be changed.
  $("reasoning-row").hidden = !known.toggle && !$("reasoning").value;
  $("effort-row").hidden = !known.effort && !$("effort").value;
}

/** Connects the dialog. */
export function connectSettings() {
  const dialog = $("settings");
  dialog.addEventListener("input", event => {
    const name = event.target.dataset.setting;
    if (!name) return;
    showValue(name, event.target);
    keep(model, { ...settingsOf(model), [name]: $(name).value });
  });
  addEventListener("storage", event => { if (event.key === KEY) show(settingsOf(model)); });  // Another tab has changed them.
  $("defaults").onclick = () => { show({}); keep(model, {}); };
  $("open").onclick = () => { showReasoning(); dialog.showModal(); };
  $("close").onclick = () => dialog.close();
  dialog.onclick = event => { if (event.target === dialog && event.offsetX < 0) dialog.close(); };
}
