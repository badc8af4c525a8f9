/** What a stack's panel opens: the picker, menus, presets, a row's editor and card. */

import { effective } from "./blend.mjs";
import { h, openPopover } from "./dom.mjs";
import { cosinesOf } from "./figures.mjs";
import { loraCard } from "./lora_card.mjs";
import { formatLoraText } from "./lora_text.mjs";
import { openCopy, openMenu, openPaste, openPresets } from "./menus.mjs";
import { compact } from "./numbers.mjs";
import { openPicker } from "./picker.mjs";
import { openRowEditor } from "./row_editor.mjs";
import { parse } from "./row_reading.mjs";
import { stem } from "./rows.mjs";
import { t } from "./texts.mjs";

/** @typedef {import("./stack_view.mjs").StackPanel} Panel */

/**
 * @param {Panel} panel
 * @param {HTMLElement} anchor
 */
export function adding(panel, anchor) {
  pick(panel, anchor, { keepsOpen: true, pick: (name) => panel.addRows([{ name }]) });
}

/**
 * @param {Panel} panel
 * @param {number} index
 * @param {HTMLElement} anchor
 */
export function replacing(panel, index, anchor) {
  const { name } = panel.stack.rows[index];
  pick(panel, anchor, {
    selected: panel.host.library.find(name) ?? name,
    pick: (name) => panel.edit({ type: "rename", index, name }),
  });
}

/**
 * @param {Panel} panel
 * @param {HTMLElement} anchor
 * @param {{pick: (name: string) => void, selected?: string, keepsOpen?: boolean}} options
 */
function pick(panel, anchor, options) {
  panel.hovered.hide();
  const { library, urlOf } = panel.host;
  openPicker(anchor, { library, urlOf, paste: (rows) => panel.addRows(rows), ...options });
}

/**
 * @param {Panel} panel
 * @param {HTMLElement} anchor
 */
export function sorting(panel, anchor) {
  const orders = /** @type {const} */ ([
    ["name", "name"],
    ["strength", "strength"],
    ["onFirst", "on"],
  ]);
  openMenu(
    anchor,
    t("sort"),
    orders.map(([key, by]) => ({ label: t(key), run: () => panel.edit({ type: "sort", by }) })),
  );
}

/**
 * @param {Panel} panel
 * @param {HTMLElement} anchor
 */
export function presets(panel, anchor) {
  openPresets(anchor, panel.host.library, panel.stack.rows, (given, append) => {
    const { rows } = parse({ rows: given });
    if (append) panel.addRows(rows);
    else panel.edit({ type: "replace", rows });
  });
}

/**
 * @param {Panel} panel
 * @param {HTMLElement} anchor
 */
export function text(panel, anchor) {
  const { rows } = panel.stack;
  const written = formatLoraText(rows);
  const copy = async () => {
    if (await copyText(written)) panel.say(t("copied"));
    else openCopy(anchor, written);
  };
  const paste = () => openPaste(anchor, panel.host.library, (given) => panel.addRows(given));
  const clear = () => panel.edit({ type: "replace", rows: [] });
  openMenu(anchor, t("asText"), [
    { label: t("pasteText"), run: paste },
    { label: t("copyText"), disabled: !written, run: () => void copy() },
    null,
    { label: t("removeAll"), danger: true, disabled: !rows.length, run: clear },
  ]);
}

/**
 * @param {Panel} panel
 * @param {number} index
 * @param {HTMLElement} anchor
 */
export function rowMenu(panel, index, anchor) {
  const { rows } = panel.stack;
  const { name } = rows[index];
  const last = rows.length - 1;
  const move = (/** @type {number} */ to) => () => panel.move(index, to);
  openMenu(anchor, t("menu", { name: stem(name) }), [
    { label: t("editBlocks"), run: () => details(panel, index, anchor) },
    { label: t("info"), disabled: !name, run: () => information(panel, index, anchor) },
    { label: t("duplicate"), run: () => panel.edit({ type: "duplicate", index }) },
    null,
    { label: t("up"), keys: "Alt ↑", disabled: index === 0, run: move(index - 1) },
    { label: t("down"), keys: "Alt ↓", disabled: index === last, run: move(index + 1) },
    { label: t("toTop"), disabled: index === 0, run: move(0) },
    { label: t("toBottom"), disabled: index === last, run: move(last) },
    null,
    { label: t("remove"), keys: "Del", danger: true, run: () => panel.remove(index) },
  ]);
}

/**
 * @param {Panel} panel
 * @param {number} index
 * @param {HTMLElement} anchor
 */
export function details(panel, index, anchor) {
  panel.hovered.hide();
  openRowEditor(anchor, {
    row: panel.stack.rows[index],
    library: panel.host.library,
    setBlocks: (blocks, done) => panel.edit({ type: "blocks", index, blocks }, done),
    setSchedule: (schedule) => panel.edit({ type: "schedule", index, text: schedule }),
  });
}

/**
 * @param {Panel} panel
 * @param {number} index
 * @param {HTMLElement} anchor
 */
function information(panel, index, anchor) {
  openPopover(anchor, card(panel, index), { label: t("info"), align: "end" });
}

/**
 * @param {Panel} panel
 * @param {number} index
 */
export function card(panel, index) {
  const { library, urlOf } = panel.host;
  return loraCard(panel.stack.rows[index].name, library, urlOf, ...notes(panel, index));
}

/**
 * The strengths that are used, and after an execution the cosines to other LoRAs.
 * @param {Panel} panel
 * @param {number} index
 */
function notes(panel, index) {
  const { rule, master } = panel.host.blend();
  const figures = panel.knownFigures().find((one) => one.row === index);
  const used = figures ?? effective(panel.stack.rows, rule, master)[index];
  const found = [];
  if (used) {
    const [model, clip] = [used.model, used.clip].map((value) => compact(Number(value.toFixed(3))));
    found.push(h("div", { class: "lw-note" }, t("effective", { model, clip })));
  }
  const cosines = cosinesOf(figures?.cosines);
  if (cosines.length) {
    const facts = cosines.flatMap(([name, cosine]) => [
      h("dt", {}, name),
      h("dd", {}, cosine.toFixed(2)),
    ]);
    found.push(
      h("div", { class: "lw-note" }, t("overlap")),
      h("dl", { class: "lw-facts lw-cosines" }, ...facts),
    );
  }
  return found;
}

/**
 * Whether a text is in the clipboard now. Pages without https have no interface for it, and others may be
 * refused by the browser's user.
 * @param {string} written
 */
async function copyText(written) {
  try {
    await navigator.clipboard.writeText(written);
    return true;
  } catch {
    const area = h("textarea", {}, written);
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}
