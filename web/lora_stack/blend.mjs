/**
 * What becomes of the strengths, as far as the rows alone tell. The server knows the rest: LoRAs that
 * come in by sockets, and the norms that equal energy needs.
 *
 * @typedef {import("./rows.mjs").Row} Row
 */

import { clipOf } from "./rows.mjs";

/**
 * |strength| / sum |strength| of the rows that are on; zeros for the others.
 * @param {Row[]} rows
 */
export function shares(rows) {
  const sizes = rows.map((row) => (row.on ? Math.abs(row.model) : 0));
  const whole = sizes.reduce((sum, size) => sum + size, 0);
  return sizes.map((size) => (whole ? size / whole : 0));
}

/**
 * The strengths that are used, after blending by `rule` and times `master`: for each row those of the
 * model and of the text encoder, or null where it is off or only the server knows.
 * @param {Row[]} rows
 * @param {string} rule
 * @param {number} master
 * @returns {({model: number, clip: number} | null)[]}
 */
export function effective(rows, rule, master) {
  const on = rows.filter((row) => row.on);
  const model = scale(
    on.map((row) => row.model),
    rule,
  );
  const clip = scale(on.map(clipOf), rule);
  return rows.map((row) =>
    row.on && model !== null && clip !== null
      ? { model: row.model * model * master, clip: clipOf(row) * clip * master }
      : null,
  );
}

/**
 * The factor by which a rule changes strengths; 1 where all are 0, null where it is not known here.
 * @param {number[]} strengths
 * @param {string} rule
 */
function scale(strengths, rule) {
  const sizes = strengths.map(Math.abs);
  /** @type {Record<string, () => number>} */
  const wholes = {
    off: () => 1,
    "sum to 1": () => sizes.reduce((sum, size) => sum + size, 0),
    "max to 1": () => Math.max(0, ...sizes),
    "rms to 1": () =>
      Math.sqrt(sizes.reduce((sum, s) => sum + s * s, 0) / Math.max(1, sizes.length)),
  };
  if (!Object.hasOwn(wholes, rule)) return null;
  return 1 / (wholes[rule]() || 1);
}
