/** The editor of a row: sliders for the blocks of its family, and its schedule. */

import { byKind, canonical, formatBlocks, parseBlocks, weightOf, withBlock } from "./blocks.mjs";
import { h, openPopover, setAttribute, setText } from "./dom.mjs";
import { compact, stepOf, typed } from "./numbers.mjs";
import { stem } from "./rows.mjs";
import { scheduleEditor } from "./schedule_editor.mjs";
import { t } from "./texts.mjs";

const TOP = 2; // the weight at a slider's upper end

/**
 * @typedef {{
 *   row: import("./rows.mjs").Row, library: import("./library.mjs").Library,
 *   setBlocks: (blocks: import("./rows.mjs").BlockWeights, done: boolean) => void,
 *   setSchedule: (text: string) => void, closed?: () => void
 * }} EditorOptions
 */

/**
 * @param {Element} anchor
 * @param {EditorOptions} options
 */
export function openRowEditor(anchor, options) {
  const blocks = new BlockEditor(options);
  const content = h(
    "div",
    { class: "lw-editor" },
    h("div", { class: "lw-editor-title" }, stem(options.row.name)),
    blocks.element,
    scheduleEditor(options.row.schedule ?? "", options.setSchedule),
  );
  openPopover(anchor, content, { label: t("editBlocks"), align: "end", closed: options.closed });
  void blocks.load();
}

class BlockEditor {
  /** @param {EditorOptions} options */
  constructor(options) {
    this.options = options;
    /** @type {import("./rows.mjs").BlockWeights} */
    this.weights = {};
    this.unread = false; // the row's weights could not be read: `weights` are not its own
    /** @type {Map<string, HTMLElement>} */
    this.sliders = new Map();
    /** @type {Set<string> | null} The blocks that the file changes; null: not known. */
    this.changed = null;
    this.sliderBox = h("div", { class: "lw-sliders" });
    this.note = h("div", { class: "lw-note", role: "status" });
    /** @type {HTMLInputElement} */
    this.field = h("input", {
      class: "lw-field",
      type: "text",
      spellcheck: "false",
      placeholder: t("blocksPlaceholder"),
      "aria-label": t("blocks"),
      change: () => void this.take(this.field.value),
      keydown: (event) => event.key === "Enter" && this.field.blur(),
    });
    const reset = h(
      "button",
      { type: "button", class: "lw-text-button", click: () => this.set({}, true) },
      t("allOff"),
    );
    this.element = h(
      "section",
      { "aria-label": t("blocks") },
      h("div", { class: "lw-section-head" }, h("h3", {}, t("blocks")), reset),
      this.sliderBox,
      this.field,
      this.note,
    );
  }

  async load() {
    const { library, row } = this.options;
    const given = row.blocks;
    if (typeof given === "string" || Array.isArray(given)) await this.take(String(given), false);
    else this.weights = { ...given };
    const names = await library.info(row.name).then(
      (info) => {
        this.changed = new Set(info.blocks);
        return info.family_blocks;
      },
      () =>
        Object.keys(this.weights)
          .map(canonical)
          .filter((name) => /\d$|^BASE$/.test(name)),
    );
    if (!names.length && !this.unread) this.note.textContent = t("blocksNone");
    for (const [kind, blocks] of byKind(names)) this.sliderBox.append(this.kind(kind, blocks));
    this.show();
  }

  /**
   * @param {string} kind
   * @param {string[]} blocks
   */
  kind(kind, blocks) {
    const group = h("div", { class: "lw-kind", role: "group", "aria-label": kind });
    group.append(h("div", { class: "lw-kind-name" }, kind));
    const sliders = h(
      "div",
      { class: "lw-kind-sliders" },
      ...blocks.map((block) => this.slider(block)),
    );
    group.append(sliders);
    return group;
  }

  /** @param {string} block */
  slider(block) {
    const slider = h(
      "div",
      {
        class: "lw-slider",
        role: "slider",
        tabindex: 0,
        "aria-orientation": "vertical",
        "aria-valuemin": 0,
        "aria-valuemax": TOP,
        "aria-label": t("blockWeight", { block }),
        pointerdown: (event) => this.press(event),
        dblclick: () => this.setOne(block, 1, true),
        keydown: (event) => this.key(event, block),
      },
      h("span", { class: "lw-slider-value" }),
      h("span", { class: "lw-slider-track" }, h("span", { class: "lw-slider-fill" })),
      h("span", { class: "lw-slider-name" }, /\d+$/.exec(block)?.[0] ?? "·"),
    );
    slider.dataset.block = block;
    slider.classList.toggle("lw-absent", this.isAbsent(block));
    this.sliders.set(block, slider);
    return slider;
  }

  /** @param {string} block  Whether the file has nothing in it, so that its weight changes nothing. */
  isAbsent(block) {
    return this.changed !== null && !this.changed.has(block);
  }

  show() {
    this.sliderBox.classList.toggle("lw-disabled", this.unread);
    for (const [block, slider] of this.sliders) {
      setAttribute(slider, "aria-disabled", this.unread ? "true" : null);
      const weight = weightOf(this.weights, block);
      const height = Math.max(0, Math.min(weight / TOP, 1)) * 100;
      const fill = /** @type {HTMLElement} */ (slider.querySelector(".lw-slider-fill"));
      fill.style.height = `${height}%`;
      setText(/** @type {Element} */ (slider.querySelector(".lw-slider-value")), compact(weight));
      setAttribute(slider, "aria-valuenow", weight);
      slider.classList.toggle("lw-changed", weight !== 1);
      const absent = this.isAbsent(block) ? ` (${t("blockAbsent")})` : "";
      slider.title = `${block}: ${compact(weight)}${absent}`;
    }
    if (document.activeElement !== this.field && !this.unread)
      this.field.value = formatBlocks(this.weights);
  }

