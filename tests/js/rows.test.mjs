/** The rows' value: read in every spelling, changed by actions, written back without a loss. */

import assert from "node:assert/strict";
import test from "node:test";

import { parse } from "../../web/lora_stack/row_reading.mjs";
import {
  asText,
  clipOf,
  folderOf,
  onState,
  reduce,
  serialise,
  stem,
} from "../../web/lora_stack/rows.mjs";

const STACK = {
  v: 1,
  rows: [
    { on: true, name: "people/anna.safetensors", model: 0.8 },
    { on: false, name: "styles/ink 2.safetensors", model: -0.5, clip: 0.25, blocks: { IN04: 0.5 } },
    { on: true, name: "Ink 10.safetensors", model: 0.3, schedule: "0:0, 1:1" },
  ],
};
const names = (stack) => stack.rows.map((row) => stem(row.name));
const frozen = (value) => {
  if (value && typeof value === "object") Object.values(value).forEach(frozen);
  return Object.freeze(value);
};

test("a value is written as it was read", () => {
  assert.deepEqual(parse(serialise(STACK)), STACK);
  assert.deepEqual(parse(JSON.parse(serialise(STACK))), STACK);
  assert.deepEqual(parse(""), { v: 1, rows: [] });
});

test("keys that are not known here are kept, of rows and of the whole", () => {
  const given = { v: 1, note: "mine", rows: [{ on: true, name: "a", model: 1, group: { id: 3 } }] };
  const edited = reduce(parse(JSON.stringify(given)), { type: "toggle", index: 0 });
  assert.deepEqual(edited, { ...given, rows: [{ ...given.rows[0], on: false }] });
});

test("rows of other nodes are read", () => {
  const wanted = { on: false, name: "a.safetensors", model: 0.5, clip: 0.25 };
  const rgthree = { on: false, lora: "a.safetensors", strength: 0.5, strengthTwo: 0.25 };
  const manager = { active: false, name: "a.safetensors", strength: "0.5", clipStrength: "0.25" };
  const core = {
    enabled: false,
    lora_name: "a.safetensors",
    strength_model: 0.5,
    strength_clip: 0.25,
  };
  for (const row of [rgthree, manager, core]) {
    assert.deepEqual(parse({ rows: [row] }).rows, [wanted]);
    assert.deepEqual(parse({ __value__: [row] }).rows, [wanted]);
    assert.deepEqual(parse([row]).rows, [wanted]);
    assert.deepEqual(parse({ lora_1: row }).rows, [wanted]);
  }
  assert.equal("clip" in parse([{ ...rgthree, strengthTwo: null }]).rows[0], false);
});

test("core's inputs are read as they are, in their order", () => {
  const rows = Array.from({ length: 12 }, (_, n) => ({
    lora_name: `${n}.safetensors`,
    strength: n / 10,
    enabled: n !== 3,
  }));
  const flat = Object.fromEntries(
    rows.flatMap((row, n) =>
      Object.entries(row).map(([key, value]) => [`loras.${n}.${key}`, value]),
    ),
  );
  const found = parse({ rows });
  assert.deepEqual(found.rows[3], { on: false, name: "3.safetensors", model: 0.3 });
  assert.deepEqual(parse({ loras: rows }), found);
  assert.deepEqual(parse({ model: ["4", 0], loras: 12, ...flat }), found);
  assert.deepEqual(parse(Object.fromEntries(Object.entries(flat).reverse())), found);
  assert.deepEqual(parse({ loras: [] }), { v: 1, rows: [] });
});

test('a row of other nodes that is called "None" is one without a LoRA, and off', () => {
  const wanted = [{ on: false, name: "", model: 0.5 }];
  for (const name of ["None", " None "])
    assert.deepEqual(parse([{ on: true, lora: name, strength: 0.5 }]).rows, wanted);
});

test("blocks and schedules that say nothing are left out", () => {
  const plain = { on: true, name: "a", model: 1 };
  for (const blocks of [null, "", {}, [], "  ", "[]", "{ }", " [ ] "])
    assert.deepEqual(parse([{ ...plain, blocks }]).rows, [plain]);
  for (const schedule of [null, "", " "])
    assert.deepEqual(parse([{ ...plain, schedule }]).rows, [plain]);
  const kept = { ...plain, blocks: "1,0,1", schedule: "0:0" };
  assert.deepEqual(parse([kept]).rows, [kept]);
});

test("what can't be read is refused, and its text kept", () => {
  for (const text of [
    "{",
    "3",
    '{"a": 1}',
    '{"loras": "a"}',
    '[{"name": "a", "model": "much"}]',
    '[{"name": "a", "model": true}]',
    '[{"name": "a", "model": 1e999}]',
    '[{"name": "a", "blocks": {"IN04": 1e999}}]',
    '[{"name": "a", "blocks": {"IN04": null}}]',
    "[3]",
  ]) {
    assert.throws(() => parse(text), Error, text);
    assert.equal(asText(text), text);
  }
  assert.equal(asText({ rows: [] }), '{"rows":[]}');
  assert.equal(asText(null), "");
});

