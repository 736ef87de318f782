// Draws what the page shows of a photo.

import { borders, meanColours, region, spread } from "./regions.js";

// From little to much: stops of matplotlib's colour map 'inferno', as red, green and blue.
const HEAT = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];

/**
 * @param {HTMLCanvasElement} canvas square
 * @param {import("./page.js").Result} result
 * @param {import("./state.js").State} state
 * @param {{found: import("./regions.js").Association, labels: Int32Array, x: number, y: number, token: number,
 *   near: {token: number, share: number}[], attention: Float32Array}} seen at the point
 */
export function drawPicture(canvas, result, state, seen) {
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const { found, labels, token } = seen;
  context.imageSmoothingEnabled = false; // the pixels that the model sees
  let pixels = result.pixels;
  if (state.view === "colours") pixels = meanColours(pixels, labels);
  if (state.view === "region") pixels = overlay(pixels, region(found, token));
  if (state.view === "attention") pixels = overlay(pixels, spread(found, seen.attention));
  context.drawImage(bitmap(pixels), 0, 0, canvas.width, canvas.height);

  const unit = canvas.width / found.side;
  if (state.borders) {
    outline(context, labels, unit, "rgb(0 0 0 / 0.45)", 3.5);
    outline(context, labels, unit, "rgb(255 236 60)", 1.5);
  }
  if (state.view !== "photo" || !state.shares) {
    outline(context, labels.map((label) => Number(label === token)), unit, "rgb(0 0 0 / 0.6)", 6);
    outline(context, labels.map((label) => Number(label === token)), unit, "rgb(60 230 255)", 3);
  }
  if (state.shares) drawShares(context, seen, canvas.width / found.grid);
  drawPoint(context, (seen.x + 0.5) * unit, (seen.y + 0.5) * unit);
}

/**
 * Turns the photo grey and lays values over it, the more opaque the larger.
 *
 * @param {Uint8ClampedArray} pixels (size, size, 4)
 * @param {Float32Array} values (side, side)
 */
function overlay(pixels, values) {
  const [size, side] = [Math.sqrt(pixels.length / 4), Math.sqrt(values.length)];
  const top = Math.max(values.reduce((a, b) => Math.max(a, b)), 1e-12);
  const result = new Uint8ClampedArray(pixels.length).fill(255);
  for (let i = 0; i < size * size; i++) {
    const [y, x] = [Math.trunc(i / size), i % size];
    const value = values[Math.trunc((y * side) / size) * side + Math.trunc((x * side) / size)] / top;
    const grey = (pixels[4 * i] + pixels[4 * i + 1] + pixels[4 * i + 2]) / 3;
    const opacity = 0.2 + 0.6 * value;
    const place = value * (HEAT.length - 1);
    const stop = Math.min(Math.trunc(place), HEAT.length - 2);
    for (let c = 0; c < 3; c++) {
      const colour = HEAT[stop][c] + (place - stop) * (HEAT[stop + 1][c] - HEAT[stop][c]);
      result[4 * i + c] = (1 - opacity) * grey + opacity * colour;
    }
  }
  return result;
}

/** @param {Uint8ClampedArray} pixels (size, size, 4) */
function bitmap(pixels) {
  const size = Math.sqrt(pixels.length / 4);
  const canvas = new OffscreenCanvas(size, size);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.putImageData(new ImageData(/** @type {Uint8ClampedArray<ArrayBuffer>} */ (pixels), size), 0, 0);
  return canvas;
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Int32Array} labels
 * @param {number} unit of the picture in a pixel of the map
 * @param {string} colour
 * @param {number} width
 */
function outline(context, labels, unit, colour, width) {
  context.beginPath();
  for (const [x0, y0, x1, y1] of borders(labels)) {
    context.moveTo(x0 * unit, y0 * unit);
    context.lineTo(x1 * unit, y1 * unit);
  }
  Object.assign(context, { strokeStyle: colour, lineWidth: width, lineCap: "square" });
  context.stroke();
}

/**
 * The cells of the 9 super tokens, with the share of the pixel in each.
 *
 * @param {CanvasRenderingContext2D} context
 * @param {{near: {token: number, share: number}[], token: number, found: import("./regions.js").Association}} seen
 * @param {number} cell in pixels of the picture
 */
function drawShares(context, { near, token, found }, cell) {
  const height = Math.min(Math.max(cell / 5, 15), 26);
  context.font = `600 ${height}px system-ui, sans-serif`;
  Object.assign(context, { textAlign: "center", textBaseline: "middle" });
  for (const { token: other, share } of near.filter((neighbour) => neighbour.token >= 0)) {
    const [row, column] = [Math.trunc(other / found.grid), other % found.grid];
    Object.assign(context, { strokeStyle: "rgb(255 255 255 / 0.9)", lineWidth: 2 });
    context.setLineDash([6, 4]);
    context.strokeRect(column * cell, row * cell, cell, cell);
    context.setLineDash([]);
    const [x, y] = [(column + 0.5) * cell, (row + 0.5) * cell];
    const text = `${Math.round(100 * share)}`;
    const width = context.measureText(text).width + height * 0.6;
    context.fillStyle = other === token ? "rgb(60 230 255)" : "rgb(0 0 0 / 0.65)";
    context.fillRect(x - width / 2, y - height * 0.65, width, height * 1.3);
    context.fillStyle = other === token ? "black" : "white";
    context.fillText(text, x, y);
  }
}

/** @param {CanvasRenderingContext2D} context @param {number} x @param {number} y */
function drawPoint(context, x, y) {
  context.beginPath();
  context.arc(x, y, 7, 0, 2 * Math.PI);
  Object.assign(context, { fillStyle: "rgb(60 230 255)", strokeStyle: "black", lineWidth: 2 });
  context.fill();
  context.stroke();
}
