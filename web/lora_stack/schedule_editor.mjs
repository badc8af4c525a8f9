/** A row's schedule as a text with its curve above. */

import { h, svgElement } from "./dom.mjs";
import { curve, parseSchedule } from "./schedule.mjs";
import { t } from "./texts.mjs";

const CURVE = { width: 300, height: 56 };
const SHAPES = /** @type {const} */ ({
  scheduleConstant: "",
  scheduleFadeIn: "0:0, 0.4:1",
  scheduleFadeOut: "0.6:1, 1:0",
});
const PROBLEMS = /** @type {const} */ ({
  point: "schedulePoint",
  range: "scheduleRange",
  order: "scheduleOrder",
});

/**
 * @param {string} text
 * @param {(text: string) => void} change  Is told schedules that can be read.
 */
export function scheduleEditor(text, change) {
  const note = h("div", { class: "lw-note", role: "status" });
  const path = svgElement("path", { class: "lw-curve-line" });
  const area = svgElement("path", { class: "lw-curve-area" });
  const box = svgElement("svg", {
    class: "lw-curve",
    viewBox: `-4 -5 ${CURVE.width + 8} ${CURVE.height + 10}`,
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  box.append(area, path);
  /** @type {HTMLInputElement} */
  const field = h("input", {
    class: "lw-field",
    type: "text",
    spellcheck: "false",
    placeholder: "0:0, 0.3:1, 1:0.5",
    "aria-label": t("schedule"),
    input: () => show(),
    change: () => take(),
    keydown: (event) => event.key === "Enter" && take(),
  });
  const show = () => {
    const { points, problems } = parseSchedule(field.value);
    const drawn = curve(points, CURVE.width, CURVE.height);
    path.setAttribute("d", drawn.path);
    area.setAttribute("d", `${drawn.path}V${CURVE.height}H0Z`);
    field.classList.toggle("lw-bad", problems.length > 0);
    const [problem] = problems;
    note.textContent = problem
      ? t(PROBLEMS[problem.kind], { part: problem.part })
      : t("scheduleHint");
    return problems.length === 0;
  };
  const take = () => {
    if (show()) change(field.value);
  };
  const shapes = Object.entries(SHAPES).map(([key, shape]) => {
    const click = () => {
      field.value = shape;
      take();
    };
    const label = t(/** @type {keyof typeof SHAPES} */ (key));
    return h("button", { type: "button", class: "lw-text-button", click }, label);
  });
  field.value = text;
  show();
  return h(
    "section",
    { "aria-label": t("schedule") },
    h("div", { class: "lw-section-head" }, h("h3", {}, t("schedule")), ...shapes),
    /** @type {Node} */ (box),
    field,
    note,
  );
}
