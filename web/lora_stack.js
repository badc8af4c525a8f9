/** LoRA Stack's rows in ComfyUI's page: all that depends on the host's interfaces is in this file. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Library } from "./lora_stack/library.mjs";
import { parseLoraText } from "./lora_stack/lora_text.mjs";
import { StackPanel } from "./lora_stack/stack_view.mjs";
import { translate } from "./lora_stack/texts.mjs";

const TYPE = "LORA_WEAVE_ROWS";
const NODE = "LoRAWeaveStack";
const UI_KEY = "lora_weave_stack";
const MARGIN = 10; // the host's, around DOM widgets of the classic canvas
const WIDTH = 480;
const WATCH_MS = 200;
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const RENEW_MS = 500; // so long after an execution, once for all that end meanwhile

const library = new Library((route, options) => api.fetchApi(route, options));
/** @type {Map<any, Attached>}  By node. */
const attached = new Map();
/** @type {Map<string, HTMLElement>}  Elements of nodes that are gone, by the node's id. */
const left = new Map();
let renewing = 0; // the timer of `renewSoon`

/**
 * @typedef {{panel: StackPanel, node: any, widget: any, seen: string}} Attached  `seen`: the panel's
 *   state when it was last drawn.
 */

document.head.append(
  Object.assign(document.createElement("link"), {
    rel: "stylesheet",
    href: new URL("./lora_stack/stack.css", import.meta.url).href,
  }),
);

app.registerExtension({
  name: "LoRAWeave.Stack",
  async init() {
    translate(await texts());
    document.addEventListener("paste", pasteIntoSelected, true);
    for (const end of ENDS) api.addEventListener(/** @type {any} */ (end), renewSoon);
  },
  getCustomWidgets() {
    return {
      [TYPE](/** @type {any} */ node, /** @type {string} */ name) {
        return { widget: addRowsWidget(node, name) };
      },
    };
  },
  nodeCreated(/** @type {any} */ node) {
    if (node.comfyClass !== NODE) return;
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
  },
  refreshComboInNodes() {
    library.refresh().catch(() => {}); // the picker tells why, when it is opened
  },
});

window.setInterval(() => {
  for (const one of attached.values()) {
    followBlend(one);
    takePlace(one);
  }
  for (const [id, element] of left) if (!element.isConnected) left.delete(id);
}, WATCH_MS);

/**
 * The widget of the rows. Its value is a JSON string, which is replaced as a whole on every change: so
 * the host's history, clones and subgraphs see it.
 * @param {any} node
 * @param {string} name
 */
function addRowsWidget(node, name) {
  const valueOf = (/** @type {string} */ input) =>
    node.widgets?.find((/** @type {any} */ one) => one.name === input)?.value;
  const panel = new StackPanel({
    library,
    urlOf: (route) => api.apiURL(route),
    write: (value) => {
      widget.value = value;
      app.graph?.setDirtyCanvas(true, true);
    },
    record: recordChange,
    blend: () => ({
      rule: String(valueOf("normalise") ?? "off"),
      master: Number(valueOf("master") ?? 1),
      // weights that are patched once can't follow a schedule
      patches:
        valueOf("mode") === "patch" &&
        Boolean(node.isInputConnected?.(node.findInputSlot("model"))),
    }),
    resized: (before, after) => fit(node, before, after),
  });
  const widget = node.addDOMWidget(name, TYPE, panel.element, {
    getValue: () => panel.text,
    setValue: (/** @type {unknown} */ value) => panel.setValue(value),
    getMinHeight: () => panel.minHeight() + 2 * MARGIN,
    hideOnZoom: false,
    socketless: true, // a link into it from a subgraph's input could not be shown
    margin: MARGIN,
  });
  const one = { panel, node, widget, seen: panel.state() };
  widget.serializeValue = () => {
    panel.figures.queue(panel.text, panel.state());
    return widget.value;
  };
  forwardToCanvas(panel.element);
  // Nodes 2.0 would show the input's tooltip for as long as the pointer is anywhere on the rows
  panel.element.addEventListener("mouseenter", () => {
    panel.element.parentElement?.dispatchEvent(new MouseEvent("mouseleave"));
  });
  chain(node, "onExecuted", (/** @type {any} */ output) => {
    const [shown] = output?.[UI_KEY] ?? [];
    if (shown) panel.setFigures(shown);
  });
  chain(node, "onAdded", () => {
    panel.connect();
    attached.set(node, one);
    requestAnimationFrame(() => takePlace(one));
  });
  chain(node, "onRemoved", () => {
    // also where a node moves into a subgraph: it may come back
    panel.disconnect();
    attached.delete(node);
    left.set(String(node.id), panel.element);
  });
  return widget;
}

