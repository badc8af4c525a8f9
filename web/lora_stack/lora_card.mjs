/** What is known about a LoRA file, as a card: beside the picker's list, on hover, and as information. */

import { h } from "./dom.mjs";
import { folderOf, stem } from "./rows.mjs";
import { t } from "./texts.mjs";

const HOVER_MS = 450;

/**
 * A card that fills itself as the answers come.
 * @param {string} name
 * @param {import("./library.mjs").Library} library
 * @param {(route: string) => string} urlOf  The host's `api.apiURL`.
 * @param {...HTMLElement} more  Shown below.
 */
export function loraCard(name, library, urlOf, ...more) {
  const picture = h("div", { class: "lw-card-picture" }, h("span", {}, initials(name)));
  const facts = h("dl", { class: "lw-facts" }, ...fact(t("loading"), ""));
  void showPreview(picture, name, library, urlOf);
  library.info(name).then(
    (info) => facts.replaceChildren(...factsOf(info)),
    (error) => facts.replaceChildren(...fact(t("loadFailed", { reason: error.message }), "")),
  );
  return h(
    "div",
    { class: "lw-card" },
    picture,
    h("div", { class: "lw-card-title" }, stem(name)),
    folderOf(name) && h("div", { class: "lw-card-folder" }, folderOf(name)),
    facts,
    ...more,
  );
}

/**
 * @param {HTMLElement} picture
 * @param {string} name
 * @param {import("./library.mjs").Library} library
 * @param {(route: string) => string} urlOf
 */
async function showPreview(picture, name, library, urlOf) {
  const route = await library.preview(name).catch(() => null);
  if (route === null) return;
  const image = h("img", { alt: "", load: () => picture.replaceChildren(image) });
  image.src = urlOf(route); // a file without a picture has an error instead: the initials stay
}

/** @param {string} name */
function initials(name) {
  const words = stem(name)
    .split(/[^\p{L}\p{N}]+/u)
    .filter(Boolean);
  return words
    .slice(0, 2)
    .map((word) => word[0].toUpperCase())
    .join("");
}

/** @param {import("./library.mjs").LoraInfo} info */
function factsOf(info) {
  const ranks = [...new Set(info.ranks)].sort((a, b) => a - b);
  const span = ranks.length > 2 ? `${ranks[0]} – ${ranks[ranks.length - 1]}` : ranks.join(", ");
  return [
    ...fact(t("base"), info.family || t("unknown")),
    ...fact(t("type"), [info.type, span && `rank ${span}`].filter(Boolean).join(", ")),
    ...fact(t("layers"), String(info.num_layers)),
    ...fact(t("size"), megabytes(info.size_bytes)),
    ...(info.trigger_words ? fact(t("triggers"), info.trigger_words) : []),
  ];
}

/**
 * @param {string} name
 * @param {string} value
 */
function fact(name, value) {
  return [h("dt", {}, name), h("dd", {}, value)];
}

/** @param {number} bytes */
function megabytes(bytes) {
  const mb = bytes / 1e6;
  return `${mb >= 10 ? Math.round(mb) : mb.toFixed(1)} MB`;
}

/** A card that is shown beside the node while the pointer rests on a row. */
export class HoverCard {
  constructor() {
    this.timer = 0;
    /** @type {HTMLElement | null} */
    this.element = null;
  }

  /**
   * @param {Element} node
   * @param {Element} anchor
   * @param {() => HTMLElement | false} make
   */
  show(node, anchor, make) {
    this.timer = window.setTimeout(() => {
      const card = anchor.isConnected && make();
      if (!card) return;
      const element = h("div", { class: "lw-hover" }, card);
      this.element = element;
      document.body.append(element);
      // its height changes as the answers come
      new ResizeObserver(() => placeBeside(element, node, anchor)).observe(element);
    }, HOVER_MS);
  }

  hide() {
    window.clearTimeout(this.timer);
    this.element?.remove();
    this.element = null;
  }
}

/**
 * Beside the node, at the height of `anchor`, within the window.
 * @param {HTMLElement} card
 * @param {Element} node
 * @param {Element} anchor
 */
function placeBeside(card, node, anchor) {
  const gap = 8;
  const at = node.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = card;
  const fits = at.right + 2 * gap + width < window.innerWidth;
  const top = Math.min(anchor.getBoundingClientRect().top, window.innerHeight - height - gap);
  card.style.left = `${Math.max(gap, fits ? at.right + gap : at.left - gap - width)}px`;
  card.style.top = `${Math.max(gap, top)}px`;
}
