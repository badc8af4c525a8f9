/** Schedules as text, and as a curve. */

import assert from "node:assert/strict";
import test from "node:test";

import { curve, parseSchedule } from "../../web/lora_stack/schedule.mjs";

test("points in their order, separated in any common way", () => {
  const points = [
    [0, 0],
    [0.3, 1],
    [1, -0.5],
  ];
  for (const text of ["0:0, 0.3:1, 1:-0.5", "0:0;.3:1;1:-.5;", "0 : 0\n0.3:1\n1:-5e-1"]) {
    assert.deepEqual(parseSchedule(text), { points, problems: [] });
  }
  assert.deepEqual(parseSchedule(" "), { points: [], problems: [] });
  assert.deepEqual(parseSchedule("0:0, 0.5:0, 0.5:1").problems, []);
});

test("all that is wrong is named", () => {
  const kinds = (text) => parseSchedule(text).problems.map((problem) => problem.kind);
  assert.deepEqual(kinds("0:0, x, 2:1, 0.5:"), ["point", "range", "point"]);
  assert.deepEqual(kinds("0.5:1, 0.2:0"), ["order"]);
  assert.deepEqual(kinds("0:1:2"), ["point"]);
  assert.deepEqual(kinds("0:NaN"), ["point"]);
});

test("the curve is constant outside of the points and shows 0 and 1", () => {
  const { path, low, high } = curve(
    [
      [0.25, 0],
      [0.75, 2],
    ],
    100,
    50,
  );
  assert.equal(path, "M0 50L25 50L75 0L100 0");
  assert.deepEqual([low, high], [0, 2]);
  assert.equal(curve([], 100, 50).path, "M0 0H100");
  assert.deepEqual(curve([[0, -1]], 100, 50).low, -1);
});
