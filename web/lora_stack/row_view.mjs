/** One row: handle, switch, name, share, strengths, menu. It is updated in place, never made anew. */

import { changedBlocks } from "./blocks.mjs";
import { h, icon, iconButton, setAttribute, setText } from "./dom.mjs";
import { NumberField } from "./number_field.mjs";
import { percent } from "./numbers.mjs";
import { clipOf, folderOf, stem } from "./rows.mjs";
import { t } from "./texts.mjs";

/**
 * @typedef {import("./rows.mjs").Row} Row
 * @typedef {{
 *   index: number, count: number, active: boolean, colour: number, share: number,
 *   used: {model: number, clip: number} | null, missing: boolean, unnamed: boolean,
 *   fails: boolean, nearest: string | null, info: import("./library.mjs").LoraInfo | null
 * }} RowFacts  What is known about a row besides its own values.
 * @typedef {{
 *   edit: (action: import("./rows.mjs").Action, done?: boolean) => void,
 *   choose: (index: number, anchor: HTMLElement) => void,
 *   fix: (index: number) => void,
 *   menu: (index: number, anchor: HTMLElement) => void,
 *   details: (index: number, anchor: HTMLElement) => void,
 *   hover: (index: number, anchor: HTMLElement | null) => void,
 *   drag: (index: number, event: PointerEvent) => void,
 *   key: (index: number, event: KeyboardEvent) => void,
 *   activate: (index: number) => void
 * }} RowActions
 */

export class RowView {
  /** @param {RowActions} actions */
  constructor(actions) {
    this.actions = actions;
    this.index = 0;
    this.linked = true;
    this.grip = h(
      "span",
      {
        class: "lw-grip",
        title: t("drag"),
        pointerdown: (event) => actions.drag(this.index, event),
      },
      icon("grip"),
    );
    this.toggle = h("button", {
      type: "button",
      class: "lw-switch",
      role: "switch",
      click: () => this.edit("toggle"),
    });
    this.nameText = h("span", { class: "lw-name-text" });
    this.sub = h("span", { class: "lw-name-sub" });
    this.name = h(
      "button",
      {
        type: "button",
        class: "lw-name",
        click: () => actions.choose(this.index, this.name),
        pointerenter: () => actions.hover(this.index, this.name),
        pointerleave: () => actions.hover(this.index, null),
      },
      this.nameText,
      this.sub,
    );
    this.fix = h("button", {
      type: "button",
      class: "lw-fix",
      click: () => actions.fix(this.index),
    });
    this.details = h(
      "button",
      {
        type: "button",
        class: "lw-details",
        "aria-label": t("editBlocks"),
        title: t("editBlocks"),
        click: () => actions.details(this.index, this.details),
      },
      icon("sliders"),
    );
    this.share = h("span", { class: "lw-share" });
    this.used = h("span", { class: "lw-used" });
    this.figures = h(
      "span",
      {
        class: "lw-figures",
        pointerenter: () => actions.hover(this.index, this.figures),
        pointerleave: () => actions.hover(this.index, null),
      },
      this.share,
      this.used,
    );
    this.model = new NumberField((value, done) => this.strength("model", value, done));
    this.link = iconButton("link", t("unlink"), () => this.edit(this.linked ? "unlink" : "link"));
    this.clip = new NumberField((value, done) => this.strength("clip", value, done));
    this.menu = iconButton("dots", "", () => actions.menu(this.index, this.menu), {
      "aria-haspopup": "menu",
    });
    this.element = h(
      "div",
      {
        class: "lw-row",
        role: "listitem",
        keydown: (event) => actions.key(this.index, event),
        focusin: () => actions.activate(this.index),
      },
      this.grip,
      this.toggle,
      h("span", { class: "lw-title" }, this.name, this.fix),
      this.details,
      this.figures,
      this.model.element,
      this.link,
      this.clip.element,
      this.menu,
    );
    this.link.classList.add("lw-link");
    this.link.append(icon("unlink"));
    this.clip.element.classList.add("lw-clip");
  }

  /** @param {"toggle" | "link" | "unlink"} type */
  edit(type) {
    this.actions.edit({ type, index: this.index });
  }

