/** A strength: dragged, rolled, stepped by arrow keys, typed, and put back by a double click. */

import { h, setAttribute, setText } from "./dom.mjs";
import { LIMITS, dragged, shown, stepped, typed } from "./numbers.mjs";
import { t } from "./texts.mjs";

const DRAG_STARTS_PX = 3;
const FULL = 1; // the strength at which the bar below the number is full
const ROLLED_MS = 400;

export class NumberField {
  /**
   * @param {(value: number, done: boolean) => void} change  `done`: a step for the undo history.
   */
  constructor(change) {
    this.change = change;
    this.value = 0;
    /** @type {HTMLInputElement | null} */
    this.input = null;
    this.rolled = 0;
    this.text = h("span", { class: "lw-number-text" });
    this.bar = h("span", { class: "lw-number-bar" });
    this.element = h(
      "div",
      {
        class: "lw-number",
        role: "spinbutton",
        tabindex: 0,
        title: t("numberHint"),
        "aria-valuemin": LIMITS.min,
        "aria-valuemax": LIMITS.max,
        focus: () => setAttribute(this.element, "data-capture-wheel", "true"),
        blur: () => setAttribute(this.element, "data-capture-wheel", null),
        pointerdown: (event) => this.press(event),
        dblclick: () => this.put(1, true),
        keydown: (event) => this.key(event),
        wheel: (event) => this.roll(event),
      },
      this.bar,
      this.text,
    );
  }

  /**
   * @param {number} value
   * @param {string} label
   */
  update(value, label) {
    this.value = value;
    setText(this.text, shown(value));
    setAttribute(this.element, "aria-valuenow", value);
    setAttribute(this.element, "aria-label", label);
    this.element.classList.toggle("lw-negative", value < 0);
    this.bar.style.width = `${Math.min(Math.abs(value) / FULL, 1) * 100}%`;
  }

  /**
   * @param {number} value
   * @param {boolean} done
   */
  put(value, done) {
    if (value !== this.value || done) this.change(value, done);
  }

  /** @param {PointerEvent} event */
  press(event) {
    if (event.button !== 0 || this.input) return;
    const { element } = this;
    const [from, start] = [event.clientX, this.value];
    let moving = false;
    const end = new AbortController();
    const options = { signal: end.signal };
    element.focus({ preventScroll: true });
    element.setPointerCapture(event.pointerId);
    const move = (/** @type {PointerEvent} */ next) => {
      const pixels = next.clientX - from;
      moving ||= Math.abs(pixels) >= DRAG_STARTS_PX;
      if (moving) this.put(dragged(start, pixels, next), false);
    };
    const drop = () => {
      end.abort();
      element.classList.remove("lw-dragged");
      if (moving) this.put(this.value, true);
    };
    element.classList.add("lw-dragged");
    element.addEventListener("pointermove", move, options);
    element.addEventListener("pointerup", drop, options);
    element.addEventListener("pointercancel", drop, options);
  }

  /** @param {WheelEvent} event  Only the focused field is rolled; else the canvas zooms. */
  roll(event) {
    if (document.activeElement !== this.element) return;
    event.preventDefault();
    event.stopPropagation();
    this.put(stepped(this.value, (event.deltaY || event.deltaX) < 0 ? 1 : -1, event), false);
    window.clearTimeout(this.rolled);
    this.rolled = window.setTimeout(() => this.put(this.value, true), ROLLED_MS);
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (this.input) return;
    const steps = { ArrowUp: 1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (event.altKey) return;
    if (steps !== undefined) this.put(stepped(this.value, steps, event), true);
    else if (event.key === "Enter" || event.key === "F2") this.edit(shown(this.value), true);
    else if (event.key === "Delete" || event.key === "Backspace") this.edit("", false);
    else if (/^[\d.,+-]$/.test(event.key) && !event.ctrlKey && !event.metaKey)
      this.edit(event.key, false);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /**
   * Type a number: Enter takes it, Escape leaves it.
   * @param {string} text
   * @param {boolean} selected
   */
  edit(text, selected) {
    const input = h("input", {
      class: "lw-number-input",
      type: "text",
      inputmode: "decimal",
      "aria-label": this.element.getAttribute("aria-label"),
      blur: () => close(true, false),
      keydown: (event) => {
        event.stopPropagation();
        if (event.key === "Enter") close(true, true);
        if (event.key === "Escape") close(false, true);
      },
    });
    const close = (/** @type {boolean} */ take, /** @type {boolean} */ refocus) => {
      if (this.input !== input) return;
      this.input = null;
      const value = typed(input.value);
      input.remove();
      if (refocus) this.element.focus({ preventScroll: true });
      if (take && !Number.isNaN(value)) this.put(value, true);
    };
    input.value = text;
    this.input = input;
    this.element.append(input);
    input.focus({ preventScroll: true });
    if (selected) input.select();
  }
}
