/**
 * What executions tell about the rows. It belongs to the rows and the blend that were queued: several
 * prompts may wait, and the rows may have changed since.
 *
 * @typedef {{[label: string]: number} | {with: string, cosine: number}[]} Cosines
 * @typedef {{row: number, model: number, clip: number, share: number, cosines?: Cosines}} RowFigures
 * @typedef {{rows?: RowFigures[], source?: string}} Told  `source`: the rows as the node got them.
 */

const REMEMBERED = 64; // prompts that wait

export class Figures {
  constructor() {
    /** @type {Map<string, string>}  The panel's state by the rows that were sent. */
    this.sent = new Map();
    /** @type {string | null}  The state when rows were last sent. */
    this.last = null;
    /** @type {{state: string, rows: RowFigures[]} | null} */
    this.shown = null;
  }

  /**
   * The rows were sent.
   * @param {string} text
   * @param {string} state  All that their figures depend on, as far as the page knows.
   */
  queue(text, state) {
    this.sent.delete(text);
    this.sent.set(text, state);
    this.last = state;
    const [oldest] = this.sent.keys();
    if (this.sent.size > REMEMBERED) this.sent.delete(oldest);
  }

  /**
   * An execution has told.
   * @param {Told} told
   * @param {string} text  The rows now.
   * @param {string} state  The state now.
   */
  take(told, text, state) {
    const { rows = [], source } = told;
    const unsent = source === undefined || source === text ? state : null; // as after a reload
    const sent = source === undefined ? this.last : this.sent.get(source);
    const of = sent ?? unsent;
    if (of !== null) this.shown = { rows, state: of };
  }

  /**
   * The figures that are true of a state.
   * @param {string} state
   */
  of(state) {
    return this.shown?.state === state ? this.shown.rows : [];
  }
}

/**
 * Labels of other LoRAs with the cosine to each. Two may have the same label.
 * @param {Cosines | undefined} cosines
 * @returns {[string, number][]}
 */
export function cosinesOf(cosines) {
  if (Array.isArray(cosines)) return cosines.map((one) => [one.with, one.cosine]);
  return Object.entries(cosines ?? {});
}
