/** What a panel draws of its files: known at once, or asked for and drawn when the answer comes. */

export class FileFacts {
  /**
   * @param {import("./library.mjs").Library} library
   * @param {() => void} changed
   */
  constructor(library, changed) {
    this.library = library;
    this.changed = changed;
    /** @type {Map<string, import("./library.mjs").LoraInfo | null>} */
    this.infos = new Map();
    /** @type {Map<string, string | null>} */
    this.nearests = new Map();
  }

  clear() {
    this.infos.clear();
    this.nearests.clear();
  }

  /**
   * What a file is; null as long as that is not known.
   * @param {string} name
   */
  info(name) {
    if (!this.library.has(name)) return null;
    return this.ask(this.infos, name, () => this.library.info(name));
  }

  /**
   * The nearest name to one that is missing; null as long as none is known.
   * @param {string} name
   */
  nearest(name) {
    return this.ask(this.nearests, name, () => this.library.nearest(name));
  }

  /**
   * @template T
   * @param {Map<string, T | null>} known
   * @param {string} name
   * @param {() => Promise<T>} question
   * @returns {T | null}
   */
  ask(known, name, question) {
    if (!known.has(name)) {
      known.set(name, null);
      question().then(
        (answer) => {
          known.set(name, answer);
          this.changed();
        },
        () => {}, // nothing is drawn then; the card on hover tells why
      );
    }
    return known.get(name) ?? null;
  }
}