  /**
   * @param {"model" | "clip"} type
   * @param {number} value
   * @param {boolean} done
   */
  strength(type, value, done) {
    this.actions.edit({ type, index: this.index, value }, done);
  }

  /**
   * @param {Row} row
   * @param {RowFacts} facts
   */
  update(row, facts) {
    this.index = facts.index;
    this.linked = row.clip === undefined;
    const { element } = this;
    const title = row.name ? stem(row.name) : t("noName");
    element.style.setProperty("--lw-colour", `var(--lw-colour-${facts.colour})`);
    element.classList.toggle("lw-off", !row.on);
    element.classList.toggle("lw-missing", facts.missing || facts.unnamed);
    element.classList.toggle("lw-linked", this.linked);
    const state = t(row.on ? "stateOn" : "stateOff");
    const words = {
      place: facts.index + 1,
      count: facts.count,
      name: title,
      state,
      strength: row.model,
    };
    setAttribute(element, "tabindex", facts.active ? 0 : -1);
    setAttribute(element, "aria-label", t("row", words));
    setAttribute(this.toggle, "aria-checked", row.on ? "true" : "false");
    setAttribute(this.toggle, "aria-label", t("toggle", { name: title }));
    setText(this.nameText, title);
    setText(this.sub, facts.missing ? t("missing") : subtitle(row, facts));
    setAttribute(this.name, "aria-label", `${t("choose")}: ${title}`);
    this.fix.hidden = !facts.missing || facts.nearest === null;
    if (facts.nearest !== null) {
      setText(this.fix, t("missingFix", { name: stem(facts.nearest) }));
      setAttribute(this.fix, "title", facts.nearest);
    }
    this.showDetails(row, facts);
    this.showFigures(row, facts);
    this.model.update(row.model, t("modelStrength", { name: title }));
    this.clip.update(clipOf(row), t("clipStrength", { name: title }));
    const linkLabel = t(this.linked ? "unlink" : "link");
    setAttribute(this.link, "aria-label", linkLabel);
    setAttribute(this.link, "title", linkLabel);
    setAttribute(this.link, "aria-pressed", String(this.linked));
    setAttribute(this.menu, "aria-label", t("menu", { name: title }));
    for (const control of this.controls()) setAttribute(control, "tabindex", facts.active ? 0 : -1);
  }

  /** @returns {HTMLElement[]} */
  controls() {
    return [
      this.toggle,
      this.name,
      this.fix,
      this.details,
      this.model.element,
      this.link,
      this.clip.element,
      this.menu,
    ];
  }

  /**
   * @param {Row} row
   * @param {RowFacts} facts
   */
  showDetails(row, facts) {
    const changed =
      typeof row.blocks === "object" && !Array.isArray(row.blocks)
        ? facts.info
          ? changedBlocks(row.blocks, facts.info.blocks)
          : Object.keys(row.blocks).length
        : Number(Boolean(row.blocks));
    const words = [
      facts.fails && t("scheduleFails"),
      changed && t("changedBlocks", { count: changed }),
      row.schedule && `${t("schedule")} ${row.schedule}`,
    ].filter(Boolean);
    this.details.classList.toggle("lw-set", words.length > 0);
    this.details.classList.toggle("lw-warns", facts.fails);
    setAttribute(this.details, "title", words.length ? words.join("; ") : t("editBlocks"));
  }

  /**
   * @param {Row} row
   * @param {RowFacts} facts
   */
  showFigures(row, facts) {
    setText(this.share, row.on ? percent(facts.share) : "–");
    const differs = facts.used !== null && Math.abs(facts.used.model - row.model) > 5e-4;
    setText(this.used, differs && facts.used ? facts.used.model.toFixed(2) : "");
  }

  /** @param {HTMLElement} [part]  The part to focus; the row itself without one. */
  focus(part = this.element) {
    part.focus({ preventScroll: true });
    this.element.scrollIntoView({ block: "nearest" });
  }
}

/**
 * Folder, base model and rank, as far as they are known.
 * @param {Row} row
 * @param {RowFacts} facts
 */
function subtitle(row, facts) {
  const { info } = facts;
  const ranks = info ? [...new Set(info.ranks)] : [];
  const rank = ranks.length === 1 ? `rank ${ranks[0]}` : "";
  return [folderOf(row.name), info?.family, rank].filter(Boolean).join(" · ");
}
