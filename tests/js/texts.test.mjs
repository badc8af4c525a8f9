/** Every text is used, and there in Japanese with the same places to fill in. */

import assert from "node:assert/strict";
import { readFile, readdir } from "node:fs/promises";
import test from "node:test";

import { ENGLISH, t, translate } from "../../web/lora_stack/texts.mjs";

const ROOT = new URL("../../", import.meta.url);
const places = (text) => [...text.matchAll(/\{\w+\}/g)].map((match) => match[0]).sort();

test("Japanese has the same texts", async () => {
  const { loraWeaveStack } = JSON.parse(
    await readFile(new URL("locales/ja/main.json", ROOT), "utf8"),
  );
  assert.deepEqual(Object.keys(loraWeaveStack), Object.keys(ENGLISH));
  for (const [key, text] of Object.entries(loraWeaveStack)) {
    assert.match(text, /[ぁ-んァ-ヶ一-龠]|^\{on\} \/ \{count\}$|^clip$|^model$/, key);
    assert.deepEqual(places(text), places(ENGLISH[key]), key);
  }
});

test("no text is left over", async () => {
  const folder = new URL("web/lora_stack/", ROOT);
  const files = (await readdir(folder)).filter(
    (name) => name.endsWith(".mjs") && name !== "texts.mjs",
  );
  const code = (
    await Promise.all(files.map((name) => readFile(new URL(name, folder), "utf8")))
  ).join("\n");
  const unused = Object.keys(ENGLISH).filter(
    (key) => !new RegExp(`"${key}"|\\b${key}:`).test(code),
  );
  assert.deepEqual(unused, []);
});

test("texts are filled in, and English stands in for what is missing", () => {
  translate({ ofRows: "{count} の {on}" });
  assert.equal(t("ofRows", { on: 1, count: 3 }), "3 の 1");
  assert.equal(t("save"), "Save");
  translate(undefined);
  assert.equal(t("ofRows", { on: 0, count: 3 }), "0 of 3 on");
});
