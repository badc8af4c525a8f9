/** Block weights by name: which counts, how they are changed and read. */

import assert from "node:assert/strict";
import test from "node:test";

import {
  byKind,
  canonical,
  changedBlocks,
  formatBlocks,
  parseBlocks,
  weightOf,
  withBlock,
} from "../../web/lora_stack/blocks.mjs";

const BLOCKS = ["BASE", "IN04", "IN05", "MID00", "OUT00", "OUT10"];

test("the most exact name counts, in whatever order", () => {
  const weights = { ALL: 0.1, OUT: 0.2, "OUT5-10": 0.3, OUT10: 0.4, in4: 0.5 };
  const wanted = {
    BASE: 0.1,
    IN04: 0.5,
    IN05: 0.1,
    MID00: 0.1,
    OUT00: 0.2,
    OUT10: 0.4,
    OUT07: 0.3,
  };
  const reversed = Object.fromEntries(Object.entries(weights).reverse());
  for (const [block, weight] of Object.entries(wanted)) {
    assert.equal(weightOf(weights, block), weight, block);
    assert.equal(weightOf(reversed, block), weight, block);
  }
  assert.equal(weightOf({}, "IN04"), 1);
});

test("names in other spellings", () => {
  const cases = {
    in4: "IN04",
    " out10 ": "OUT10",
    M00: "MID",
    "*": "ALL",
    "in1-4": "IN01-04",
    base: "BASE",
    Double7: "DOUBLE07",
  };
  for (const [name, wanted] of Object.entries(cases)) assert.equal(canonical(name), wanted);
});

test("a block that is set to what it has anyway needs no name", () => {
  assert.deepEqual(withBlock({}, "IN04", 0.5), { IN04: 0.5 });
  assert.deepEqual(withBlock({ in4: 0.5 }, "IN04", 1), {});
  assert.deepEqual(withBlock({ OUT: 0.8 }, "OUT00", 1), { OUT: 0.8, OUT00: 1 });
  assert.deepEqual(withBlock({ OUT: 0.8, OUT00: 1 }, "OUT00", 0.8), { OUT: 0.8 });
  assert.equal(changedBlocks({ OUT: 0.8, IN04: 1 }, BLOCKS), 2);
});

test("blocks come by kind", () => {
  assert.deepEqual(byKind(BLOCKS), [
    ["BASE", ["BASE"]],
    ["IN", ["IN04", "IN05"]],
    ["MID", ["MID00"]],
    ["OUT", ["OUT00", "OUT10"]],
  ]);
});

test("names and weights are read as they are written", () => {
  const weights = { IN04: 0.5, OUT: 0.8 };
  assert.deepEqual(parseBlocks(formatBlocks(weights)), { weights });
  assert.deepEqual(parseBlocks("in4: .5; OUT : 0.8"), { weights });
  assert.deepEqual(parseBlocks('{"IN04": 0.5, "out": 0.8}'), { weights });
  for (const text of ["IN04=0.5\nOUT=0.8", "SD-OUT:IN04=0.5, OUT=0.8"])
    assert.deepEqual(parseBlocks(text), { weights });
  for (const text of [" ", "[]", "{}", "[ ]", ","])
    assert.deepEqual(parseBlocks(text), { weights: {} });
  assert.deepEqual(parseBlocks("IN04:0.5"), { weights: { IN04: 0.5 } });
});

test("number vectors are left to the server", () => {
  assert.deepEqual(parseBlocks("1,0,0.5"), { vector: "1,0,0.5" });
  assert.deepEqual(parseBlocks("[1, 0, .5]"), { vector: "1,0,.5" });
  assert.deepEqual(parseBlocks("SD-OUTALL: 1,0,0"), { vector: "1,0,0" });
  assert.deepEqual(parseBlocks("17:1,0,0"), { vector: "1,0,0" });
});

test("what can't be read is named", () => {
  const texts = ["IN04", "IN04=much", "{", '{"IN04": "1"}', '{"IN04": null}', "1", "IN04=1, 3x=2", "A:1,x", "IN04:1, OUT"];
  for (const text of [...texts, '{"IN04": 1e999}', "IN04=1e999"]) {
    assert.ok("problem" in parseBlocks(text), text);
  }
});
