/** The list of all LoRA files, which is searched by typing. */

import { h, icon, openPopover, setAttribute } from "./dom.mjs";
import { loraCard } from "./lora_card.mjs";
import { parseLoraText } from "./lora_text.mjs";
import { folderOf, stem } from "./rows.mjs";
import { search } from "./search.mjs";
import { t } from "./texts.mjs";

const SHOWN = 100;
let count = 0;

/**
 * @typedef {{
 *   library: import("./library.mjs").Library, urlOf: (route: string) => string,
 *   pick: (name: string, keepsOpen: boolean) => void,
 *   paste: (rows: Partial<import("./rows.mjs").Row>[]) => void,
 *   selected?: string, closed?: () => void, keepsOpen?: boolean
 * }} PickerOptions  `keepsOpen`: with ctrl or shift another one can be picked after.
 */

/**
 * @param {Element} anchor
 * @param {PickerOptions} options
 */
export function openPicker(anchor, options) {
  const picker = new Picker(options);
  picker.popover = openPopover(anchor, picker.element, {
    label: t("choose"),
    focus: picker.input,
    closed: options.closed,
  });
  void picker.load();
}

class Picker {
  /** @param {PickerOptions} options */
  constructor(options) {
    this.options = options;
    /** @type {import("./dom.mjs").Popover | null} */
    this.popover = null;
    /** @type {string[]} */
    this.names = [];
    /** @type {string[]} */
    this.found = [];
    this.active = -1;
    this.id = `lw-picker-${(count += 1)}`;
    this.list = h("div", {
      class: "lw-options",
      role: "listbox",
      id: this.id,
      "aria-label": t("choose"),
    });
    this.note = h("div", { class: "lw-note", "aria-live": "polite" }, t("loading"));
    this.side = h("div", { class: "lw-picker-side" });
    this.input = h("input", {
      class: "lw-search",
      type: "text",
      role: "combobox",
      placeholder: t("search"),
      spellcheck: "false",
      autocomplete: "off",
      "aria-label": t("search"),
      "aria-expanded": "true",
      "aria-autocomplete": "list",
      "aria-controls": this.id,
      input: () => this.show(),
      keydown: (event) => this.key(event),
    });
    const field = h("div", { class: "lw-search-field" }, icon("search"), this.input);
    const main = h("div", { class: "lw-picker-main" }, field, this.list, this.note);
    this.element = h("div", { class: "lw-picker" }, main, this.side);
  }

  async load() {
    try {
      this.names = await this.options.library.renew();
    } catch (error) {
      this.note.textContent = t("loadFailed", { reason: /** @type {Error} */ (error).message });
      return;
    }
    this.show();
    const at = this.options.selected ? this.found.indexOf(this.options.selected) : -1;
    if (at >= 0) this.activate(at);
  }

  /** Show what matches the text now. */
  show() {
    const text = this.input.value;
    const rows = parseLoraText(text, this.names);
    if (rows.length) return this.offerPaste(rows);
    const hits = search(text, this.names);
    const shown = hits.slice(0, SHOWN);
    this.found = shown.map((hit) => hit.name);
    this.list.replaceChildren(...shown.map((hit, place) => this.option(hit, place)));
    const more = hits.length - shown.length;
    this.note.textContent = more ? t("more", { count: more }) : hits.length ? "" : t("noMatch");
    this.active = -1; // these options are new ones: none is marked
    this.activate(hits.length ? 0 : -1);
  }

  /** @param {Partial<import("./rows.mjs").Row>[]} rows */
  offerPaste(rows) {
    const paste = () => {
      this.popover?.close();
      this.options.paste(rows);
    };
    const names = rows.map((row) => stem(row.name ?? "")).join(", ");
    this.found = [];
    this.list.replaceChildren(
      h(
        "button",
        { type: "button", class: "lw-option lw-active", click: paste },
        h("span", { class: "lw-option-name" }, t("pasteRows", { count: rows.length })),
        h("span", { class: "lw-option-folder" }, names),
      ),
    );
    this.note.textContent = "";
    this.paste = paste;
    this.activate(-1);
  }

  /**
   * @param {import("./search.mjs").Hit} hit
   * @param {number} place
   */
  option(hit, place) {
    const folder = folderOf(hit.name);
    const offset = folder ? folder.length + 1 : 0;
    const marked = new Set(hit.marks);
    const used = this.options.selected === hit.name;
    return h(
      "div",
      {
        class: `lw-option${used ? " lw-selected" : ""}`,
        role: "option",
        id: `${this.id}-${place}`,
        "aria-selected": "false",
        pointermove: () => this.activate(place, false),
        click: (event) => this.pick(place, event),
      },
      h("span", { class: "lw-option-name" }, ...highlighted(stem(hit.name), offset, marked)),
      folder && h("span", { class: "lw-option-folder" }, ...highlighted(folder, 0, marked)),
    );
  }

  /**
   * @param {number} place
   * @param {boolean} [scroll]
   */
  activate(place, scroll = true) {
    if (place === this.active && this.side.dataset.name === this.found[place]) return;
    this.active = place;
    for (const [at, option] of [...this.list.children].entries()) {
      if (option.getAttribute("role") !== "option") continue;
      option.classList.toggle("lw-active", at === place);
      option.setAttribute("aria-selected", String(at === place));
      if (at === place && scroll) option.scrollIntoView({ block: "nearest" });
    }
    setAttribute(this.input, "aria-activedescendant", place < 0 ? null : `${this.id}-${place}`);
    const name = this.found[place];
    this.side.dataset.name = name ?? "";
    const { library, urlOf } = this.options;
    this.side.replaceChildren(...(name === undefined ? [] : [loraCard(name, library, urlOf)]));
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const last = this.found.length - 1;
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 };
    const move = moves[/** @type {keyof typeof moves} */ (event.key)];
    if (move !== undefined && last >= 0) {
      const next = this.active + move;
      const wraps = Math.abs(move) === 1 && (next < 0 || next > last);
      this.activate(wraps ? (next < 0 ? last : 0) : Math.max(0, Math.min(next, last)));
    } else if (event.key === "Enter") {
      if (this.found.length) this.pick(this.active, event);
      else if (parseLoraText(this.input.value, this.names).length) this.paste?.();
    } else return;
    event.preventDefault();
  }

  /**
   * @param {number} place
   * @param {KeyboardEvent | MouseEvent} event
   */
  pick(place, event) {
    const name = this.found[place];
    if (name === undefined) return;
    const keepsOpen = Boolean(
      this.options.keepsOpen && (event.ctrlKey || event.metaKey || event.shiftKey),
    );
    if (!keepsOpen) this.popover?.close();
    this.options.pick(name, keepsOpen);
    if (keepsOpen) this.input.select();
  }
}

/**
 * @param {string} text
 * @param {number} offset  Where the text starts in the whole name.
 * @param {Set<number>} marked
 */
function highlighted(text, offset, marked) {
  /** @type {(Node | string)[]} */
  const parts = [];
  let at = 0;
  while (at < text.length) {
    const isMarked = marked.has(offset + at);
    let end = at;
    while (end < text.length && marked.has(offset + end) === isMarked) end += 1;
    const part = text.slice(at, end);
    parts.push(isMarked ? h("mark", {}, part) : part);
    at = end;
  }
  return parts;
}
