/** Numbers as people drag, roll and type them. */

export const LIMITS = { min: -100, max: 100 };
const PIXELS_A_STEP = 4;
const STEPS = { plain: 0.05, fine: 0.01, coarse: 0.5 };

/**
 * @typedef {{shiftKey?: boolean, ctrlKey?: boolean, metaKey?: boolean}} Keys
 * Shift makes steps of 0.01, ctrl of 0.5; else they are 0.05.
 */

/** @param {Keys} keys */
export function stepOf(keys) {
  if (keys.shiftKey) return STEPS.fine;
  return keys.ctrlKey || keys.metaKey ? STEPS.coarse : STEPS.plain;
}

/**
 * The value after a drag of `pixels`, on multiples of the step as seen from the start.
 * @param {number} start
 * @param {number} pixels
 * @param {Keys} keys
 */
export function dragged(start, pixels, keys) {
  return clamp(start + Math.trunc(pixels / PIXELS_A_STEP) * stepOf(keys));
}

/**
 * The value some steps further; from between two multiples of the step it goes to the next one.
 * @param {number} value
 * @param {number} steps
 * @param {Keys} keys
 */
export function stepped(value, steps, keys) {
  const step = stepOf(keys);
  const place = value / step;
  const base = steps > 0 ? Math.floor(place + 1e-6) : Math.ceil(place - 1e-6);
  return clamp((base + steps) * step);
}

/**
 * What was typed: "0.8", "0,8", "80%", ".8"; NaN for anything else.
 * @param {string} text
 */
export function typed(text) {
  const match = /^\s*([+-]?(?:\d+(?:[.,]\d*)?|[.,]\d+))\s*(%?)\s*$/.exec(text);
  if (!match) return NaN;
  return clamp(Number(match[1].replace(",", ".")) / (match[2] ? 100 : 1));
}

/** @param {number} value */
export function clamp(value) {
  const rounded = Math.round(value * 10000) / 10000;
  return Math.max(LIMITS.min, Math.min(LIMITS.max, rounded)) || 0; // || 0: no negative zero
}

/**
 * With two decimals, or as many as it has.
 * @param {number} value
 */
export function shown(value) {
  const text = value.toFixed(2);
  return Math.abs(Number(text) - value) < 5e-5 ? text : compact(value);
}

/**
 * As short as it goes, to four decimals.
 * @param {number} value
 */
export function compact(value) {
  return String(Number(value.toFixed(4)) || 0);
}

/**
 * "37 %"; "<1 %" for a little.
 * @param {number} share
 */
export function percent(share) {
  return share > 0 && share < 0.005 ? "<1%" : `${Math.round(share * 100)}%`;
}
