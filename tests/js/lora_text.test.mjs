/** LoRAs as prompts name them, both ways. */

import assert from "node:assert/strict";
import test from "node:test";

import { formatLoraText, parseLoraText } from "../../web/lora_stack/lora_text.mjs";

const FILES = ["people/anna.safetensors", "styles/ink.v2.safetensors", "old/anna.ckpt"];
const read = (text) => parseLoraText(text, FILES);

test("name, strength and clip strength", () => {
  assert.deepEqual(read("a cat <lora:anna:0.8> and <LORA:ink.v2:0.5:0.25>, <lora:people/anna>"), [
    { name: "people/anna.safetensors", model: 0.8 },
    { name: "styles/ink.v2.safetensors", model: 0.5, clip: 0.25 },
    { name: "people/anna.safetensors", model: 1 },
  ]);
});

test("A1111's named strengths, in any order", () => {
  assert.deepEqual(
    read("<lora:anna:te=0.2:unet=0.6><lora:anna:unet=0.6:te=0.2><lora:anna:0.5:lbw=SKIP>"),
    [
      { name: "people/anna.safetensors", model: 0.6, clip: 0.2 },
      { name: "people/anna.safetensors", model: 0.6, clip: 0.2 },
      { name: "people/anna.safetensors", model: 0.5 },
    ],
  );
});

test("the whole path counts before the file's own name, and case does not", () => {
  assert.equal(read("<lora:old\\ANNA:1>")[0].name, "old/anna.ckpt");
  assert.equal(read("<lora:old/anna.ckpt:1>")[0].name, "old/anna.ckpt");
});

test("a file that is not there keeps its name, and no other folder's file is taken for it", () => {
  assert.deepEqual(read("<lora:nobody:0.5>"), [{ name: "nobody", model: 0.5 }]);
  assert.deepEqual(read("<lora:pets/anna:0.5>"), [{ name: "pets/anna", model: 0.5 }]);
});

test("an empty strength is none", () => {
  for (const text of ["<lora:anna:>", "<lora:anna::>", "<lora:anna: >", "<lora:anna:te=>"])
    assert.deepEqual(read(text), [{ name: "people/anna.safetensors", model: 1 }], text);
});

test("text without LoRAs gives none", () => {
  for (const text of ["", "a cat", "<lora:>", "<lyco:anna:1>", "lora:anna:1"])
    assert.deepEqual(read(text), []);
});

test("what is written is read again", () => {
  const rows = [
    { on: true, name: "people/anna.safetensors", model: 0.8 },
    { on: true, name: "styles/ink.v2.safetensors", model: -0.35, clip: 0 },
    { on: true, name: "old/anna.ckpt", model: 1, clip: 1 },
    { on: false, name: "people/anna.safetensors", model: 1 },
  ];
  const text = formatLoraText(rows);
  assert.equal(text, "<lora:people/anna:0.8> <lora:styles/ink.v2:-0.35:0> <lora:old/anna.ckpt:1>");
  assert.deepEqual(read(text), [
    { name: "people/anna.safetensors", model: 0.8 },
    { name: "styles/ink.v2.safetensors", model: -0.35, clip: 0 },
    { name: "old/anna.ckpt", model: 1 },
  ]);
});
