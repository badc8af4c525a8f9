/**
 * LoRAs as prompts name them: <lora:name:model strength:clip strength>, or with te= and unet=.
 *
 * @typedef {import("./rows.mjs").Row} Row
 */

import { compact } from "./numbers.mjs";
import { clipOf, folderOf, slashed, stem, withoutEnding } from "./rows.mjs";

const TAG = /<lora:([^<>]+)>/gi;

/**
 * Rows for all that a text names; `names` are the files there are. A name without a file is kept as it
 * is: its row shows that it is missing.
 * @param {string} text
 * @param {string[]} names
 * @returns {Partial<Row>[]}
 */
export function parseLoraText(text, names) {
  return [...text.matchAll(TAG)].map((match) => {
    const [name, ...parts] = match[1].split(":").map((part) => part.trim());
    const [model, clip] = strengths(parts.filter(Boolean));
    return { name: fileOf(name, names), model, ...(clip === model ? {} : { clip }) };
  });
}

/**
 * The model's and the text encoder's strength. A1111's order of `te=` and `unet=` does not matter.
 * @param {string[]} parts
 */
function strengths(parts) {
  const plain = parts
    .filter((part) => !part.includes("="))
    .map(Number)
    .filter(Number.isFinite);
  const named = Object.fromEntries(
    parts.filter((part) => part.includes("=")).map((part) => part.split("=")),
  );
  const clip = number(named.te);
  const model = plain[0] ?? number(named.unet) ?? clip ?? 1;
  return [number(named.unet) ?? model, plain[1] ?? clip ?? model];
}

/** @param {string | undefined} text */
function number(text) {
  const value = Number(text);
  return text?.trim() && Number.isFinite(value) ? value : undefined;
}

/**
 * The file that a prompt's name means: the path, the path without its ending, or the file's own name
 * where no folder is named.
 * @param {string} name
 * @param {string[]} names
 */
function fileOf(name, names) {
  const wanted = slashed(name).toLowerCase();
  const bare = withoutEnding(wanted);
  const found =
    names.find((one) => slashed(one).toLowerCase() === wanted) ??
    names.find((one) => withoutEnding(slashed(one).toLowerCase()) === bare) ??
    (folderOf(wanted) ? undefined : names.find((one) => stem(one).toLowerCase() === stem(bare)));
  return found === undefined ? name : slashed(found);
}

/**
 * The rows that are on as text, one after the other.
 * @param {Row[]} rows
 */
export function formatLoraText(rows) {
  return rows
    .filter((row) => row.on && row.name)
    .map((row) => {
      const clip = clipOf(row) === row.model ? "" : `:${compact(clipOf(row))}`;
      return `<lora:${slashed(row.name).replace(/\.safetensors$/i, "")}:${compact(row.model)}${clip}>`;
    })
    .join(" ");
}