  /**
   * @param {import("./rows.mjs").BlockWeights} weights
   * @param {boolean} done
   */
  set(weights, done) {
    this.weights = weights;
    this.unread = false;
    this.note.textContent = "";
    this.field.classList.remove("lw-bad");
    this.options.setBlocks(weights, done);
    this.show();
  }

  /**
   * @param {string} block
   * @param {number} value
   * @param {boolean} done
   */
  setOne(block, value, done) {
    if (!this.unread) this.set(withBlock(this.weights, block, value), done);
  }

  /**
   * Take weights as text; numbers without names become names on the server.
   * @param {string} text
   * @param {boolean} [edits]  false: they are the row's own, which stay in it where they can't be read.
   */
  async take(text, edits = true) {
    const read = parseBlocks(text);
    try {
      if ("problem" in read) throw new Error(t("blocksBad", { part: read.problem }));
      const { library, row } = this.options;
      const weights =
        "vector" in read ? spoken(await library.vector(row.name, read.vector)) : read.weights;
      if (edits && !this.element.isConnected) return; // closed meanwhile
      if (edits) this.set(weights, true);
      else this.weights = weights;
      this.field.value = formatBlocks(weights);
    } catch (error) {
      const reason = /** @type {Error} */ (error).message;
      if (!edits) {
        this.unread = true;
        this.field.value = text;
      }
      this.note.textContent = this.unread ? t("blocksKept", { reason }) : reason;
      this.field.classList.add("lw-bad");
    }
  }

  /**
   * The place of the slider below a point, or -1.
   * @param {number} x
   * @param {number} y
   */
  sliderAt(x, y) {
    const margin = 12;
    return [...this.sliders.values()].findIndex((one) => {
      const box = one.getBoundingClientRect();
      return y > box.top - margin && y < box.bottom + margin && x >= box.left && x < box.right;
    });
  }

  /**
   * The weight that a slider has at a height of the page, in steps of 0.05.
   * @param {number} place
   * @param {number} y
   */
  valueAt(place, y) {
    const track = [...this.sliders.values()][place].querySelector(".lw-slider-track");
    const box = /** @type {Element} */ (track).getBoundingClientRect();
    return Math.round(Math.max(0, Math.min((box.bottom - y) / box.height, 1)) * TOP * 20) / 20;
  }

  /** @param {PointerEvent} event  Drags upright; across other sliders it paints them, too. */
  press(event) {
    if (event.button !== 0 || this.unread) return;
    const end = new AbortController();
    const options = { signal: end.signal };
    let last = -1;
    const paint = (/** @type {PointerEvent} */ at) => {
      const place = this.sliderAt(at.clientX, at.clientY);
      if (place < 0) return;
      const value = this.valueAt(place, at.clientY);
      const blocks = [...this.sliders.keys()];
      // a quick pointer leaves out sliders in between
      const [from, to] = last < 0 ? [place, place] : [Math.min(last, place), Math.max(last, place)];
      let weights = this.weights;
      for (const block of blocks.slice(from, to + 1)) {
        if (block !== blocks[last] || place === last) weights = withBlock(weights, block, value);
      }
      last = place;
      this.set(weights, false);
    };
    const from = [event.clientX, event.clientY];
    let moves = false;
    const move = (/** @type {PointerEvent} */ next) => {
      // a double click resets: its two presses must not set what is below them
      moves ||= Math.hypot(next.clientX - from[0], next.clientY - from[1]) > 2;
      if (moves) paint(next);
    };
    const drop = (/** @type {PointerEvent} */ released) => {
      end.abort();
      if (!moves) paint(released);
      this.set(this.weights, true);
    };
    const target = /** @type {HTMLElement} */ (event.currentTarget);
    target.focus({ preventScroll: true });
    this.sliderBox.setPointerCapture(event.pointerId);
    this.sliderBox.addEventListener("pointermove", move, options);
    this.sliderBox.addEventListener("pointerup", drop, options);
    this.sliderBox.addEventListener("pointercancel", () => end.abort(), options);
  }

  /**
   * @param {KeyboardEvent} event
   * @param {string} block
   */
  key(event, block) {
    const value = weightOf(this.weights, block);
    /** @type {Record<string, number>} */
    const values = {
      ArrowUp: value + stepOf(event),
      ArrowDown: value - stepOf(event),
      PageUp: value + 0.5,
      PageDown: value - 0.5,
      Home: 0,
      End: TOP,
      Delete: 1,
    };
    if (/^\d$/.test(event.key)) values[event.key] = Number(event.key) / 10 || 0;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const all = [...this.sliders.values()];
      const next =
        all.indexOf(/** @type {HTMLElement} */ (event.currentTarget)) +
        (event.key === "ArrowLeft" ? -1 : 1);
      all[next]?.focus();
    } else if (event.key in values) {
      this.setOne(block, typed(compact(Math.max(0, values[event.key]))), true);
    } else return;
    event.preventDefault();
  }
}

/**
 * Without the blocks at 1, which is what those have that are not named.
 * @param {import("./rows.mjs").BlockWeights} weights
 */
function spoken(weights) {
  return Object.fromEntries(Object.entries(weights).filter(([, weight]) => weight !== 1));
}
