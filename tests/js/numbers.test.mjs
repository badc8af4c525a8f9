/** Strengths as people drag, roll and type them. */

import assert from "node:assert/strict";
import test from "node:test";

import {
  clamp,
  compact,
  dragged,
  percent,
  shown,
  stepOf,
  stepped,
  typed,
} from "../../web/lora_stack/numbers.mjs";

test("keys choose the step", () => {
  assert.deepEqual(
    [{}, { shiftKey: true }, { ctrlKey: true }, { metaKey: true }].map(stepOf),
    [0.05, 0.01, 0.5, 0.5],
  );
});

test("a drag goes by steps from where it began, and back exactly", () => {
  assert.equal(dragged(0.8, 0, {}), 0.8);
  assert.equal(dragged(0.8, 3, {}), 0.8);
  assert.equal(dragged(0.8, 8, {}), 0.9);
  assert.equal(dragged(0.8, -64, {}), 0);
  assert.equal(dragged(0.8, 8, { shiftKey: true }), 0.82);
  assert.equal(dragged(0.333, 4, {}), 0.383);
  assert.equal(dragged(99.9, 400, {}), 100);
});

test("steps go to the next multiple", () => {
  assert.equal(stepped(0.8, 1, {}), 0.85);
  assert.equal(stepped(0.83, 1, {}), 0.85);
  assert.equal(stepped(0.83, -1, {}), 0.8);
  assert.equal(stepped(0.05, -1, {}), 0);
  assert.equal(stepped(0, -1, { shiftKey: true }), -0.01);
  assert.ok(Object.is(stepped(-0.05, 1, {}), 0));
  let value = 0;
  for (let n = 0; n < 100; n += 1) value = stepped(value, 1, { shiftKey: true });
  assert.equal(value, 1);
});

test("numbers are typed in many ways", () => {
  const cases = {
    0.8: 0.8,
    "0,8": 0.8,
    ".8": 0.8,
    "-1": -1,
    "+.25": 0.25,
    " 80 % ": 0.8,
    "1.": 1,
    "1e9": NaN,
    "": NaN,
    abc: NaN,
    "1.2.3": NaN,
    500: 100,
  };
  for (const [text, wanted] of Object.entries(cases))
    assert.ok(Object.is(typed(text), wanted), text);
});

test("numbers are shown with two decimals, or all they have", () => {
  assert.deepEqual([0.8, 1, -0.35, 0.123, 0.12345].map(shown), [
    "0.80",
    "1.00",
    "-0.35",
    "0.123",
    "0.1235",
  ]);
  assert.equal(shown(0.4 - 0.5), "-0.10"); // whose sum is -0.09999999999999998
  assert.deepEqual([0.8, 1, 0.00001].map(compact), ["0.8", "1", "0"]);
  assert.deepEqual([0, 0.004, 0.305, 1].map(percent), ["0%", "<1%", "31%", "100%"]);
  assert.equal(clamp(0.1 + 0.2), 0.3);
});
