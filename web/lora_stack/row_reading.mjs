/**
 * The rows of a stack as they are read from JSON, by our node and by others'. The same rules as
 * lora_core/stack_rows.py.
 *
 * @typedef {import("./rows.mjs").Row} Row
 * @typedef {import("./rows.mjs").Stack} Stack
 */

import { emptyStack } from "./rows.mjs";

/** Our key of a row, and how core, rgthree and Lora Manager spell it. The first that is there counts. */
const SPELLINGS = {
  name: ["name", "lora_name", "lora"],
  model: ["model", "strength_model", "strength"],
  clip: ["clip", "strength_clip", "clipStrength", "strengthTwo"],
  on: ["on", "enabled", "active"],
};

const NONE = "None"; // what other packs call a row without a LoRA

/**
 * The stack of a widget's value: JSON text, an object, or {"__value__": rows}.
 * Throws SyntaxError or TypeError for what can't be read.
 * @param {unknown} value
 * @returns {Stack}
 */
export function parse(value) {
  const given = typeof value === "string" ? (value.trim() ? JSON.parse(value) : []) : value;
  if (Array.isArray(given)) return { ...emptyStack(), rows: given.map(readRow) };
  if (!isObject(given)) throw new TypeError("rows are no object");
  if ("__value__" in given) return parse(given.__value__);
  if (Array.isArray(given.rows)) return { ...given, ...emptyStack(), rows: given.rows.map(readRow) };
  const inputs = inputsOfOthers(given);
  if (!inputs.length && !Array.isArray(given.loras) && Object.keys(given).length)
    throw new TypeError("rows are missing");
  return { ...emptyStack(), rows: inputs.map(readRow) };
}

/**
 * The rows in the inputs of other packs' nodes as a prompt has them.
 * @param {Record<string, unknown>} inputs
 * @returns {unknown[]}
 */
function inputsOfOthers(inputs) {
  /** @type {Record<number, Record<string, unknown>>} */
  const core = {}; // {"loras.0.lora_name": ..., "loras.0.strength": ...}
  for (const [name, value] of Object.entries(inputs)) {
    const [, place, key] = /^loras\.(\d+)\.(\w+)$/.exec(name) ?? [];
    if (key) (core[Number(place)] ??= {})[key] = value;
  }
  if (Object.keys(core).length) return Object.values(core); // by number
  if (Array.isArray(inputs.loras)) return inputs.loras;
  return Object.keys(inputs) // rgthree's: {"lora_1": {...}, "lora_2": {...}}
    .filter((key) => key.startsWith("lora_") && isObject(inputs[key]))
    .map((key) => inputs[key]);
}

/**
 * @param {unknown} given
 * @returns {Row}
 */
function readRow(given) {
  if (!isObject(given)) throw new TypeError("a row is no object");
  const spelled = new Set(Object.values(SPELLINGS).flat());
  const others = Object.fromEntries(
    Object.entries(given).filter(([key, value]) => !spelled.has(key) && !saysNothing(key, value)),
  );
  for (const weight of isObject(others.blocks) ? Object.values(others.blocks) : []) {
    if (typeof weight !== "number" || !Number.isFinite(weight))
      throw new TypeError(`a block weight is ${weight}`);
  }
  const model = toNumber(first(given, "model"), 1);
  const clip = first(given, "clip");
  const name = String(first(given, "name") ?? "");
  const none = name.trim() === NONE;
  const row = { on: !none && first(given, "on") !== false, name: none ? "" : name, model };
  return { ...row, ...(clip === undefined ? {} : { clip: toNumber(clip, model) }), ...others };
}

/**
 * Whether these are block weights or a schedule that change nothing: programs write null or "".
 * @param {string} key
 * @param {unknown} value
 */
function saysNothing(key, value) {
  if (key !== "blocks" && key !== "schedule") return false;
  if (typeof value === "string")
    return value.trim() === "" || (key === "blocks" && /^\s*(\[\s*\]|\{\s*\})\s*$/.test(value));
  return value === null || (typeof value === "object" && Object.keys(value ?? {}).length === 0);
}

/**
 * @param {Record<string, unknown>} given
 * @param {keyof typeof SPELLINGS} key
 */
function first(given, key) {
  const spelling = SPELLINGS[key].find((name) => given[name] !== undefined && given[name] !== null);
  return spelling === undefined ? undefined : given[spelling];
}

/**
 * @param {unknown} value
 * @param {number} otherwise
 */
function toNumber(value, otherwise) {
  const number = typeof value === "boolean" ? NaN : Number(value ?? otherwise);
  if (!Number.isFinite(number)) throw new TypeError(`a strength is ${value}`);
  return number;
}

/**
 * @param {unknown} value
 * @returns {value is Record<string, unknown>}
 */
function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
