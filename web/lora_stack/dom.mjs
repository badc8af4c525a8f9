/** Elements, icons and popovers. */

/**
 * @typedef {Node | string | null | undefined | false} Child
 * @typedef {{[name: string]: string | number | boolean | null | undefined | ((event: any) => void)}} Props
 */

/**
 * An element. Props that are functions listen to the event of their name, others are attributes.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Props} [props]
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else setAttribute(element, name, value);
  }
  element.append(
    .../** @type {(Node | string)[]} */ (children.filter((child) => child || child === "")),
  );
  return element;
}

/**
 * @param {Element} element
 * @param {string} name
 * @param {string | number | boolean | null | undefined} value  true: without a value; false, null: not there.
 */
export function setAttribute(element, name, value) {
  if (value === false || value === null || value === undefined) element.removeAttribute(name);
  else {
    const text = value === true ? "" : String(value);
    if (element.getAttribute(name) !== text) element.setAttribute(name, text);
  }
}

/**
 * @param {Element} element
 * @param {string} text
 */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const ICONS = {
  add: "M8 3v10M3 8h10",
  alert: "M8 2.5 14 13.5H2L8 2.5zM8 6.5v3.2M8 11.4v.4",
  append: "M3 4h10M3 8h6M3 12h6M12 9v5M9.5 11.5h5",
  bookmark: "M4.5 2.5h7v11L8 10.8l-3.5 2.7z",
  close: "M4 4l8 8M12 4l-8 8",
  dots: "M8 3.5v.01M8 8v.01M8 12.5v.01",
  grip: "M6 4v.01M10 4v.01M6 8v.01M10 8v.01M6 12v.01M10 12v.01",
  link: "M6.5 9.5l3-3M7.2 4.8l1-1a2.6 2.6 0 0 1 3.9 3.6l-1.3 1.3M8.8 11.2l-1 1a2.6 2.6 0 0 1-3.9-3.6l1.3-1.3",
  search: "M7 2.5a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9zM10.5 10.5l3 3",
  sliders: "M4 3v5.5M4 11.5V13M8 3v1.5M8 7.5V13M12 3v6.5M12 12.5v.5M2.5 10h3M6.5 6h3M10.5 11h3",
  sort: "M5 3v10M2.8 10.8 5 13l2.2-2.2M9 4h4.5M9 8h3.3M9 12h2",
  text: "M5.5 4 2.5 8l3 4M10.5 4l3 4-3 4",
  trash: "M3 4.5h10M6.2 4.5V3h3.6v1.5M4.5 4.5l.6 8.5h5.8l.6-8.5",
  unlink:
    "M9.2 5.4l1-1a2.3 2.3 0 0 1 3.3 3.3l-1 1M6.8 10.6l-1 1a2.3 2.3 0 0 1-3.3-3.3l1-1M5.3 3l.5 1.7M3 5.3l1.7.5M10.7 13l-.5-1.7M13 10.7l-1.7-.5",
};

/** @param {keyof typeof ICONS} name */
export function icon(name) {
  const svg = svgElement("svg", { viewBox: "0 0 16 16", class: "lw-icon", "aria-hidden": "true" });
  svg.append(svgElement("path", { d: ICONS[name] }));
  return svg;
}

/**
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 */
export function svgElement(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  return element;
}

/**
 * A button with an icon; its label is read out and shown on hover.
 * @param {keyof typeof ICONS} name
 * @param {string} label
 * @param {(event: MouseEvent) => void} click
 * @param {Props} [props]
 */
export function iconButton(name, label, click, props = {}) {
  const common = { type: "button", class: "lw-button", title: label, "aria-label": label };
  return h("button", { ...common, click, ...props }, icon(name));
}

/**
 * @typedef {{close: (refocus?: boolean) => void, element: HTMLElement, anchor: Element}} Popover
 */

/** @type {Popover | null} */
let current = null;

/** Close the popover that is open, if any: all of them, or one that was opened from inside `owner`. */
export function closePopover(/** @type {Element | undefined} */ owner = undefined) {
  if (current && (!owner || owner.contains(current.anchor))) current.close(false);
}

/**
 * Show `content` beside `anchor`, above everything. It closes by Escape, by a click elsewhere, or when
 * its anchor goes; another one that is open closes first.
 * @param {Element} anchor
 * @param {HTMLElement} content
 * @param {{label: string, role?: string, align?: "start" | "end", closed?: () => void, focus?: HTMLElement | null}} options
 * @returns {Popover}
 */
export function openPopover(anchor, content, options) {
  closePopover();
  const { label, role = "dialog", align = "start", closed, focus } = options;
  const element = h(
    "div",
    { class: "lw-popover", role, "aria-label": label, tabindex: -1 },
    content,
  );
  const end = new AbortController();
  const { signal } = end;
  const place = () => placeBy(element, anchor, align);
  /** @param {boolean} [refocus] */
  const close = (refocus = true) => {
    if (current !== popover) return;
    current = null;
    end.abort();
    sized.disconnect();
    element.remove();
    closed?.();
    if (refocus && anchor instanceof HTMLElement) anchor.focus();
  };
  const popover = { close, element, anchor };
  const sized = new ResizeObserver(place);
  // The host's own shortcuts (Delete removes nodes, "q" opens a panel) are not meant in here.
  element.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.preventDefault();
      close();
    }
    if (!(event.ctrlKey || event.metaKey) || isTyping(event)) event.stopPropagation();
  });
  for (const kind of ["wheel", "pointerdown", "contextmenu"]) {
    element.addEventListener(kind, (event) => event.stopPropagation());
  }
  const outside = (/** @type {Event} */ event) => {
    if (!(event.target instanceof Node) || !element.contains(event.target)) close(false);
  };
  document.addEventListener("pointerdown", outside, { capture: true, signal });
  document.addEventListener("wheel", outside, { capture: true, signal });
  window.addEventListener("resize", () => close(false), { signal });
  document.body.append(element);
  current = popover;
  place();
  sized.observe(element);
  (focus ?? element).focus({ preventScroll: true });
  return popover;
}

/**
 * Below the anchor, or above it where there is more room; always within the window.
 * @param {HTMLElement} element
 * @param {Element} anchor
 * @param {"start" | "end"} align
 */
function placeBy(element, anchor, align) {
  const gap = 4;
  const edge = 8;
  const at = anchor.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = element;
  const below = window.innerHeight - at.bottom - gap - edge;
  const top = height <= below || at.top < below ? at.bottom + gap : at.top - gap - height;
  const left = align === "end" ? at.right - width : at.left;
  element.style.top = `${clampTo(top, edge, window.innerHeight - height - edge)}px`;
  element.style.left = `${clampTo(left, edge, window.innerWidth - width - edge)}px`;
}

/**
 * @param {number} value
 * @param {number} low
 * @param {number} high
 */
function clampTo(value, low, high) {
  return Math.max(low, Math.min(value, high));
}

/**
 * Whether an event belongs to a field that text is typed into.
 * @param {Event} event
 */
export function isTyping(event) {
  return event.target instanceof HTMLInputElement || event.target instanceof HTMLTextAreaElement;
}
