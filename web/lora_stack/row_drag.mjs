/** Rows dragged by their handle: the row follows the pointer, the others make room. */

const EDGE_PX = 24; // near the list's ends it scrolls
const SCROLL_PX = 8;

/**
 * @param {{
 *   event: PointerEvent, list: HTMLElement, rows: HTMLElement[], index: number,
 *   drop: (to: number) => void
 * }} drag
 */
export function dragRow({ event, list, rows, index, drop }) {
  const row = rows[index];
  const box = row.getBoundingClientRect();
  const scale = box.height / row.offsetHeight || 1; // the canvas zooms nodes by a transform
  const height =
    rows.length > 1 ? Math.abs(rows[1].offsetTop - rows[0].offsetTop) : row.offsetHeight;
  const scrolledFrom = list.scrollTop;
  const handle = /** @type {HTMLElement} */ (event.currentTarget);
  const end = new AbortController();
  const options = { signal: end.signal };
  let pointer = event.clientY;
  let to = index;
  let frame = 0;
  handle.setPointerCapture(event.pointerId);
  list.classList.add("lw-sorting");
  row.classList.add("lw-carried");

  const show = () => {
    const offset = (pointer - event.clientY) / scale + list.scrollTop - scrolledFrom;
    const lowest = (rows.length - 1 - index) * height;
    const shift = Math.max(-index * height, Math.min(offset, lowest));
    to = index + Math.round(shift / height);
    rows.forEach((other, at) => {
      const gap = at > index && at <= to ? -height : at < index && at >= to ? height : 0;
      other.style.transform = `translateY(${other === row ? shift : gap}px)`;
    });
  };
  const scroll = () => {
    const area = list.getBoundingClientRect();
    if (pointer < area.top + EDGE_PX) list.scrollTop -= SCROLL_PX;
    else if (pointer > area.bottom - EDGE_PX) list.scrollTop += SCROLL_PX;
    show();
    frame = requestAnimationFrame(scroll);
  };
  const finish = (/** @type {boolean} */ taken) => {
    end.abort();
    cancelAnimationFrame(frame);
    list.classList.remove("lw-sorting");
    row.classList.remove("lw-carried");
    for (const other of rows) other.style.transform = "";
    if (taken && to !== index) drop(to);
  };
  handle.addEventListener("pointermove", (next) => (pointer = next.clientY), options);
  handle.addEventListener(
    "pointerup",
    (last) => {
      pointer = last.clientY;
      show();
      finish(true);
    },
    options,
  );
  handle.addEventListener("pointercancel", () => finish(false), options);
  window.addEventListener("keydown", (key) => key.key === "Escape" && finish(false), options);
  frame = requestAnimationFrame(scroll);
}
