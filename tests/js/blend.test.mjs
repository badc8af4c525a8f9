/** The shares and strengths that are drawn follow the server's formulas. */

import assert from "node:assert/strict";
import test from "node:test";

import { effective, shares } from "../../web/lora_stack/blend.mjs";

const ROWS = [
  { on: true, name: "a", model: 0.6, clip: 0.2 },
  { on: false, name: "b", model: 5 },
  { on: true, name: "c", model: -0.2 },
];
const near = (found, wanted) => {
  assert.equal(found.length, wanted.length);
  found.forEach((value, index) => {
    if (wanted[index] === null) assert.equal(value, null);
    else assert.ok(Math.abs(value - wanted[index]) < 1e-12, `${value}, not ${wanted[index]}`);
  });
};
const models = (rule, master = 1, rows = ROWS) =>
  effective(rows, rule, master).map((one) => one && one.model);

test("shares are parts of the sum of |strength| of the rows that are on", () => {
  near(shares(ROWS), [0.75, 0, 0.25]);
  near(shares([{ on: true, name: "a", model: 0 }]), [0]);
  near(shares([]), []);
});

test("every rule by its formula, times master", () => {
  near(models("off"), [0.6, null, -0.2]);
  near(models("off", -2), [-1.2, null, 0.4]);
  near(models("sum to 1"), [0.75, null, -0.25]);
  near(models("max to 1", 0.5), [0.5, null, -1 / 6]);
  const rms = Math.sqrt((0.36 + 0.04) / 2);
  near(models("rms to 1"), [0.6 / rms, null, -0.2 / rms]);
});

test("the text encoder's strengths are blended by themselves", () => {
  near(
    effective(ROWS, "sum to 1", 1).map((one) => one && one.clip),
    [0.5, null, -0.5],
  );
});

test("strengths that are all 0 stay so", () => {
  for (const rule of ["off", "sum to 1", "max to 1", "rms to 1"]) {
    near(models(rule, 1, [{ on: true, name: "a", model: 0 }]), [0]);
  }
});

test("what only the server knows is not guessed", () => {
  near(models("equal energy"), [null, null, null]);
  near(models("toString"), [null, null, null]);
});
