/**
 * What the server knows about LoRA files, and the presets that it keeps for the user. Answers are
 * remembered until `renew` finds other files, or `refresh`.
 *
 * @typedef {{
 *   name: string, type: string, dialect: string, family: string, ranks: number[], alphas: number[],
 *   trigger_words: string, blocks: string[], family_blocks: string[], size_bytes: number, num_layers: number, title: string
 * }} LoraInfo
 * @typedef {{name: string, rows: import("./rows.mjs").Row[]}} Preset
 * @typedef {{name: string, file: string}} PresetFile  `file` is without its ending.
 * @typedef {(route: string, options?: RequestInit) => Promise<Response>} FetchApi
 */

import { slashed } from "./rows.mjs";

const PRESETS = "lora_weave/stacks";

export class Library {
  /** @param {FetchApi} fetchApi  The host's `api.fetchApi`. */
  constructor(fetchApi) {
    this.fetchApi = fetchApi;
    /** @type {Set<() => void>} */
    this.listeners = new Set();
    /** @type {Map<string, Promise<any>>} */
    this.answers = new Map();
    /** @type {string[] | null} The files there are, as soon as they are known. */
    this.names = null;
    this.seen = ""; // names, sizes and times of the files, when they were last asked for
    /** @type {Promise<string[]> | null} */
    this.renewal = null;
  }

  /** Forget everything, also what is not told by the files' times. */
  refresh() {
    this.seen = "";
    return this.renew();
  }

  /**
   * The names of all files, with "/" between folders, as they are now: some may have come, gone or been
   * written anew. Those who ask meanwhile get the same answer.
   */
  renew() {
    this.renewal ??= this.look().finally(() => {
      this.renewal = null;
    });
    return this.renewal;
  }

  /** @returns {Promise<string[]>} */
  async look() {
    const [names, files] = await Promise.all([
      /** @type {Promise<string[]>} */ (this.get("/models/loras")),
      this.get("/experiment/models/loras").catch(() => null), // only times and pictures are lost
    ]);
    const seen = JSON.stringify([names, files]);
    if (seen === this.seen && this.names) return this.names;
    this.seen = seen;
    this.names = names.map(slashed);
    this.answers.clear();
    if (files) this.answers.set("files", Promise.resolve(files));
    for (const listener of this.listeners) listener();
    return this.names;
  }

  /**
   * Whether a file is there; null while that is not known.
   * @param {string} name
   */
  has(name) {
    return this.names === null ? null : this.find(name) !== undefined;
  }

  /**
   * The file that a name means, by the rules of the server's `lora_name`: with or without its ending, as the
   * file's name alone where only one folder has it, or as a whole path.
   * @param {string} name
   */
  find(name) {
    /** @type {string[]} */
    const names = this.names ?? [];
    const wanted = slashed(name.trim());
    for (const exact of [wanted, `${wanted}.safetensors`]) if (names.includes(exact)) return exact;
    if (/^(\/|[a-z]:\/)/i.test(wanted)) {
      // only the server knows where its folders are: the longest file that the path ends with
      const ends = names.filter((one) => wanted.endsWith(`/${one}`));
      return ends.sort((a, b) => b.length - a.length)[0];
    }
    if (wanted.includes("/")) return undefined;
    const alike = names.filter((one) => {
      const file = one.slice(one.lastIndexOf("/") + 1);
      return wanted === file || wanted === file.replace(/\.[^.]*$/, "");
    });
    return alike.length === 1 ? alike[0] : undefined;
  }

  /**
   * @param {string} name
   * @returns {Promise<LoraInfo>}  Rejected with the server's reason.
   */
  info(name) {
    return this.once(`info ${name}`, () =>
      this.get(`/lora_weave/lora?name=${encodeURIComponent(name)}`),
    );
  }

  /**
   * The nearest name to one that is missing.
   * @param {string} name
   * @returns {Promise<string | null>}
   */
  nearest(name) {
    return this.once(`nearest ${name}`, async () => {
      const answer = await this.get(`/lora_weave/nearest?name=${encodeURIComponent(name)}`);
      return answer.nearest === null ? null : slashed(answer.nearest);
    });
  }

