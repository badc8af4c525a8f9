/** Small popovers: a menu, the presets, and a text to paste. */

import { h, iconButton, openPopover } from "./dom.mjs";
import { parseLoraText } from "./lora_text.mjs";
import { t } from "./texts.mjs";

/**
 * @typedef {{label: string, run: () => void, disabled?: boolean, danger?: boolean, keys?: string}} MenuItem
 * @typedef {import("./library.mjs").PresetFile} PresetFile
 */

/**
 * @param {HTMLElement} anchor
 * @param {string} label
 * @param {(MenuItem | null)[]} items  null is a line between two.
 */
export function openMenu(anchor, label, items) {
  const entries = items.map((item) => (item ? entryOf(item) : h("hr", {})));
  const buttons = entries.filter((entry) => entry instanceof HTMLButtonElement && !entry.disabled);
  const list = h(
    "div",
    { class: "lw-menu", keydown: (event) => arrows(event, /** @type {HTMLElement[]} */ (buttons)) },
    ...entries,
  );
  const popover = openPopover(anchor, list, {
    label,
    role: "menu",
    align: "end",
    closed: () => anchor.setAttribute("aria-expanded", "false"),
    focus: /** @type {HTMLElement} */ (buttons[0]),
  });
  anchor.setAttribute("aria-expanded", "true");

  /** @param {MenuItem} item */
  function entryOf(item) {
    const click = () => {
      popover.close();
      item.run();
    };
    return h(
      "button",
      {
        type: "button",
        role: "menuitem",
        class: `lw-menu-item${item.danger ? " lw-danger" : ""}`,
        disabled: item.disabled,
        click,
      },
      h("span", {}, item.label),
      item.keys && h("kbd", {}, item.keys),
    );
  }
}

/**
 * @param {KeyboardEvent} event
 * @param {HTMLElement[]} buttons
 */
function arrows(event, buttons) {
  const at = buttons.indexOf(/** @type {HTMLElement} */ (document.activeElement));
  /** @type {Record<string, number>} */
  const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: -1 };
  if (!(event.key in next)) return;
  buttons.at(next[event.key] % buttons.length)?.focus();
  event.preventDefault();
}

/**
 * Ask before something is lost. What is shown in `note` next takes the question away.
 * @param {HTMLElement} note
 * @param {string} question
 * @param {string} label
 * @param {() => void} run
 */
function askIn(note, question, label, run) {
  const click = () => {
    note.replaceChildren();
    run();
  };
  const button = h("button", { type: "button", class: "lw-text-button lw-danger", click }, label);
  note.replaceChildren(question, " ", button);
  button.focus();
}

/**
 * Text to copy by hand, where the page may not.
 * @param {HTMLElement} anchor
 * @param {string} text
 */
export function openCopy(anchor, text) {
  const area = h("textarea", { class: "lw-field", rows: 4, readonly: true }, text);
  const note = h("div", { class: "lw-note", role: "status" }, t("copyFailed"));
  const content = h("div", { class: "lw-panel" }, note, area);
  openPopover(anchor, content, { label: t("copyText"), align: "end", focus: area });
  area.select();
}

/**
 * @param {HTMLElement} anchor
 * @param {import("./library.mjs").Library} library
 * @param {import("./rows.mjs").Row[]} rows
 * @param {(rows: Partial<import("./rows.mjs").Row>[], append: boolean) => void} use
 */
export function openPresets(anchor, library, rows, use) {
  const list = h("div", { class: "lw-presets" }, h("div", { class: "lw-note" }, t("loading")));
  const note = h("div", { class: "lw-note", role: "status" });
  /** @type {HTMLInputElement} */
  const field = h("input", {
    class: "lw-field",
    type: "text",
    placeholder: t("presetName"),
    "aria-label": t("presetName"),
    keydown: (event) => event.key === "Enter" && void save(),
  });
  const attempt = (/** @type {() => Promise<void>} */ run) =>
    run().catch((error) => {
      note.textContent = t("loadFailed", { reason: error.message });
    });
  const save = (overwrite = false) =>
    attempt(async () => {
      const name = field.value.trim();
      if (!name) return field.focus();
      if (!(await library.savePreset({ name, rows }, overwrite)))
        return askIn(note, t("overwriteAsk", { name }), t("overwrite"), () => save(true));
      field.value = "";
      await show();
    });
  const take = (/** @type {PresetFile} */ { file }, /** @type {boolean} */ append) =>
    attempt(async () => {
      const preset = await library.loadPreset(file);
      use(preset?.rows, append); // rows that can't be read are told here
      popover.close();
    });
  const remove = (/** @type {PresetFile} */ { name, file }) =>
    askIn(note, t("deleteAsk", { name }), t("delete"), () =>
      attempt(async () => {
        await library.deletePreset(file);
        await show();
        field.focus();
      }),
    );
  const show = async () => {
    const presets = await library.presets();
    note.replaceChildren();
    const entries = presets.map((preset) =>
      h(
        "div",
        { class: "lw-preset" },
        h(
          "button",
          { type: "button", class: "lw-menu-item", click: () => take(preset, false) },
          h("span", {}, preset.name),
        ),
        iconButton("append", `${preset.name}: ${t("append")}`, () => take(preset, true)),
        iconButton("trash", `${preset.name}: ${t("delete")}`, () => remove(preset)),
      ),
    );
    list.replaceChildren(
      ...(entries.length ? entries : [h("div", { class: "lw-note" }, t("noPresets"))]),
    );
  };
  const button = h(
    "button",
    { type: "button", class: "lw-solid-button", title: t("savePreset"), click: () => save() },
    t("save"),
  );
  const content = h(
    "div",
    { class: "lw-panel" },
    list,
    h("div", { class: "lw-line" }, field, button),
    note,
  );
  const popover = openPopover(anchor, content, { label: t("presets"), align: "end", focus: field });
  void attempt(show);
}

/**
 * @param {HTMLElement} anchor
 * @param {import("./library.mjs").Library} library
 * @param {(rows: Partial<import("./rows.mjs").Row>[]) => void} use
 */
export function openPaste(anchor, library, use) {
  const note = h("div", { class: "lw-note", role: "status" });
  const area = h("textarea", {
    class: "lw-field",
    rows: 4,
    spellcheck: "false",
    placeholder: "<lora:name:0.8> <lora:other:0.6:0.4>",
    "aria-label": t("pasteText"),
    keydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && void take(),
  });
  const take = async () => {
    const names = await library.renew().catch(() => []);
    const rows = parseLoraText(area.value, names);
    if (!rows.length) {
      note.textContent = t("noText");
      return;
    }
    popover.close();
    use(rows);
  };
  const button = h(
    "button",
    { type: "button", class: "lw-solid-button", click: () => void take() },
    t("addLora"),
  );
  const content = h(
    "div",
    { class: "lw-panel" },
    area,
    h("div", { class: "lw-line" }, note, button),
  );
  const popover = openPopover(anchor, content, {
    label: t("pasteText"),
    align: "end",
    focus: area,
  });
}
