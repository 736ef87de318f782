// Reads photos and runs the model, beside the page, which stays responsive.

import { resizeAndCrop } from "./resize.js";

const here = (/** @type {string} */ name) => new URL(name, import.meta.url).href;

// As svit.images, which leaves the limit to Pillow.
const MOST_PIXELS = 178_956_970;

const loaded = load().catch((error) => {
  throw new Error(`The model does not load: ${error.message}`);
});
loaded.then(({ model }) => postMessage({ model }), (error) => postMessage({ error: error.message }));

async function load() {
  const files = await Promise.all(["model.json", "model.onnx"].map((name) => fetch(here(name))));
  for (const file of files) if (!file.ok) throw new Error(`${file.url}: ${file.status} ${file.statusText}`);
  const [answer, weights] = files;
  /** @type {typeof import("onnxruntime-web")} */
  const ort = await import(here("ort.js"));
  ort.env.wasm.wasmPaths = { mjs: here("ort-wasm.js"), wasm: here("ort-wasm.wasm") };
  // Several threads need headers of the server that file servers do not send.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 4) : 1;
  const session = await ort.InferenceSession.create(new Uint8Array(await weights.arrayBuffer()));
  return { ort, session, model: await answer.json() };
}

addEventListener("message", async ({ data }) => {
  try {
    const answer = await look(data);
    const arrays = [answer.pixels, ...answer.stages.flatMap(({ q, attention }) => [q, attention])];
    postMessage(answer, { transfer: arrays.map((array) => array.buffer) });
  } catch (error) {
    postMessage({ error: /** @type {Error} */ (error).message });
  }
});

/**
 * @param {{source: Blob | ImageBitmap, name: string, size: number}} request a file, or a frame of the camera
 */
async function look({ source, name, size }) {
  const { ort, session, model } = await loaded;
  let start = performance.now();
  const { pixels, width, height } = await read(source, name, size);
  const image = new Float32Array(3 * size * size);
  for (let c = 0; c < 3; c++) {
    for (let i = 0; i < size * size; i++) {
      image[c * size * size + i] = (pixels[4 * i + c] / 255 - model.mean[c]) / model.std[c];
    }
  }
  const reading = performance.now() - start;
  start = performance.now();
  const found = await session.run({ image: new ort.Tensor("float32", image, [1, 3, size, size]) });
  const running = performance.now() - start;
  // Copies, since the model's own memory cannot be handed over.
  const values = (/** @type {string} */ output) => Float32Array.from(/** @type {Float32Array} */ (found[output].data));
  const stages = Object.keys(model.cells).map((stage) => {
    const side = found[`${stage}_association`].dims[3];
    const grid = side / model.cells[stage][0];
    return { q: values(`${stage}_association`), attention: values(`${stage}_attention`), side, grid };
  });
  return { name, width, height, size, pixels, logits: [...values("logits")], stages, reading, running };
}

/**
 * @param {Blob | ImageBitmap} source
 * @param {string} name
 * @param {number} size
 * @returns the square that the model sees, (size, size, 4), and the size of the photo
 */
async function read(source, name, size) {
  const bitmap = source instanceof Blob ? await decode(source, name) : source;
  const { width, height } = bitmap;
  try {
    if (width * height > MOST_PIXELS) {
      const has = `has ${width} x ${height} pixels, ${millions(width * height)}`;
      throw new Error(`${name}: ${has}; expected at most ${millions(MOST_PIXELS)}`);
    }
    const pixels = resizeAndCrop(width, height, size, (x, y, w, h) => {
      const canvas = new OffscreenCanvas(w, h);
      /** @type {any} */
      const context = canvas.getContext("2d", { willReadFrequently: true }); // null only after another kind of context
      context.drawImage(bitmap, x, y, w, h, 0, 0, w, h);
      return context.getImageData(0, 0, w, h).data;
    });
    return { pixels, width, height };
  } finally {
    bitmap.close();
  }
}

/**
 * Upright, and without a conversion of colours, as Pillow reads photos.
 *
 * @param {Blob} file
 * @param {string} name
 */
async function decode(file, name) {
  try {
    return await createImageBitmap(file, {
      imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none",
    });
  } catch {
    const expected = "expected a photo, such as a JPEG, PNG or WebP file";
    throw new Error(`${name}: the browser cannot read it as an image; ${expected}`);
  }
}

/** @param {number} pixels */
function millions(pixels) {
  return `${Math.round(pixels / 1e6)} million`;
}
