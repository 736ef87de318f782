// What a soft association of pixels with super tokens says: regions, shares, colours. As in svit/visualize.py.

/**
 * The association of one stage.
 *
 * @typedef {object} Association
 * @property {Float32Array} q (9, side, side): each pixel's shares in the 3 x 3 super tokens around its cell
 * @property {number} side height and width of the stage's map in pixels
 * @property {number} grid cells in a row and in a column
 */

/**
 * The super token that is neighbour `k` of a pixel, as row * grid + column, or -1 outside the grid.
 *
 * @param {Association} found
 * @param {number} k 0 ... 8, row by row; 4 is the pixel's own cell
 * @param {number} y of the pixel
 * @param {number} x of the pixel
 */
export function neighbour({ side, grid }, k, y, x) {
  const cell = side / grid;
  const row = Math.trunc(y / cell) + Math.trunc(k / 3) - 1;
  const column = Math.trunc(x / cell) + (k % 3) - 1;
  return row < 0 || column < 0 || row >= grid || column >= grid ? -1 : row * grid + column;
}

/**
 * On the way from cells (0) to the learned association (1). In between, each share is a mix of both.
 *
 * @param {Association} learned
 * @param {number} way 0 ... 1
 * @returns {Association}
 */
export function blend(learned, way) {
  const pixels = learned.side ** 2;
  const q = learned.q.map((share, i) => way * share + (i >= 4 * pixels && i < 5 * pixels ? 1 - way : 0));
  return { ...learned, q };
}

/**
 * The super token in which each pixel has its largest share. Those outside the grid do not count.
 *
 * @param {Association} found
 * @returns {Int32Array} (side, side), as row * grid + column
 */
export function assignment(found) {
  const { q, side } = found;
  const labels = new Int32Array(side * side);
  for (let i = 0; i < labels.length; i++) {
    let best = -1;
    for (let k = 0; k < 9; k++) {
      const token = neighbour(found, k, Math.trunc(i / side), i % side);
      const share = q[k * labels.length + i];
      if (token >= 0 && share > best) [best, labels[i]] = [share, token];
    }
  }
  return labels;
}

/**
 * Brings values of super tokens to pixels, weighted by each pixel's shares.
 *
 * @param {Association} found
 * @param {Float32Array} values (grid * grid)
 * @returns {Float32Array} (side, side)
 */
export function spread(found, values) {
  const { q, side } = found;
  const result = new Float32Array(side * side);
  for (let i = 0; i < result.length; i++) {
    for (let k = 0; k < 9; k++) {
      const token = neighbour(found, k, Math.trunc(i / side), i % side);
      if (token >= 0) result[i] += q[k * result.length + i] * values[token];
    }
  }
  return result;
}

/**
 * Each pixel's share in one super token.
 *
 * @param {Association} found
 * @param {number} token
 */
export function region(found, token) {
  const chosen = new Float32Array(found.grid ** 2);
  chosen[token] = 1;
  return spread(found, chosen);
}

/**
 * How much one super token attends to each: the mean over the heads.
 *
 * @param {Float32Array} attention (heads, tokens, tokens)
 * @param {number} tokens
 * @param {number} token that attends
 * @returns {Float32Array} (tokens)
 */
export function attended(attention, tokens, token) {
  const heads = attention.length / tokens ** 2;
  return Float32Array.from({ length: tokens }, (_, other) => {
    let sum = 0;
    for (let head = 0; head < heads; head++) sum += attention[(head * tokens + token) * tokens + other];
    return sum / heads;
  });
}

/**
 * Each pixel in the mean colour of all pixels with its label.
 *
 * @param {Uint8ClampedArray} pixels (size, size, 4)
 * @param {Int32Array} labels (side, side), stretched over the pixels
 * @returns {Uint8ClampedArray} (size, size, 4)
 */
export function meanColours(pixels, labels) {
  const [size, side] = [Math.sqrt(pixels.length / 4), Math.sqrt(labels.length)];
  const place = Array.from({ length: size }, (_, i) => Math.trunc(((2 * i + 1) * side) / (2 * size)));
  /** @type {number[][]} red, green, blue and the number of pixels */
  const sums = [];
  for (let i = 0; i < size * size; i++) {
    const sum = (sums[labels[place[Math.trunc(i / size)] * side + place[i % size]]] ??= [0, 0, 0, 0]);
    for (let c = 0; c < 3; c++) sum[c] += pixels[4 * i + c];
    sum[3]++;
  }
  const result = new Uint8ClampedArray(pixels.length).fill(255);
  for (let i = 0; i < size * size; i++) {
    const sum = sums[labels[place[Math.trunc(i / size)] * side + place[i % size]]];
    for (let c = 0; c < 3; c++) result[4 * i + c] = sum[c] / sum[3];
  }
  return result;
}

/**
 * The edges between pixels of different labels, in pixels: [x, y, x, y].
 *
 * @param {Int32Array} labels (side, side)
 */
export function borders(labels) {
  const side = Math.sqrt(labels.length);
  /** @type {number[][]} */
  const edges = [];
  labels.forEach((label, i) => {
    const [x, y] = [i % side, Math.trunc(i / side)];
    if (x + 1 < side && labels[i + 1] !== label) edges.push([x + 1, y, x + 1, y + 1]);
    if (y + 1 < side && labels[i + side] !== label) edges.push([x, y + 1, x + 1, y + 1]);
  });
  return edges;
}
