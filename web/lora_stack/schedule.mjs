/**
 * Strengths that change while sampling: "0:0, 0.3:1, 1:0.5", positions from 0 to 1.
 * The same rules as lora_core/schedule.py.
 *
 * @typedef {[position: number, factor: number]} Point
 */

/**
 * @param {string} text
 * @returns {{points: Point[], problems: {kind: "point" | "range" | "order", part: string}[]}}
 */
export function parseSchedule(text) {
  /** @type {Point[]} */
  const points = [];
  /** @type {{kind: "point" | "range" | "order", part: string}[]} */
  const problems = [];
  const parts = text.split(/[,;\n]/).map((part) => part.trim());
  for (const part of parts.filter(Boolean)) {
    const [place, factor, ...rest] = part.split(":").map((side) => side.trim());
    const point = /** @type {Point} */ ([Number(place), Number(factor)]);
    if (!place || !factor || rest.length || !point.every(Number.isFinite)) {
      problems.push({ kind: "point", part });
    } else if (point[0] < 0 || point[0] > 1) {
      problems.push({ kind: "range", part });
    } else {
      if (points.length && points[points.length - 1][0] > point[0])
        problems.push({ kind: "order", part });
      points.push(point);
    }
  }
  return { points, problems };
}

/**
 * The SVG path of a schedule in a box, and the range of factors that it shows (0 is always in it).
 * @param {Point[]} points
 * @param {number} width
 * @param {number} height
 */
export function curve(points, width, height) {
  const factors = points.map((point) => point[1]);
  const low = Math.min(0, ...factors);
  const high = Math.max(1, ...factors);
  const x = (/** @type {number} */ place) => round(place * width);
  const y = (/** @type {number} */ factor) =>
    round(height - ((factor - low) / (high - low)) * height);
  if (!points.length) return { path: `M0 ${y(1)}H${width}`, low, high };
  const [first, last] = [points[0], points[points.length - 1]];
  const line = points.map((point) => `L${x(point[0])} ${y(point[1])}`).join("");
  return { path: `M0 ${y(first[1])}${line}L${width} ${y(last[1])}`, low, high };
}

/** @param {number} value */
function round(value) {
  return Math.round(value * 100) / 100;
}
