/** The rows of a LoRA Stack node as an element: header, shares, list, and what they open. */

import { effective, shares } from "./blend.mjs";
import { closePopover, h, isTyping, setAttribute } from "./dom.mjs";
import { Figures } from "./figures.mjs";
import { FileFacts } from "./file_facts.mjs";
import { HoverCard } from "./lora_card.mjs";
import { parseLoraText } from "./lora_text.mjs";
import * as open from "./openers.mjs";
import { dragRow } from "./row_drag.mjs";
import { parse } from "./row_reading.mjs";
import { RowView } from "./row_view.mjs";
import { asText, emptyStack, reduce, serialise, stem } from "./rows.mjs";
import { StackFrame } from "./stack_frame.mjs";
import { t } from "./texts.mjs";

const COLOURS = 8;
const SHOWN_ROWS = 8; // a node asks for the height of so many; more of them scroll
const HEIGHTS = { row: 42, borders: 2, rest: 90, empty: 176 }; // as in stack.css

/**
 * @typedef {import("./rows.mjs").Row} Row
 * @typedef {{
 *   library: import("./library.mjs").Library,
 *   urlOf: (route: string) => string,
 *   write: (value: string) => void,
 *   record: () => void,
 *   blend: () => {rule: string, master: number, patches: boolean},
 *   resized: (before: number, after: number) => void
 * }} PanelHost  What the panel asks of the node: `write` sets the widget's value, `record` makes a
 *   step of the undo history, `resized` tells that another height is
 *   needed.
 */

export class StackPanel {
  /** @param {PanelHost} host */
  constructor(host) {
    this.host = host;
    this.text = "";
    this.stack = emptyStack();
    /** @type {string | null} Why the value can't be read. */
    this.problem = null;
    this.active = 0;
    /** @type {RowView[]} */
    this.views = [];
    /** @type {Map<string, number>} */
    this.colours = new Map();
    this.files = new FileFacts(host.library, () => this.render());
    this.figures = new Figures();
    this.writing = false;
    this.hovered = new HoverCard();
    this.height = 0;
    this.frame = new StackFrame({
      toggleAll: () => this.edit({ type: "toggleAll" }),
      add: (anchor) => open.adding(this, anchor),
      sort: (anchor) => open.sorting(this, anchor),
      presets: (anchor) => open.presets(this, anchor),
      text: (anchor) => open.text(this, anchor),
      discard: () => this.discard(),
    });
    this.element = h(
      "div",
      {
        class: "lw-stack",
        tabindex: -1,
        title: "", // the host's tooltip of the input would cover every control
        paste: (event) => this.pasted(event),
        pointerdown: (event) => event.button === 0 && event.stopPropagation(),
      },
      ...this.frame.parts,
    );
    this.refreshed = () => {
      this.files.clear();
      this.render();
    };
    this.render();
  }

  /** The node is in a graph. */
  connect() {
    this.host.library.listeners.add(this.refreshed);
    this.host.library.renew().catch(() => {}); // the picker tells why, when it is opened
    this.render();
  }

  /** The node has left its graph. */
  disconnect() {
    this.host.library.listeners.delete(this.refreshed);
    closePopover(this.element);
    this.hovered.hide();
  }

  /** @param {unknown} value  The widget's new value, from whatever source. */
  setValue(value) {
    const text = asText(value);
    if (text === this.text && this.text !== "") return;
    this.text = text;
    try {
      this.stack = parse(text);
      this.problem = null;
    } catch (error) {
      this.stack = emptyStack();
      this.problem = /** @type {Error} */ (error).message;
    }
    if (!this.writing) closePopover(this.element); // it may show a row that is another one now
    this.render();
  }

