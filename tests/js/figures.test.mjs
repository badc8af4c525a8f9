/** Figures of an execution belong to the rows that were queued for it. */

import assert from "node:assert/strict";
import test from "node:test";

import { Figures, cosinesOf } from "../../web/lora_stack/figures.mjs";

const of = (share) => [{ row: 0, model: 1, clip: 1, share }];

test("of two prompts that wait, the first one's figures are not drawn for the second one", () => {
  const figures = new Figures();
  figures.queue("A", "A off");
  figures.queue("B", "B off");
  figures.take({ rows: of(0.1), source: "A" }, "B", "B off");
  assert.deepEqual(figures.of("B off"), []);
  assert.deepEqual(figures.of("A off"), of(0.1));
  figures.take({ rows: of(0.2), source: "B" }, "B", "B off");
  assert.deepEqual(figures.of("B off"), of(0.2));
  assert.deepEqual(figures.of("A off"), []);
});

test("rows that changed after they were queued have no figures", () => {
  const figures = new Figures();
  figures.queue("A", "A off");
  figures.take({ rows: of(0.1), source: "A" }, "A", "A sum");
  assert.deepEqual(figures.of("A sum"), []);
  assert.deepEqual(figures.of("A off"), of(0.1));
});

test("rows that this page did not send count if they are those shown", () => {
  const figures = new Figures();
  figures.take({ rows: of(0.1), source: "B" }, "A", "A off");
  assert.deepEqual(figures.of("A off"), []);
  figures.take({ rows: of(0.1), source: "A" }, "A", "A off");
  assert.deepEqual(figures.of("A off"), of(0.1));
});

test("without a source they are those of the rows last sent, or else shown", () => {
  const figures = new Figures();
  figures.take({ rows: of(0.1) }, "A", "A off");
  assert.deepEqual(figures.of("A off"), of(0.1));
  figures.queue("B", "B off");
  figures.take({}, "A", "A off");
  assert.deepEqual(figures.shown, { rows: [], state: "B off" });
});

test("only the last prompts are remembered", () => {
  const figures = new Figures();
  for (let at = 0; at < 1000; at += 1) figures.queue(`rows ${at}`, `state ${at}`);
  assert.ok(figures.sent.size < 100);
  figures.take({ rows: of(1), source: "rows 990" }, "", "");
  assert.deepEqual(figures.of("state 990"), of(1));
});

test("cosines are read as a list, whose labels may be the same, and as an object", () => {
  const list = [
    { with: "anna", cosine: 0.5 },
    { with: "anna", cosine: -0.25 },
  ];
  assert.deepEqual(cosinesOf(list), [
    ["anna", 0.5],
    ["anna", -0.25],
  ]);
  assert.deepEqual(cosinesOf({ anna: 0.5 }), [["anna", 0.5]]);
  assert.deepEqual(cosinesOf(undefined), []);
});
