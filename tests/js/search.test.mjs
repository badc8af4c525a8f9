/** The picker's search finds what people mean, the best first. */

import assert from "node:assert/strict";
import test from "node:test";

import { search } from "../../web/lora_stack/search.mjs";

const FILES = [
  "people/anna_v2.safetensors",
  "styles/watercolour.safetensors",
  "styles/anime_banana.safetensors",
  "wat/tokens.safetensors",
  "detail-tweaker-XL.safetensors",
];
const found = (query) => search(query, FILES).map((hit) => hit.name);

test("without a query, everything in its order", () => {
  assert.deepEqual(found(""), FILES);
  assert.deepEqual(found("  "), FILES);
});

test("the start of a file's name comes first, folders last", () => {
  assert.deepEqual(found("wat").slice(0, 2), [FILES[1], FILES[3]]);
  assert.equal(found("anna")[0], FILES[0]);
});

test("every word counts, in any order and from folders too", () => {
  assert.deepEqual(found("styles anime"), [FILES[2]]);
  assert.deepEqual(found("xl detail"), [FILES[4]]);
  assert.deepEqual(found("anna nothing"), []);
});

test("letters may be left out", () => {
  assert.equal(found("dtxl")[0], FILES[4]);
  assert.equal(found("wtrclr")[0], FILES[1]);
  assert.deepEqual(found("zzz"), []);
});

test("marks are the places of the query's letters", () => {
  for (const query of ["anna", "wtr", "styles ban"]) {
    for (const hit of search(query, FILES)) {
      const letters = new Set(hit.marks.map((place) => hit.name[place].toLowerCase()));
      assert.deepEqual(
        [...letters].filter((letter) => !query.includes(letter)),
        [],
      );
      assert.ok(hit.marks.length > 0);
    }
  }
});

test("ten thousand files take no time to speak of", () => {
  const many = Array.from(
    { length: 10_000 },
    (_, n) => `folder ${n % 70}/some_lora_file_${n}.safetensors`,
  );
  const start = performance.now();
  assert.equal(search("lora 9999", many)[0].name, many[9999]);
  assert.ok(performance.now() - start < 500);
});