test("actions leave the stack before them as it was", () => {
  const before = frozen(structuredClone(STACK));
  const actions = [
    { type: "add", rows: [{ name: "b" }] },
    ...["remove", "duplicate", "link", "unlink", "toggle"].map((type) => ({ type, index: 1 })),
    { type: "move", from: 2, to: 0 },
    { type: "toggleAll" },
    { type: "rename", index: 0, name: "c" },
    { type: "model", index: 0, value: 2 },
    { type: "clip", index: 0, value: 2 },
    { type: "blocks", index: 0, blocks: { MID: 0 } },
    { type: "schedule", index: 0, text: "0:1, 1:0" },
    { type: "sort", by: "on" },
    { type: "replace", rows: [] },
  ];
  for (const action of actions) {
    const after = reduce(before, action);
    if (action.type !== "unlink") assert.notDeepEqual(after, before, action.type);
    assert.deepEqual(parse(serialise(after)), after, action.type);
  }
  assert.deepEqual(before, STACK);
});

test("an action that changes nothing gives the same object", () => {
  for (const action of [
    { type: "move", from: 1, to: 1 },
    { type: "move", from: 9, to: 1 },
    { type: "remove", index: 9 },
    { type: "duplicate", index: -1 },
    { type: "model", index: 0, value: 0.8 },
    { type: "toggle", index: 3 },
    { type: "link", index: 0 },
    { type: "blocks", index: 0, blocks: {} },
    { type: "schedule", index: 0, text: " " },
    { type: "sort", by: "strength" },
  ]) {
    assert.equal(reduce(STACK, action), STACK, JSON.stringify(action));
  }
});

test("rows are added with defaults, moved, duplicated and removed", () => {
  const added = reduce(STACK, { type: "add", rows: [{ name: "b.safetensors" }], at: 1 });
  assert.deepEqual(added.rows[1], { on: true, name: "b.safetensors", model: 1 });
  assert.deepEqual(names(reduce(STACK, { type: "move", from: 0, to: 2 })), [
    "ink 2",
    "Ink 10",
    "anna",
  ]);
  assert.deepEqual(names(reduce(STACK, { type: "move", from: 2, to: -5 })), [
    "Ink 10",
    "anna",
    "ink 2",
  ]);
  assert.deepEqual(names(reduce(STACK, { type: "remove", index: 1 })), ["anna", "Ink 10"]);
  const twice = reduce(STACK, { type: "duplicate", index: 1 });
  assert.deepEqual(twice.rows[2], STACK.rows[1]);
  assert.notEqual(twice.rows[2].blocks, twice.rows[1].blocks);
});

test("switching all is on from none or some, off from all", () => {
  assert.equal(onState(STACK), "some");
  const all = reduce(STACK, { type: "toggleAll" });
  assert.equal(onState(all), "all");
  assert.equal(onState(reduce(all, { type: "toggleAll" })), "none");
});

test("the clip strength is the model's until it is unlinked, also when it is typed", () => {
  assert.equal(clipOf(STACK.rows[0]), 0.8);
  const own = reduce(STACK, { type: "unlink", index: 0 });
  assert.equal(own.rows[0].clip, 0.8);
  const moved = reduce(own, { type: "model", index: 0, value: 0.1 });
  assert.equal(clipOf(moved.rows[0]), 0.8);
  assert.equal(clipOf(reduce(moved, { type: "link", index: 0 }).rows[0]), 0.1);
  assert.equal(reduce(STACK, { type: "clip", index: 0, value: 0 }).rows[0].clip, 0);
});

test("sorting: names as people count, strong ones first, those on first", () => {
  assert.deepEqual(names(reduce(STACK, { type: "sort", by: "name" })), ["anna", "ink 2", "Ink 10"]);
  const weak = reduce(STACK, { type: "model", index: 0, value: 0.1 });
  assert.deepEqual(names(reduce(weak, { type: "sort", by: "strength" })), [
    "ink 2",
    "Ink 10",
    "anna",
  ]);
  assert.deepEqual(names(reduce(STACK, { type: "sort", by: "on" })), ["anna", "Ink 10", "ink 2"]);
});

test("names of any system are taken apart", () => {
  assert.equal(stem("people\\old\\anna.v2.safetensors"), "anna.v2");
  assert.equal(folderOf("people\\old\\anna.safetensors"), "people/old");
  assert.equal(folderOf("anna.safetensors"), "");
  assert.equal(stem("v1.5"), "v1.5");
});
