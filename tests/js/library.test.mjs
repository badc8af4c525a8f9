/** What is remembered of the server's answers, and when it is asked again. */

import assert from "node:assert/strict";
import test from "node:test";

import { Library, fileName, nameOf } from "../../web/lora_stack/library.mjs";

/** A library whose server has `files`: names with the time they were written. */
function libraryOf(files) {
  const asked = [];
  const answers = {
    "/models/loras": () => Object.keys(files),
    "/experiment/models/loras": () =>
      Object.entries(files).map(([name, modified]) => ({ name, pathIndex: 0, modified })),
    "/lora_weave/lora": () => ({ written: { ...files } }),
  };
  const library = new Library(async (route) => {
    asked.push(route.split("?")[0]);
    return new Response(JSON.stringify(answers[route.split("?")[0]]()));
  });
  let told = 0;
  library.listeners.add(() => (told += 1));
  return { library, asked, told: () => told };
}

test("files that come, go and are written anew are told, each time once", async () => {
  const files = { "a.safetensors": 1, "people\\b.safetensors": 1 };
  const { library, told } = libraryOf(files);
  assert.equal(library.has("a.safetensors"), null);
  assert.deepEqual(await library.renew(), ["a.safetensors", "people/b.safetensors"]);
  assert.equal(told(), 1);
  await library.renew();
  assert.equal(told(), 1, "nothing has changed");

  delete files["a.safetensors"];
  files["c.safetensors"] = 2;
  assert.deepEqual(await library.renew(), ["people/b.safetensors", "c.safetensors"]);
  assert.equal(library.has("a.safetensors"), false);
  assert.equal(library.has("c.safetensors"), true);
  assert.equal(told(), 2);

  await library.info("c.safetensors");
  files["c.safetensors"] = 3;
  await library.renew();
  assert.equal(told(), 3, "a file was written anew");
  assert.equal((await library.info("c.safetensors")).written["c.safetensors"], 3);
});

test("names mean the files that the server takes them for", async () => {
  const files = ["people\\anna.v2.safetensors", "a/twin.safetensors", "b/twin.safetensors", "b.pt"];
  const { library } = libraryOf(Object.fromEntries(files.map((name) => [name, 1])));
  await library.renew();
  const anna = "people/anna.v2.safetensors";
  const cases = {
    [anna]: anna,
    "people\\anna.v2.safetensors": anna,
    "people/anna.v2": anna,
    "anna.v2.safetensors": anna,
    " anna.v2 ": anna,
    "/srv/loras/people/anna.v2.safetensors": anna,
    "D:\\loras\\people\\anna.v2.safetensors": anna,
    "a/twin": "a/twin.safetensors",
    b: "b.pt",
    twin: undefined,
    anna: undefined,
    "other/anna.v2": undefined,
    "": undefined,
  };
  for (const [name, file] of Object.entries(cases)) {
    assert.equal(library.find(name), file, name);
    assert.equal(library.has(name), file !== undefined, name);
  }
});

test("what is known of files stays known while they stay as they are", async () => {
  const { library, asked } = libraryOf({ "a.safetensors": 1 });
  await library.renew();
  await library.info("a.safetensors");
  await library.preview("a.safetensors");
  await library.renew();
  await library.info("a.safetensors");
  assert.equal(asked.filter((route) => route === "/lora_weave/lora").length, 1);
  await library.refresh();
  await library.info("a.safetensors");
  assert.equal(asked.filter((route) => route === "/lora_weave/lora").length, 2);
});

test("many that ask at once are one question", async () => {
  const { library, asked, told } = libraryOf({ "a.safetensors": 1 });
  await Promise.all(Array.from({ length: 20 }, () => library.renew()));
  assert.deepEqual(asked.sort(), ["/experiment/models/loras", "/models/loras"]);
  assert.equal(told(), 1);
});

test("a server that is away is asked again, and its last answer kept", async () => {
  const { library } = libraryOf({ "a.safetensors": 1 });
  const { fetchApi } = library;
  await library.renew();
  library.fetchApi = async () => new Response("{}", { status: 500, statusText: "away" });
  await assert.rejects(library.renew(), /away/);
  assert.equal(library.has("a.safetensors"), true);
  library.fetchApi = fetchApi;
  assert.deepEqual(await library.renew(), ["a.safetensors"]);
});

test("a preset's name becomes a file's that no other name has, and is read from it", () => {
  const alike = ["A:B", "A*B", "A-B", "A~3aB", "A%3aB", "A/B"];
  const names = [...alike, "..", ".", " x", "x.", "x", "~", "柔 2"];
  const files = names.map(fileName);
  assert.equal(new Set(files).size, names.length);
  assert.deepEqual(files.map(nameOf), names);
  for (const file of files) assert.doesNotMatch(file, /[%\\/:*?"<>|]|^[. ]|[. ]$/);
});
