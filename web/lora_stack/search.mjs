/**
 * A flat search through file names that forgives gaps: every word of the query has to be found, letters
 * in their order.
 *
 * @typedef {{name: string, score: number, marks: number[]}} Hit  `marks`: places of matched letters.
 */

import { slashed } from "./rows.mjs";

/**
 * Files that match, the best first; all of them in their order for an empty query.
 * @param {string} query
 * @param {string[]} names
 * @returns {Hit[]}
 */
export function search(query, names) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  /** @type {Hit[]} */
  const hits = [];
  for (const name of names) {
    const text = slashed(name).toLowerCase();
    const parts = words.map((word) => match(word, text));
    if (parts.some((part) => part === null)) continue;
    const found = /** @type {{score: number, marks: number[]}[]} */ (parts);
    const score = found.reduce((sum, part) => sum + part.score, 0);
    hits.push({ name, score, marks: [...new Set(found.flatMap((part) => part.marks))] });
  }
  // sort is stable: equal ones stay in the list's order
  return words.length ? hits.sort((a, b) => b.score - a.score) : hits;
}

/**
 * How well a word is found in a text: as a whole at the start of a word, anywhere, or with gaps.
 * @param {string} word
 * @param {string} text
 */
function match(word, text) {
  const file = text.lastIndexOf("/") + 1;
  const whole = bestWhole(word, text, file);
  if (whole !== null) return whole;
  return withGaps(word, text, file) ?? withGaps(word, text, 0);
}

/**
 * @param {string} word
 * @param {string} text
 * @param {number} file  Where the file's name starts: it counts more than folders.
 */
function bestWhole(word, text, file) {
  let best = null;
  for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + 1)) {
    const score =
      100 + (startsWord(text, at) ? 40 : 0) + (at >= file ? 20 : 0) + (at === file ? 20 : 0);
    const shortness = word.length / text.length;
    if (best === null || score + shortness > best.score) {
      best = { score: score + shortness, marks: [...word].map((_, place) => at + place) };
    }
  }
  return best;
}

/**
 * @param {string} word
 * @param {string} text
 * @param {number} from
 */
function withGaps(word, text, from) {
  const marks = [];
  let score = 0;
  let at = from - 1;
  for (const letter of word) {
    const next = text.indexOf(letter, at + 1);
    if (next < 0) return null;
    score += next === at + 1 ? 5 : startsWord(text, next) ? 4 : 1;
    marks.push(next);
    at = next;
  }
  const spread = marks[marks.length - 1] - marks[0] + 1;
  return { score: score - Math.min(spread - word.length, 20) * 0.2, marks };
}

/**
 * @param {string} text
 * @param {number} at
 */
function startsWord(text, at) {
  return at === 0 || /[\s/_\-.()[\]]/.test(text[at - 1]);
}
