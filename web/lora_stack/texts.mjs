/** All texts of the stack's rows. Other languages stand in locales/<language>/main.json. */

export const ENGLISH = {
  add: "Add",
  addLora: "Add LoRA",
  allOff: "Reset",
  allOn: "Switch all on or off",
  asText: "Copy and paste as text",
  append: "Append to the rows",
  base: "Base model",
  blockAbsent: "this file does not change it",
  blockWeight: "Weight of block {block}",
  blocks: "Block weights",
  blocksBad: "Can't read {part}",
  blocksKept:
    "The sliders are off, and these weights stay as they are, until you type others or reset them: {reason}",
  blocksNone: "This file's blocks are not known.",
  blocksPlaceholder: "IN04=0.5, OUT=0.8 or the numbers of a preset",
  changedBlocks: "blocks {count}",
  choose: "Choose LoRA",
  clip: "clip",
  clipStrength: "Text encoder strength of {name}",
  copied: "Copied",
  copyFailed: "The browser refused to copy. Copy it from here:",
  copyText: "Copy as text",
  delete: "Delete",
  deleteAsk: "Delete the preset {name}?",
  discard: "Discard them",
  down: "Move down",
  drag: "Drag, or press Alt and an arrow key, to move",
  duplicate: "Duplicate",
  editBlocks: "Blocks and schedule …",
  effective: "Used strength: model {model}, clip {clip}",
  empty: "No LoRAs yet",
  emptyHint: "Add one, or paste <lora:name:0.8> text here.",
  info: "Information",
  invalid: "These rows can't be read: {reason}",
  layers: "Layers",
  link: "Use the model's strength for the text encoder",
  loadFailed: "The server can't tell: {reason}",
  loading: "Loading …",
  menu: "Menu of {name}",
  missing: "Missing file",
  missingFix: "Use {name}",
  model: "model",
  modelStrength: "Model strength of {name}",
  moved: "{name} is now {place} of {count}",
  more: "{count} more: type to narrow down",
  name: "By name",
  noMatch: "Nothing matches",
  noName: "Choose a LoRA …",
  noPresets: "No presets saved yet",
  noText: "There is no <lora:name:0.8> in this text.",
  numberHint: "Drag, roll or type. Double-click: 1",
  ofRows: "{on} of {count} on",
  onFirst: "On first",
  overlap: "Overlap with others (cosine)",
  overwrite: "Overwrite",
  overwriteAsk: "There is a preset {name} already.",
  pasteRows: "Add {count} LoRAs of this text",
  pasteText: "Paste <lora:…> text …",
  presetName: "Name of the preset",
  presets: "Presets",
  remove: "Remove",
  removeAll: "Remove all",
  removed: "{name} removed",
  row: "{place} of {count}: {name}, {state}, strength {strength}",
  rows: "LoRAs of this stack",
  save: "Save",
  savePreset: "Save these rows as a preset",
  schedule: "Schedule",
  scheduleFails: "A schedule needs mode live",
  scheduleFadeIn: "Fade in",
  scheduleFadeOut: "Fade out",
  scheduleHint: "position:factor, from 0, the start of sampling, to 1",
  scheduleConstant: "Constant",
  scheduleOrder: "{part} comes after a later position",
  schedulePoint: "{part} is no point",
  scheduleRange: "{part} is not from 0 to 1",
  search: "Search LoRAs",
  share: "share",
  size: "Size",
  sort: "Sort",
  stateOff: "off",
  stateOn: "on",
  strength: "By strength",
  toBottom: "Move to the bottom",
  toTop: "Move to the top",
  toggle: "Switch {name} on or off",
  triggers: "Trigger words",
  type: "Type",
  unlink: "Give the text encoder a strength of its own",
  unknown: "unknown",
  up: "Move up",
};

/** @typedef {keyof typeof ENGLISH} Key */

/** @type {Record<string, string>} */
let translated = {};

/**
 * Take over texts of another language; missing ones stay English.
 * @param {Record<string, string> | undefined} texts
 */
export function translate(texts) {
  translated = texts ?? {};
}

/**
 * A text with its {places} filled in.
 * @param {Key} key
 * @param {Record<string, string | number>} [values]
 */
export function t(key, values = {}) {
  return (translated[key] ?? ENGLISH[key]).replace(/\{(\w+)\}/g, (whole, name) =>
    String(values[name] ?? whole),
  );
}
