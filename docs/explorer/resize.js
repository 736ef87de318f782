// Resizes and crops a photo as the Python tools do: Pillow's bicubic resize of the shorter side, then the centre.
// Browsers scale images in their own ways, and the model would see other pixels.

const BITS = 22; // of the weights' fractions, in Pillow's fixed point

/** @typedef {{start: number, weights: Float64Array}} Taps weights of the pixels from `start` on, times 2^BITS */
/** @typedef {(x: number, y: number, width: number, height: number) => Uint8ClampedArray} Read RGBA of a rectangle */

/** @param {number} x */
function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/**
 * The weights of input pixels in each output pixel. A smaller output widens the filter, which is antialiasing.
 *
 * @param {number} input pixels of the input
 * @param {number} output pixels of the output
 * @param {number} first output pixel that is needed
 * @param {number} count output pixels that are needed
 * @returns {Taps[]}
 */
function taps(input, output, first, count) {
  const scale = input / output;
  const widened = Math.max(scale, 1);
  return Array.from({ length: count }, (_, i) => {
    const centre = (first + i + 0.5) * scale;
    const start = Math.max(Math.trunc(centre - 2 * widened + 0.5), 0);
    const end = Math.min(Math.trunc(centre + 2 * widened + 0.5), input);
    const weights = new Float64Array(end - start);
    let sum = 0;
    for (let x = 0; x < weights.length; x++) sum += weights[x] = bicubic((x + start - centre + 0.5) * (1 / widened));
    // Halves are rounded away from zero, as C does it.
    for (let x = 0; x < weights.length; x++) {
      const share = (weights[x] / sum) * 2 ** BITS;
      weights[x] = Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    }
    return { start, weights };
  });
}

/** Python's `round`: halves go to the even number. @param {number} x */
function round(x) {
  const down = Math.floor(x);
  return x - down === 0.5 ? down + (down % 2) : Math.round(x);
}

/**
 * Resizes the shorter side of a photo to `size` and crops the centre.
 *
 * @param {number} width of the photo, in pixels
 * @param {number} height of the photo
 * @param {number} size of the result
 * @param {Read} read gives parts of the photo, of which only some hundred rows are in memory at once
 * @returns {Uint8ClampedArray} (size, size, 4): RGBA, opaque
 */
export function resizeAndCrop(width, height, size, read) {
  const short = Math.min(width, height);
  const scaled = [width, height].map((side) => (side === short ? size : Math.trunc((size * side) / short)));
  const [left, top] = scaled.map((side) => round((side - size) / 2));
  const columns = taps(width, scaled[0], left, size);
  const rows = taps(height, scaled[1], top, size);
  const last = { column: columns[size - 1], row: rows[size - 1] };
  const [x0, x1] = [columns[0].start, last.column.start + last.column.weights.length];
  const [y0, y1] = [rows[0].start, last.row.start + last.row.weights.length];

  const middle = new Uint8ClampedArray((y1 - y0) * size * 4); // 8 bits between the passes, as in Pillow
  const strip = Math.max(Math.trunc(2 ** 22 / (x1 - x0)), 1);
  for (let y = y0; y < y1; y += strip) {
    const count = Math.min(strip, y1 - y);
    const pixels = read(x0, y, x1 - x0, count);
    for (let row = 0; row < count; row++) {
      const from = row * (x1 - x0);
      columns.forEach((column, x) => {
        weigh(middle, (y - y0 + row) * size + x, pixels, from + column.start - x0, 1, column.weights);
      });
    }
  }
  const result = new Uint8ClampedArray(size * size * 4).fill(255);
  rows.forEach((row, y) => {
    for (let x = 0; x < size; x++) weigh(result, y * size + x, middle, (row.start - y0) * size + x, size, row.weights);
  });
  return result;
}

/**
 * Pixel `to` of `target` becomes the weighted sum of pixels of `source`, which are `step` apart from `from` on.
 *
 * @param {Uint8ClampedArray} target
 * @param {number} to
 * @param {Uint8ClampedArray} source
 * @param {number} from
 * @param {number} step
 * @param {Float64Array} weights
 */
function weigh(target, to, source, from, step, weights) {
  let [red, green, blue] = [0, 0, 0];
  for (let i = 0, at = 4 * from; i < weights.length; i++, at += 4 * step) {
    red += weights[i] * source[at];
    green += weights[i] * source[at + 1];
    blue += weights[i] * source[at + 2];
  }
  // The array clamps to 0 ... 255.
  target[4 * to] = Math.floor(red / 2 ** BITS + 0.5);
  target[4 * to + 1] = Math.floor(green / 2 ** BITS + 0.5);
  target[4 * to + 2] = Math.floor(blue / 2 ** BITS + 0.5);
}
