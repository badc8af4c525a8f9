/**
 * Weights of a model's blocks by name. The most exact name counts: a block ("IN04"), a range ("IN4-8"),
 * a kind ("OUT"), all of them ("ALL"). The same rules as lora_core/blocks.py.
 *
 * @typedef {import("./rows.mjs").BlockWeights} BlockWeights
 */

import { compact } from "./numbers.mjs";

const NAME = /^([A-Z]+)(?:(\d{1,4})(?:-[A-Z]*(\d{1,4}))?)?$/;
const PRESET_NAME = /^[^=,;\n]*:(?=[^=,;\n]*=)/; // before "name=weight"
/** @type {Record<string, string>} */
const SPELLINGS = { M: "MID", M00: "MID", "*": "ALL", DEFAULT: "ALL", "%DEFAULT": "ALL" };

/**
 * A name in our spelling: "in4" is IN04.
 * @param {string} name
 */
export function canonical(name) {
  const upper = name.trim().toUpperCase();
  const spelled = SPELLINGS[upper] ?? upper;
  const match = NAME.exec(spelled);
  if (!match || match[2] === undefined) return spelled;
  const two = (/** @type {string} */ digits) => String(Number(digits)).padStart(2, "0");
  return match[1] + two(match[2]) + (match[3] === undefined ? "" : `-${two(match[3])}`);
}

/**
 * The weight of a block; 1 where nothing names it.
 * @param {BlockWeights} weights
 * @param {string} block
 */
export function weightOf(weights, block) {
  let best = 0;
  let weight = 1;
  for (const [name, value] of Object.entries(weights)) {
    const exactness = exactnessOf(canonical(name), block);
    if (exactness > best) [best, weight] = [exactness, value];
  }
  return weight;
}

/**
 * @param {string} name
 * @param {string} block
 */
function exactnessOf(name, block) {
  if (name === block) return 4;
  if (name === "ALL") return 1;
  const [match, own] = [NAME.exec(name), NAME.exec(block)];
  if (!match || !own || match[1] !== own[1]) return 0;
  if (match[2] === undefined) return 2;
  if (match[3] === undefined || own[2] === undefined) return 0;
  const at = Number(own[2]);
  return Number(match[2]) <= at && at <= Number(match[3]) ? 3 : 0;
}

/**
 * The weights with one block set; a name that then says nothing new is left out.
 * @param {BlockWeights} weights
 * @param {string} block
 * @param {number} value
 * @returns {BlockWeights}
 */
export function withBlock(weights, block, value) {
  const others = Object.fromEntries(
    Object.entries(weights).filter(([name]) => canonical(name) !== block),
  );
  return weightOf(others, block) === value ? others : { ...others, [block]: value };
}

/**
 * The number of `blocks` whose weight is not 1.
 * @param {BlockWeights} weights
 * @param {string[]} blocks
 */
export function changedBlocks(weights, blocks) {
  return blocks.filter((block) => weightOf(weights, block) !== 1).length;
}

/**
 * Blocks by kind, in their order: [["IN", ["IN01", "IN02"]], ["MID", ["MID00"]], ...].
 * @param {string[]} blocks
 * @returns {[kind: string, blocks: string[]][]}
 */
export function byKind(blocks) {
  /** @type {Map<string, string[]>} */
  const kinds = new Map();
  for (const block of blocks) {
    const kind = block.replace(/\d+$/, "");
    kinds.set(kind, [...(kinds.get(kind) ?? []), block]);
  }
  return [...kinds];
}

/**
 * "IN04=0.5, OUT=0.8"
 * @param {BlockWeights} weights
 */
export function formatBlocks(weights) {
  return Object.entries(weights)
    .map(([name, value]) => `${name}=${compact(value)}`)
    .join(", ");
}

/**
 * What was typed or pasted: weights by name, as JSON or "IN04=0.5, OUT:0.8", or the text of a number
 * vector, which the server turns to names; `problem` is the part that can't be read.
 * @param {string} text
 * @returns {{weights: BlockWeights} | {vector: string} | {problem: string}}
 */
export function parseBlocks(text) {
  const trimmed = text.trim();
  if (trimmed.startsWith("{")) return fromJson(trimmed);
  const parts = trimmed
    .replace(/^\[|\]$/g, "")
    .replace(PRESET_NAME, "")
    .split(/[,;\n]/)
    .map((part) => part.trim())
    .filter(Boolean);
  const rest = parts.slice(1);
  if (rest.length && !trimmed.includes("=") && !rest.some((part) => part.includes(":"))) {
    const numbers = parts.map((part) => part.slice(part.lastIndexOf(":") + 1));
    const problem = numbers.find((part) => !isNumber(part));
    return problem === undefined
      ? { vector: numbers.map((part) => part.trim()).join(",") }
      : { problem };
  }
  /** @type {BlockWeights} */
  const weights = {};
  for (const part of parts) {
    const match = /^([^=:]+)[=:]\s*(.+)$/.exec(part);
    if (!match || !isNumber(match[2]) || !NAME.test(canonical(match[1]))) return { problem: part };
    weights[canonical(match[1])] = Number(match[2]);
  }
  return { weights };
}

/** @param {string} text */
function fromJson(text) {
  try {
    /** @type {BlockWeights} */
    const weights = {};
    for (const [name, value] of Object.entries(JSON.parse(text))) {
      if (!Number.isFinite(value) || !NAME.test(canonical(name))) return { problem: name };
      weights[canonical(name)] = value;
    }
    return { weights };
  } catch {
    return { problem: text };
  }
}

/** @param {string} text */
function isNumber(text) {
  return text.trim() !== "" && Number.isFinite(Number(text));
}
