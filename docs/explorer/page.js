// The page: its controls, and what the picture shows.

import { drawPicture } from "./draw.js";
import { assignment, attended, blend, neighbour } from "./regions.js";
import { isLink, readLink, writeLink } from "./state.js";

/**
 * What the worker found in a photo.
 *
 * @typedef {object} Result
 * @property {string} name of the photo
 * @property {number} width of the photo in pixels, upright
 * @property {number} height of the photo
 * @property {number} size height and width in pixels
 * @property {Uint8ClampedArray} pixels (size, size, 4)
 * @property {number[]} logits one for each class
 * @property {(import("./regions.js").Association & {attention: Float32Array})[]} stages
 * @property {number} reading milliseconds
 * @property {number} running milliseconds
 */

/** @typedef {{name: string, read: () => Promise<Blob | ImageBitmap>}} Source */

const here = (/** @type {string} */ name) => new URL(name, import.meta.url).href;

/** @template {HTMLElement} T @param {string} id @returns {T} */
const part = (id) => /** @type {T} */ (document.getElementById(`explorer-${id}`));

/** @param {string} name @returns {HTMLInputElement[]} */
const choices = (name) => Array.from(document.querySelectorAll(`input[name=explorer-${name}]`));

const root = /** @type {HTMLElement} */ (document.querySelector(".explorer"));
/** @type {HTMLCanvasElement} */ const picture = part("picture");
/** @type {HTMLInputElement} */ const file = part("file");
/** @type {HTMLInputElement} */ const way = part("way");
/** @type {HTMLInputElement} */ const size = part("size");
/** @type {HTMLInputElement} */ const borders = part("borders");
/** @type {HTMLInputElement} */ const shares = part("shares");
/** @type {HTMLVideoElement} */ const video = part("video");
const camera = part("camera");
const samples = part("samples").querySelectorAll("button");
const status = part("status");

let state = readLink(location.hash);
/** @type {string[]} */ let classes = [];
/** @type {Source | null} what the picture will show */ let source = null;
/** @type {Source | null} what it shows */ let shown = null;
/** @type {Result | null} */ let result = null;
/** @type {Source | null} */ let waiting = null;
/** @type {Source | null} what the worker has */ let running = null;
let busy = true;
let broken = "";
let held = false;
/** Counts what was done to the camera: what a browser was asked for may come late. */
let asked = 0;
/** @type {HTMLCanvasElement | null} the last frame of a camera that was stopped */ let frame = null;

const worker = new Worker(here("worker.js"), { type: "module" });
worker.addEventListener("message", ({ data }) => {
  busy = false;
  if (data.model) {
    classes = data.model.class_names.map((/** @type {string} */ name) => name.replaceAll("_", " "));
  } else if (data.error) {
    giveUp(running);
    say(data.error, true);
  } else {
    [result, shown] = [data, running];
    showResult();
  }
  next();
});
worker.addEventListener("error", () => {
  broken = "The model's program does not load. Reload the page; it needs a browser with WebAssembly and module workers.";
  say(broken, true);
});

/** @param {string} text @param {boolean} error */
function say(text, error = false) {
  if (status.textContent !== text) status.textContent = text; // else screen readers would say it again
  status.classList.toggle("explorer-error", error);
}

/** Shows a photo as soon as the worker is free. Of several that wait, the last one counts. @param {Source} photo */
function show(photo) {
  source = waiting = photo;
  if (broken) say(broken, true);
  next();
}

/** A photo that cannot be shown: the picture stays as it is. @param {Source | null} photo */
function giveUp(photo) {
  if (source === photo) source = shown;
}

async function next() {
  if (busy || !waiting) return;
  const photo = waiting;
  [busy, waiting] = [true, null];
  try {
    const read = await photo.read();
    running = photo;
    worker.postMessage({ source: read, name: photo.name, size: state.size }, read instanceof Blob ? [] : [read]);
  } catch (error) {
    busy = false;
    giveUp(photo);
    say(`${photo.name}: ${/** @type {Error} */ (error).message}`, true);
    next();
  }
}

/** @param {string} name */
function showSample(name) {
  stopCamera();
  state.sample = name;
  show({
    name,
    read: async () => {
      const answer = await fetch(here(`samples/${name}.jpg`));
      if (!answer.ok) throw new Error(`the sample does not load (${answer.status} ${answer.statusText})`);
      return answer.blob();
    },
  });
}