  /**
   * Change the rows; a value that can't be read stays as it is.
   * @param {import("./rows.mjs").Action} action
   * @param {boolean} [done]  Whether this is a step of the undo history.
   */
  edit(action, done = true) {
    if (this.problem !== null) {
      this.say(t("invalid", { reason: this.problem }));
      return;
    }
    const next = reduce(this.stack, action);
    if (next !== this.stack) {
      this.writing = true;
      this.host.write(serialise(next));
      this.writing = false;
    }
    if (done) this.host.record();
  }

  /** The user gives up a value that can't be read. */
  discard() {
    this.host.write(serialise(emptyStack()));
    this.host.record();
    this.frame.add.focus();
  }

  /**
   * What an execution tells about the rows, for as long as they stay as they were queued.
   * @param {import("./figures.mjs").Told} told
   */
  setFigures(told) {
    this.figures.take(told, this.text, this.state());
    this.render();
  }

  /** The last execution's figures, unless something has changed since. */
  knownFigures() {
    return this.figures.of(this.state());
  }

  /** All that the figures depend on, as far as this node knows. */
  state() {
    return JSON.stringify([this.text, this.host.blend()]);
  }

  /** The height that the element needs, in pixels of the canvas. */
  minHeight() {
    const { length } = this.stack.rows;
    return length ? HEIGHTS.rest + listHeight(Math.min(length, SHOWN_ROWS)) : HEIGHTS.empty;
  }

  render() {
    const { rows } = this.stack;
    const { library } = this.host;
    const { rule, master, patches } = this.host.blend();
    const used = effective(rows, rule, master);
    const drawn = shares(rows);
    const known = this.knownFigures();
    this.active = Math.max(0, Math.min(this.active, rows.length - 1));
    this.frame.show(this.stack, this.problem);
    while (this.views.length > rows.length) this.views.pop()?.element.remove();
    rows.forEach((row, index) => {
      this.views[index] ??= this.addView();
      const figures = known.find((one) => one.row === index);
      const missing = row.name !== "" && library.has(row.name) === false;
      this.views[index].update(row, {
        index,
        count: rows.length,
        active: index === this.active,
        colour: this.colourOf(row.name),
        share: figures?.share ?? drawn[index],
        used: figures ?? used[index],
        fails: patches && row.on && row.schedule !== undefined,
        missing,
        unnamed: row.on && !row.name.trim(),
        nearest: missing ? this.files.nearest(row.name) : null,
        info: missing ? null : this.files.info(row.name),
      });
    });
    const parts = drawn.map(
      (share, index) => known.find((one) => one.row === index)?.share ?? share,
    );
    this.frame.showShares(rows, parts, (name) => this.colourOf(name));
    const { style } = this.frame.list;
    style.setProperty("--lw-list-min", `${listHeight(Math.min(rows.length, SHOWN_ROWS))}px`);
    style.setProperty("--lw-list-max", `${listHeight(rows.length)}px`);
    const height = this.minHeight();
    this.element.style.minHeight = `${height}px`;
    setAttribute(this.frame.list, "data-capture-wheel", rows.length > SHOWN_ROWS ? "true" : null);
    if (height !== this.height) {
      const before = this.height;
      this.height = height;
      this.host.resized(before, height);
    }
  }

  addView() {
    const view = new RowView({
      edit: (action, done) => this.edit(action, done),
      choose: (index, anchor) => open.replacing(this, index, anchor),
      fix: (index) => this.fixMissing(index),
      menu: (index, anchor) => open.rowMenu(this, index, anchor),
      details: (index, anchor) => open.details(this, index, anchor),
      hover: (index, anchor) => this.hover(index, anchor),
      drag: (index, event) => this.drag(index, event),
      key: (index, event) => this.rowKey(index, event),
      activate: (index) => this.activate(index),
    });
    this.frame.list.append(view.element);
    return view;
  }

  /** @param {string} name  A LoRA keeps its colour when rows move. */
  colourOf(name) {
    const known = this.colours.get(name) ?? this.colours.size % COLOURS;
    this.colours.set(name, known);
    return known;
  }