/**
 * Draw the shares anew when normalise or master have changed. Their callbacks do not tell: a subgraph's
 * promoted widget changes the value without one (1.47 and newer).
 * @param {Attached} one
 */
function followBlend(one) {
  const state = one.panel.state();
  if (state === one.seen) return;
  one.seen = state;
  one.panel.render();
}

/**
 * Show the rows where the host still shows those of an earlier node: Nodes 2.0 of 1.58 keeps the element
 * in place when a node with the same id takes over (undo, another workflow's tab).
 * @param {Attached} one
 */
function takePlace({ panel, node }) {
  const old = left.get(String(node.id));
  if (!old?.isConnected || panel.element.isConnected || node.graph !== app.canvas?.graph) return;
  old.replaceWith(panel.element);
}

/**
 * Let the node follow the rows: it grows by itself, and shrinks where it was as small as it could be.
 * @param {any} node
 * @param {number} before  The height that was needed before.
 * @param {number} after
 */
function fit(node, before, after) {
  if (!node.graph || !before) return;
  const [width, height] = node.size;
  const wanted = node.computeSize()[1];
  const slack = height - (wanted - after + before);
  if (after > before ? height < wanted : slack < 2 * MARGIN) node.setSize([width, wanted]);
  node.setDirtyCanvas(true, true);
}

/** Make what changed a step of the host's undo history. */
function recordChange() {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  if (!tracker) return;
  if (tracker.captureCanvasState)
    tracker.captureCanvasState(); // 1.4x and newer warn about the other
  else tracker.checkState();
}

/**
 * Middle-button drags pan the canvas, and in the classic canvas the wheel zooms it, unless there are
 * rows to scroll. (In Nodes 2.0 the host forwards the wheel itself.)
 * @param {HTMLElement} element
 */
function forwardToCanvas(element) {
  const handlers = {
    pointerdown: "processMouseDown",
    pointermove: "processMouseMove",
    pointerup: "processMouseUp",
  };
  for (const [kind, handler] of Object.entries(handlers)) {
    element.addEventListener(kind, (/** @type {any} */ event) => {
      const isMiddle = kind === "pointermove" ? event.buttons & 4 : event.button === 1;
      if (isMiddle) /** @type {any} */ (app.canvas)[handler](event);
    });
  }
  element.addEventListener("wheel", (event) => {
    if (!element.closest(".dom-widget")) return;
    const list = event.target instanceof Element ? event.target.closest(".lw-list") : null;
    if (list && list.scrollHeight > list.clientHeight && !event.ctrlKey) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
}

/**
 * <lora:...> text that is pasted while a stack is selected is added to it.
 * @param {ClipboardEvent} event
 */
function pasteIntoSelected(event) {
  const { target } = event;
  if (
    !(target instanceof Element) ||
    target.closest("input, textarea, [contenteditable], .lw-stack, .lw-popover")
  )
    return;
  /** @type {any[]} */
  const selected = Object.values(app.canvas?.selected_nodes ?? {});
  const one = selected.length === 1 ? attached.get(selected[0]) : undefined;
  const rows = one
    ? parseLoraText(event.clipboardData?.getData("text/plain") ?? "", library.names ?? [])
    : [];
  if (!one || !rows.length) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  one.panel.addRows(rows);
}

/** An execution may have written a LoRA file. Without a stack in sight the next one asks. */
function renewSoon() {
  if (renewing || !attached.size) return;
  renewing = window.setTimeout(() => {
    renewing = 0;
    library.renew().catch(() => {}); // the picker tells why, when it is opened
  }, RENEW_MS);
}

/** The texts of the host's language, which it merges from all packs; English ones are ours. */
async function texts() {
  const locale = String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");
  if (locale === "en") return undefined;
  const answer = await api.fetchApi("/i18n").catch(() => null);
  const all = answer?.ok ? await answer.json() : {};
  return all[locale]?.loraWeaveStack;
}

/**
 * Call ours after what a node does already on an event.
 * @param {any} node
 * @param {string} name
 * @param {(...values: any[]) => void} ours
 */
function chain(node, name, ours) {
  const theirs = node[name];
  node[name] = function (/** @type {any[]} */ ...values) {
    const result = theirs?.apply(this, values);
    ours.apply(this, values);
    return result;
  };
}