/** @param {Blob | null | undefined} photo */
function showFile(photo) {
  if (!photo) return;
  stopCamera();
  show({ name: photo instanceof File ? photo.name : "the pasted photo", read: async () => photo });
}

async function startCamera() {
  const mine = ++asked;
  try {
    if (!navigator.mediaDevices) throw new Error("this page has no access, which takes https");
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    if (mine !== asked) return stop(stream);
    [video.srcObject, frame] = [stream, null];
    await video.play();
    camera.setAttribute("aria-pressed", "true");
    showFrame();
  } catch (error) {
    if (mine !== asked) return;
    stopCamera();
    say(`The camera does not start: ${/** @type {Error} */ (error).message}`, true);
  }
}

function showFrame() {
  show({ name: "camera", read: () => createImageBitmap(frame ?? video) });
}

/** @param {MediaStream} stream */
function stop(stream) {
  stream.getTracks().forEach((track) => track.stop());
}

/** The picture keeps the last frame, which can still be seen at another size. */
function stopCamera() {
  asked++;
  const stream = /** @type {MediaStream | null} */ (video.srcObject);
  if (stream && video.videoWidth) {
    frame = document.createElement("canvas");
    [frame.width, frame.height] = [video.videoWidth, video.videoHeight];
    frame.getContext("2d")?.drawImage(video, 0, 0);
  }
  if (stream) stop(stream);
  video.srcObject = null;
  camera.setAttribute("aria-pressed", "false");
}

function showResult() {
  if (!result) return;
  root.dataset.state = "ready";
  const { name, width, height } = result;
  say(`${name}, ${width} x ${height} pixels${width === height ? "" : ": the model sees the square in the centre"}.`);
  const largest = Math.max(...result.logits);
  const exps = result.logits.map((logit) => Math.exp(logit - largest));
  const sum = exps.reduce((a, b) => a + b);
  const best = exps.map((value, i) => ({ name: classes[i], share: value / sum })).sort((a, b) => b.share - a.share);
  part("classes").replaceChildren(...best.slice(0, 5).map(({ name, share }) => {
    const item = document.createElement("li");
    item.style.setProperty("--share", String(share));
    item.append(element("span", name), element("span", percent(share)));
    return item;
  }));
  const [running, reading] = [result.running, result.reading].map(Math.round);
  part("time").textContent =
    `${result.size} x ${result.size} pixels: the model took ${running} ms, reading ${reading} ms.`;
  for (const button of samples) {
    button.setAttribute("aria-pressed", String(button.dataset.name === result.name));
  }
  draw();
  if (video.srcObject) requestAnimationFrame(() => video.srcObject && showFrame());
}

/** What the picture shows at the point. */
function look() {
  if (!result) return null;
  const learned = result.stages[state.stage - 1];
  const found = blend(learned, state.way);
  const { side, grid } = found;
  const [x, y] = [state.x, state.y].map((value) => Math.min(Math.trunc(value * side), side - 1));
  const labels = assignment(found);
  const token = labels[y * side + x];
  const near = Array.from({ length: 9 }, (_, k) => ({
    token: neighbour(found, k, y, x), share: found.q[(k * side + y) * side + x],
  }));
  return { found, labels, x, y, token, near, attention: attended(learned.attention, grid * grid, token) };
}

function draw() {
  const seen = look();
  if (!result || !seen) return;
  drawPicture(picture, result, state, seen);
  const { found, token, near, x, y } = seen;
  part("near").querySelectorAll("td").forEach((cell, k) => {
    cell.textContent = near[k].token < 0 ? "-" : percent(near[k].share);
    cell.classList.toggle("explorer-owner", near[k].token === token);
    cell.style.setProperty("--share", String(near[k].token < 0 ? 0 : near[k].share));
  });
  const owner = near.find((other) => other.token === token);
  const { side, grid } = found;
  part("point").textContent =
    `Pixel ${x + 1}, ${y + 1} of the ${side} x ${side} map. It belongs most to the super token in row ` +
    `${Math.trunc(token / grid) + 1}, column ${(token % grid) + 1} of ${grid} x ${grid}: ${percent(owner?.share ?? 0)}.`;
}