  /**
   * Block weights by name of a vector of numbers.
   * @param {string} name
   * @param {string} values
   * @returns {Promise<import("./rows.mjs").BlockWeights>}
   */
  async vector(name, values) {
    const query = `name=${encodeURIComponent(name)}&values=${encodeURIComponent(values)}`;
    return (await this.get(`/lora_weave/blocks?${query}`)).blocks;
  }

  /**
   * The route of a file's thumbnail, or null.
   * @param {string} name
   * @returns {Promise<string | null>}
   */
  async preview(name) {
    /** @type {{name: string, pathIndex: number}[]} */
    const files = await this.once("files", () => this.get("/experiment/models/loras"));
    const known = this.find(name);
    const file = files.find((one) => slashed(one.name) === known);
    if (!file) return null;
    const path = slashed(file.name).split("/").map(encodeURIComponent).join("/");
    return `/experiment/models/preview/loras/${file.pathIndex}/${path}`;
  }

  /** @returns {Promise<PresetFile[]>}  By name. */
  async presets() {
    const query = new URLSearchParams({ dir: PRESETS, recurse: "false", split: "false" });
    const answer = await this.fetchApi(`/userdata?${query}`);
    if (answer.status === 404) return []; // the folder comes with the first preset
    const files = /** @type {string[]} */ (await read(answer));
    return files
      .filter((file) => file.endsWith(".json"))
      .map((file) => file.slice(0, -5))
      .map((file) => ({ name: nameOf(file), file }))
      .sort((a, b) => a.name.localeCompare(b.name));
  }

  /**
   * @param {string} file
   * @returns {Promise<Preset>}
   */
  async loadPreset(file) {
    return this.get(presetRoute(file));
  }

  /**
   * @param {Preset} preset
   * @param {boolean} overwrite
   * @returns {Promise<boolean>}  false: there is one of that name, and it was left as it is.
   */
  async savePreset(preset, overwrite) {
    const options = { method: "POST", body: JSON.stringify(preset, null, 1) };
    const route = `${presetRoute(fileName(preset.name))}?overwrite=${overwrite}`;
    const answer = await this.fetchApi(route, options);
    if (answer.status === 409) return false;
    await read(answer);
    return true;
  }

  /** @param {string} file */
  async deletePreset(file) {
    const answer = await this.fetchApi(presetRoute(file), { method: "DELETE" });
    if (!answer.ok) throw new Error(answer.statusText);
  }

  /** @param {string} route */
  async get(route) {
    return read(await this.fetchApi(route));
  }

  /**
   * @template T
   * @param {string} key
   * @param {() => Promise<T>} ask
   * @returns {Promise<T>}
   */
  once(key, ask) {
    const known = this.answers.get(key);
    if (known) return known;
    const answer = ask();
    this.answers.set(key, answer);
    answer.catch(() => this.answers.get(key) === answer && this.answers.delete(key));
    return answer;
  }
}

/** @param {Response} answer */
async function read(answer) {
  const content = await answer.json().catch(() => null);
  if (!answer.ok) throw new Error(content?.error ?? answer.statusText);
  return content;
}

/** @param {string} file */
function presetRoute(file) {
  return `/userdata/${encodeURIComponent(`${PRESETS}/${file}.json`)}`;
}

/**
 * A preset's name as a file's: what systems forbid in one is written as ~ and its code. So is %, which
 * the host would take for a code of its own.
 * @param {string} name
 */
export function fileName(name) {
  return name.replace(
    /[~%\\/:*?"<>|\u0000-\u001f]|^[. ]|[. ]$/g,
    (char) => `~${char.charCodeAt(0).toString(16).padStart(2, "0")}`,
  );
}

/**
 * The name of a preset's file.
 * @param {string} file
 */
export function nameOf(file) {
  return file.replace(/~([0-9a-f]{2})/g, (_, code) => String.fromCharCode(parseInt(code, 16)));
}