  /** @param {number} index */
  fixMissing(index) {
    const name = this.files.nearest(this.stack.rows[index].name);
    if (name !== null) this.edit({ type: "rename", index, name });
  }

  /** @param {number} index */
  activate(index) {
    if (index === this.active) return;
    this.active = index;
    this.render();
  }

  /** @param {number} index */
  focusRow(index) {
    const at = Math.max(0, Math.min(index, this.views.length - 1));
    this.active = at;
    this.render();
    if (this.views[at]) this.views[at].focus();
    else this.frame.add.focus();
  }

  /**
   * Keys of a row. In its controls only those count that have no meaning there.
   * @param {number} index
   * @param {KeyboardEvent} event
   */
  rowKey(index, event) {
    if (isTyping(event)) return;
    const onRow = event.target === this.views[index].element;
    const up = event.key === "ArrowUp";
    if (event.altKey && (up || event.key === "ArrowDown")) this.move(index, index + (up ? -1 : 1));
    else if (event.ctrlKey || event.metaKey || event.altKey) return;
    else if (onRow && (up || event.key === "ArrowDown")) this.focusRow(index + (up ? -1 : 1));
    else if (onRow && event.key === "Home") this.focusRow(0);
    else if (onRow && event.key === "End") this.focusRow(this.views.length - 1);
    else if (onRow && event.key === " ") this.edit({ type: "toggle", index });
    else if (onRow && event.key === "Enter") open.replacing(this, index, this.views[index].name);
    else if (event.key === "Delete" || (onRow && event.key === "Backspace")) this.remove(index);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /**
   * @param {number} from
   * @param {number} to
   */
  move(from, to) {
    const last = this.stack.rows.length - 1;
    const place = Math.max(0, Math.min(to, last));
    if (place === from) return;
    const { name } = this.stack.rows[from];
    this.edit({ type: "move", from, to: place });
    this.focusRow(place);
    this.say(t("moved", { name: stem(name), place: place + 1, count: last + 1 }));
  }

  /** @param {number} index */
  remove(index) {
    const { name } = this.stack.rows[index];
    this.edit({ type: "remove", index });
    this.focusRow(index);
    this.say(t("removed", { name: stem(name) }));
  }

  /** @param {Partial<Row>[]} rows */
  addRows(rows) {
    this.edit({ type: "add", rows });
    this.active = this.stack.rows.length - 1;
    this.render();
    this.views[this.active]?.element.scrollIntoView({ block: "nearest" });
  }

  /** @param {string} text  Is read out by screen readers. */
  say(text) {
    this.frame.live.textContent = text;
  }

  /**
   * @param {number} index
   * @param {PointerEvent} event
   */
  drag(index, event) {
    if (event.button !== 0) return;
    this.hovered.hide();
    dragRow({
      event,
      list: this.frame.list,
      rows: this.views.map((view) => view.element),
      index,
      drop: (to) => this.move(index, to),
    });
  }

  /**
   * @param {number} index
   * @param {HTMLElement | null} anchor  null: the pointer has left.
   */
  hover(index, anchor) {
    this.hovered.hide();
    const name = this.stack.rows[index]?.name;
    if (anchor === null || !name || !this.host.library.has(name)) return;
    this.hovered.show(
      this.element,
      anchor,
      () => this.stack.rows[index]?.name === name && open.card(this, index),
    );
  }

  /** @param {ClipboardEvent} event  <lora:...> text becomes rows; anything else is the host's. */
  pasted(event) {
    if (isTyping(event)) return;
    const rows = parseLoraText(
      event.clipboardData?.getData("text/plain") ?? "",
      this.host.library.names ?? [],
    );
    if (!rows.length) return;
    event.preventDefault();
    event.stopPropagation();
    this.addRows(rows);
  }
}

/** @param {number} count  Of the rows that are to be seen. */
function listHeight(count) {
  return count * HEIGHTS.row + HEIGHTS.borders;
}