/** @param {number} share */
function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}\u00a0%`; // a space that does not break
}

/** @param {string} tag @param {string} text */
function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

/** Controls show the state. */
function showState() {
  for (const name of /** @type {const} */ (["stage", "view"])) {
    for (const choice of choices(name)) choice.checked = choice.value === String(state[name]);
  }
  way.value = String(state.way);
  size.value = String(state.size);
  borders.checked = state.borders;
  shares.checked = state.shares;
  showNumbers();
}

function showNumbers() {
  part("way-value").textContent = state.way === 0 ? "cells" : state.way === 1 ? "learned" : percent(state.way);
  part("size-value").textContent = `${state.size} x ${state.size}`;
}

/** The address follows, at most a few times a second, which browsers ask for. */
function keepLink() {
  clearTimeout(keepLink.timer);
  keepLink.timer = setTimeout(() => history.replaceState(null, "", writeLink(state)), 250);
}
/** @type {ReturnType<typeof setTimeout> | undefined} */
keepLink.timer = undefined;

/** @param {Partial<import("./state.js").State>} change */
function change(change) {
  Object.assign(state, change);
  showNumbers();
  if (change.size && source) show(source);
  draw();
  keepLink();
}

/** @param {PointerEvent} event */
function point(event) {
  const box = picture.getBoundingClientRect();
  const share = (/** @type {number} */ value) => Math.round(Math.min(Math.max(value, 0), 1) * 1e4) / 1e4;
  change({ x: share((event.clientX - box.left) / box.width), y: share((event.clientY - box.top) / box.height) });
}

picture.addEventListener("pointermove", (event) => {
  if (!held) point(event);
});
picture.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  held = event.pointerType === "mouse" && !held;
  picture.classList.toggle("explorer-held", held);
  point(event);
});
picture.addEventListener("keydown", (event) => {
  /** @type {Record<string, [number, number]>} */
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const seen = look();
  if (!(event.key in steps) || !seen || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const { side } = seen.found;
  const [x, y] = [seen.x + steps[event.key][0], seen.y + steps[event.key][1]];
  if (x >= 0 && y >= 0 && x < side && y < side) change({ x: (x + 0.5) / side, y: (y + 0.5) / side });
});

for (const choice of choices("stage")) choice.addEventListener("change", () => change({ stage: Number(choice.value) }));
for (const choice of choices("view")) choice.addEventListener("change", () => change({ view: choice.value }));
way.addEventListener("input", () => change({ way: Number(way.value) }));
size.addEventListener("input", () => change({ size: Number(size.value) }));
borders.addEventListener("change", () => change({ borders: borders.checked }));
shares.addEventListener("change", () => change({ shares: shares.checked }));
for (const button of samples) {
  button.addEventListener("click", () => {
    showSample(String(button.dataset.name));
    keepLink();
  });
}
file.addEventListener("change", () => {
  showFile(file.files?.[0]);
  file.value = ""; // so that the same file can be chosen again
});
camera.addEventListener("click", () => (video.srcObject ? stopCamera() : startCamera()));
root.addEventListener("dragover", (event) => event.preventDefault());
root.addEventListener("drop", (event) => {
  event.preventDefault();
  showFile(event.dataTransfer?.files[0]);
});
document.addEventListener("paste", (event) => showFile(event.clipboardData?.files[0]));
window.addEventListener("hashchange", (event) => {
  const { hash } = new URL(event.newURL);
  if (!isLink(hash)) return;
  state = readLink(hash);
  showState();
  showSample(state.sample);
  draw();
});

part("link").addEventListener("click", async () => {
  const link = new URL(writeLink(state), location.href).href;
  history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(link);
    say("The link is copied.");
  } catch {
    say(`The link is in the address bar: ${link}`);
  }
});
part("save").addEventListener("click", () => {
  picture.toBlob((blob) => {
    if (!blob) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `super-tokens-${(result?.name ?? "photo").replace(/\.\w+$/, "")}.png`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
});

showState();
say("The model loads, once.");
showSample(state.sample);

// For the browser's console: the numbers behind the picture.
Object.defineProperty(window, "explorer", {
  value: { get state() { return state; }, get result() { return result; }, look },
});
