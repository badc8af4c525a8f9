/** What is around the rows: header, share bar, captions, a wide button that adds, and messages. */

import { h, icon, iconButton, setAttribute, setText } from "./dom.mjs";
import { percent } from "./numbers.mjs";
import { onState, stem } from "./rows.mjs";
import { t } from "./texts.mjs";

const CHECKED = { all: "true", none: "false", some: "mixed" };

/**
 * @typedef {{
 *   toggleAll: () => void, add: (anchor: HTMLElement) => void,
 *   sort: (anchor: HTMLElement) => void, presets: (anchor: HTMLElement) => void,
 *   text: (anchor: HTMLElement) => void, discard: () => void
 * }} FrameActions
 */

export class StackFrame {
  /** @param {FrameActions} actions */
  constructor(actions) {
    const all = {
      class: "lw-check",
      role: "checkbox",
      "aria-label": t("allOn"),
      title: t("allOn"),
    };
    this.toggleAll = h("button", { type: "button", ...all, click: actions.toggleAll });
    this.count = h("span", { class: "lw-count" });
    const dialog = { "aria-haspopup": "dialog" };
    const plus = iconButton("add", t("add"), () => actions.add(plus), dialog);
    const menu = { "aria-haspopup": "menu" };
    const sort = iconButton("sort", t("sort"), () => actions.sort(sort), menu);
    const presets = iconButton("bookmark", t("presets"), () => actions.presets(presets), dialog);
    const text = iconButton("text", t("asText"), () => actions.text(text), menu);
    const gap = h("span", { class: "lw-gap" });
    this.head = h(
      "div",
      { class: "lw-head" },
      this.toggleAll,
      this.count,
      gap,
      plus,
      sort,
      presets,
      text,
    );
    this.bar = h("div", { class: "lw-bar", "aria-hidden": "true" });
    const captions = /** @type {const} */ (["share", "model", "clip"]).map((key) =>
      h("span", { class: `lw-caption-${key}` }, t(key)),
    );
    this.captions = h("div", { class: "lw-captions", "aria-hidden": "true" }, ...captions);
    this.list = h("div", { class: "lw-list", role: "list", "aria-label": t("rows") });
    const hint = h("div", { class: "lw-note" }, t("emptyHint"));
    this.empty = h("div", { class: "lw-empty" }, h("div", {}, t("empty")), hint);
    this.reason = h("div", { role: "alert" });
    const discard = { type: "button", class: "lw-text-button", click: actions.discard };
    this.invalid = h(
      "div",
      { class: "lw-invalid" },
      this.reason,
      h("button", discard, t("discard")),
    );
    this.add = h(
      "button",
      { type: "button", class: "lw-add", click: () => actions.add(this.add) },
      icon("add"),
      h("span", {}, t("addLora")),
    );
    this.changing = [plus, sort, presets, text, this.add];
    this.live = h("div", { class: "lw-live", "aria-live": "polite" });
    this.parts = [
      this.head,
      this.bar,
      this.captions,
      this.list,
      this.empty,
      this.invalid,
      this.add,
      this.live,
    ];
  }

  /**
   * @param {import("./rows.mjs").Stack} stack
   * @param {string | null} problem  Why the value can't be read.
   */
  show(stack, problem) {
    const { rows } = stack;
    const some = rows.length > 0;
    setAttribute(this.toggleAll, "aria-checked", some ? CHECKED[onState(stack)] : "false");
    this.toggleAll.disabled = !some;
    const on = rows.filter((row) => row.on).length;
    setText(this.count, some ? t("ofRows", { on, count: rows.length }) : "");
    for (const part of [this.bar, this.captions, this.list]) part.hidden = !some;
    this.empty.hidden = some || problem !== null;
    this.invalid.hidden = problem === null;
    setText(this.reason, problem === null ? "" : t("invalid", { reason: problem }));
    for (const button of this.changing) button.disabled = problem !== null;
  }

  /**
   * The parts of the blend side by side.
   * @param {import("./rows.mjs").Row[]} rows
   * @param {number[]} shares
   * @param {(name: string) => number} colourOf
   */
  showShares(rows, shares, colourOf) {
    while (this.bar.children.length > rows.length) this.bar.lastElementChild?.remove();
    rows.forEach((row, index) => {
      const known = /** @type {HTMLElement | undefined} */ (this.bar.children[index]);
      const part = known ?? this.bar.appendChild(h("span"));
      part.style.flexGrow = String(shares[index]);
      part.style.setProperty("--lw-colour", `var(--lw-colour-${colourOf(row.name)})`);
      part.hidden = shares[index] === 0;
      part.classList.toggle("lw-negative", row.model < 0);
      setAttribute(part, "title", `${stem(row.name)}: ${percent(shares[index])}`);
    });
  }
}
