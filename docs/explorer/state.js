// What the page shows, as the part of a link after the #.

export const VIEWS = ["photo", "colours", "region", "attention"];

/**
 * @typedef {object} State
 * @property {string} sample name of a sample; a visitor's own photo is in no link
 * @property {number} size of the image in pixels, a multiple of 32
 * @property {number} stage 1 or 2
 * @property {string} view one of VIEWS
 * @property {number} way 0 ... 1, from cells to learned regions
 * @property {boolean} borders of the regions
 * @property {boolean} shares of the pixel
 * @property {number} x of the point, a fraction of the width
 * @property {number} y of the point, a fraction of the height
 */

/** @type {State} */
export const DEFAULTS = {
  sample: "chelsea", size: 256, stage: 1, view: "photo", way: 1, borders: true, shares: true, x: 0.38, y: 0.42,
};

/** @type {Record<string, (value: any) => boolean>} */
const VALID = {
  sample: (value) => /^[a-z]+$/.test(value),
  size: (value) => value >= 128 && value <= 512 && value % 32 === 0,
  stage: (value) => value === 1 || value === 2,
  view: (value) => VIEWS.includes(value),
  way: (value) => value >= 0 && value <= 1,
  x: (value) => value >= 0 && value <= 1,
  y: (value) => value >= 0 && value <= 1,
};

/**
 * Whether the part of an address after the page is one of ours, and not that of a heading.
 *
 * @param {string} hash
 */
export function isLink(hash) {
  const keys = Array.from(new URLSearchParams(hash.replace(/^#/, "")).keys());
  return keys.length === 0 || keys.some((key) => Object.hasOwn(DEFAULTS, key));
}

/**
 * Reads a link. What it does not say, or says wrongly, is as in DEFAULTS.
 *
 * @param {string} hash such as '#size=128&view=region'
 * @returns {State}
 */
export function readLink(hash) {
  /** @type {any} */
  const state = { ...DEFAULTS };
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  for (const [key, usual] of Object.entries(DEFAULTS)) {
    const text = given.get(key);
    if (text === null) continue;
    if (typeof usual === "boolean") state[key] = text !== "0";
    else {
      const value = typeof usual === "number" ? (text === "" ? NaN : Number(text)) : text;
      if (VALID[key](value)) state[key] = value;
    }
  }
  return state;
}

/**
 * @param {State} state
 * @returns {string} from the # on
 */
export function writeLink(state) {
  // A switch is 1 or 0.
  const texts = Object.entries(state).map(([key, value]) => [key, String(value === true ? 1 : value || 0)]);
  return "#" + new URLSearchParams(texts);
}
