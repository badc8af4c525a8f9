/**
 * The rows of a stack: changed by actions, and written as the widget's value. No DOM here.
 *
 * @typedef {{[name: string]: number}} BlockWeights
 * @typedef {{
 *   on: boolean, name: string, model: number, clip?: number,
 *   blocks?: BlockWeights | string | number[], schedule?: string, [other: string]: unknown
 * }} Row  A row; without `clip` the text encoder has the model's strength.
 * @typedef {{v: number, rows: Row[], [other: string]: unknown}} Stack
 * @typedef {"name" | "strength" | "on"} SortKey
 * @typedef {{type: "add", rows: Partial<Row>[], at?: number}
 *   | {type: "remove" | "duplicate" | "link" | "unlink", index: number}
 *   | {type: "move", from: number, to: number}
 *   | {type: "toggle", index: number}
 *   | {type: "toggleAll"}
 *   | {type: "rename", index: number, name: string}
 *   | {type: "model" | "clip", index: number, value: number}
 *   | {type: "blocks", index: number, blocks: BlockWeights}
 *   | {type: "schedule", index: number, text: string}
 *   | {type: "sort", by: SortKey}
 *   | {type: "replace", rows: Partial<Row>[]}} Action
 */

const VERSION = 1;

/** @returns {Stack} */
export function emptyStack() {
  return { v: VERSION, rows: [] };
}

/** @param {Stack} stack */
export function serialise(stack) {
  return JSON.stringify(stack);
}

/**
 * The value as the text that the widget keeps: text stays as it is, also where it can't be read.
 * @param {unknown} value
 */
export function asText(value) {
  if (typeof value === "string") return value;
  return value === null || value === undefined ? "" : JSON.stringify(value);
}

/**
 * A row with the defaults of one that is added.
 * @param {Partial<Row>} given
 * @returns {Row}
 */
export function newRow(given) {
  return { on: true, name: "", model: 1, ...given };
}

/**
 * The strength on the text encoder: its own, or the model's where linked.
 * @param {Row} row
 */
export function clipOf(row) {
  return row.clip ?? row.model;
}

/**
 * "all", "none" or "some" of the rows are on.
 * @param {Stack} stack
 */
export function onState(stack) {
  const on = stack.rows.filter((row) => row.on).length;
  return on === 0 ? "none" : on === stack.rows.length ? "all" : "some";
}

/**
 * The stack after an action; the same object where it changes nothing.
 * @param {Stack} stack
 * @param {Action} action
 * @returns {Stack}
 */
export function reduce(stack, action) {
  const { rows } = stack;
  switch (action.type) {
    case "add":
      return added(stack, action.rows, action.at ?? rows.length);
    case "duplicate":
      return rows[action.index] ? added(stack, [rows[action.index]], action.index + 1) : stack;
    case "remove":
      return withRows(
        stack,
        rows.filter((_, index) => index !== action.index),
      );
    case "move":
      return moved(stack, action.from, action.to);
    case "toggle":
      return changed(stack, action.index, (row) => ({ ...row, on: !row.on }));
    case "toggleAll": {
      const on = onState(stack) !== "all";
      return withRows(
        stack,
        rows.map((row) => (row.on === on ? row : { ...row, on })),
      );
    }
    case "rename":
      return changed(stack, action.index, (row) => ({ ...row, name: action.name }));
    case "model":
      return changed(stack, action.index, (row) => ({ ...row, model: action.value }));
    case "clip":
      return changed(stack, action.index, (row) => ({ ...row, clip: action.value }));
    case "unlink":
      return changed(stack, action.index, (row) => ({ ...row, clip: clipOf(row) }));
    case "link":
      return changed(stack, action.index, (row) => without(row, "clip"));
    case "blocks":
      return changed(stack, action.index, (row) =>
        Object.keys(action.blocks).length
          ? { ...row, blocks: action.blocks }
          : without(row, "blocks"),
      );
    case "schedule":
      return changed(stack, action.index, (row) =>
        action.text.trim() ? { ...row, schedule: action.text.trim() } : without(row, "schedule"),
      );
    case "sort":
      return withRows(stack, sorted(rows, action.by));
    case "replace":
      return withRows(stack, action.rows.map(newRow));
  }
}

/**
 * @param {Stack} stack
 * @param {Row[]} rows
 */
function withRows(stack, rows) {
  const same =
    rows.length === stack.rows.length && rows.every((row, index) => row === stack.rows[index]);
  return same ? stack : { ...stack, rows };
}

/**
 * @param {Stack} stack
 * @param {Partial<Row>[]} given
 * @param {number} at
 */
function added(stack, given, at) {
  const rows = [...stack.rows];
  rows.splice(at, 0, ...given.map((row) => structuredClone(newRow(row))));
  return withRows(stack, rows);
}

/**
 * @param {Stack} stack
 * @param {number} from
 * @param {number} to  Is clamped to the list.
 */
function moved(stack, from, to) {
  if (!stack.rows[from]) return stack;
  const rows = [...stack.rows];
  const [row] = rows.splice(from, 1);
  rows.splice(Math.max(0, Math.min(to, rows.length)), 0, row);
  return withRows(stack, rows);
}

/**
 * @param {Stack} stack
 * @param {number} index
 * @param {(row: Row) => Row} change
 */
function changed(stack, index, change) {
  const before = stack.rows[index];
  if (!before) return stack;
  const after = change(before);
  if (JSON.stringify(after) === JSON.stringify(before)) return stack;
  return withRows(
    stack,
    stack.rows.map((row) => (row === before ? after : row)),
  );
}

/**
 * @param {Row} row
 * @param {string} key
 * @returns {Row}
 */
function without(row, key) {
  const { [key]: _, ...rest } = row;
  return /** @type {Row} */ (rest);
}

/**
 * By file name from a to z, by strength from strong to weak, or those that are on first.
 * @param {Row[]} rows
 * @param {SortKey} by
 */
function sorted(rows, by) {
  const names = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  /** @type {Record<SortKey, (a: Row, b: Row) => number>} */
  const orders = {
    name: (a, b) => names.compare(stem(a.name), stem(b.name)),
    strength: (a, b) => Math.abs(b.model) - Math.abs(a.model),
    on: (a, b) => Number(b.on) - Number(a.on),
  };
  return [...rows].sort(orders[by]);
}

/**
 * A name with "/" between folders, whatever the system of the server.
 * @param {string} name
 */
export function slashed(name) {
  return name.replaceAll("\\", "/");
}

/**
 * A name without the ending of a LoRA file; other dots belong to the name.
 * @param {string} name
 */
export function withoutEnding(name) {
  return name.replace(/\.(safetensors|sft|ckpt|pt2?|bin|pth|pkl)$/i, "");
}

/**
 * The file's name without folders and ending.
 * @param {string} name
 */
export function stem(name) {
  return withoutEnding(slashed(name).split("/").pop() ?? "");
}

/**
 * The folders before the file's name.
 * @param {string} name
 */
export function folderOf(name) {
  return slashed(name).split("/").slice(0, -1).join("/");
}
