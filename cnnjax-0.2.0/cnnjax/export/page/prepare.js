// Images as the network expects them, of pictures of any size: the same steps, numbers and rounding
// as cnnjax.data.digit_from_image and cnnjax.data.image_to_shape, to which a test holds them.
"use strict";

const prepare = (() => {
  // A gray plane: {height, width, data: Float64Array}.
  const plane = (height, width, data) => ({ height, width, data: data || new Float64Array(height * width) });

  // As NumPy's and Python's, halves go to the even number.
  function round(value) {
    const below = Math.floor(value), rest = value - below;
    if (rest !== 0.5) return Math.round(value);
    return below % 2 === 0 ? below : below + 1;
  }

  function quantile(values, share) {
    const sorted = Float64Array.from(values).sort();
    const place = share * (sorted.length - 1), below = Math.floor(place);
    const above = Math.min(below + 1, sorted.length - 1);
    return sorted[below] + (place - below) * (sorted[above] - sorted[below]);
  }

  // pixels: {height, width, data: RGBA bytes}, as a canvas returns them.
  function grayWithBackground(pixels) {
    const count = pixels.height * pixels.width, gray = plane(pixels.height, pixels.width);
    const luma = (i) => 0.299 * pixels.data[i] + 0.587 * pixels.data[i + 1] + 0.114 * pixels.data[i + 2];
    let sum = 0, opacity = 0;
    for (let i = 0; i < 4 * count; i += 4) {
      sum += luma(i) * pixels.data[i + 3];
      opacity += pixels.data[i + 3];
    }
    const background = sum / Math.max(opacity, 1) < 128 ? 255 : 0;
    for (let i = 0; i < count; i++) {
      const share = pixels.data[4 * i + 3] / 255;
      gray.data[i] = luma(4 * i) * share + background * (1 - share);
    }
    return gray;
  }

  // Least squares of a plane, by the normal equations of three unknowns.
  function fittedPlane(rows) {
    const matrix = [0, 1, 2].map(() => new Float64Array(4));
    for (const [a, b, c, value] of rows) {
      const row = [a, b, c];
      for (let i = 0; i < 3; i++) {
        for (let j = 0; j < 3; j++) matrix[i][j] += row[i] * row[j];
        matrix[i][3] += row[i] * value;
      }
    }
    for (let i = 0; i < 3; i++) {
      let pivot = i;
      for (let j = i + 1; j < 3; j++) if (Math.abs(matrix[j][i]) > Math.abs(matrix[pivot][i])) pivot = j;
      [matrix[i], matrix[pivot]] = [matrix[pivot], matrix[i]];
      if (Math.abs(matrix[i][i]) < 1e-12) continue;
      for (let j = 0; j < 3; j++) {
        if (j === i) continue;
        const factor = matrix[j][i] / matrix[i][i];
        for (let k = i; k < 4; k++) matrix[j][k] -= factor * matrix[i][k];
      }
    }
    return matrix.map((row, i) => (Math.abs(row[i]) < 1e-12 ? 0 : row[3] / row[i]));
  }

  // Background to 0, full ink to 1, whichever of the two is the darker one; null where nothing is.
  function stretchedInk(gray) {
    const { height, width, data } = gray;
    const frame = Math.max(1, round(0.02 * Math.min(height, width)));
    const border = [];
    for (let r = 0; r < height; r++) {
      for (let c = 0; c < width; c++) {
        if (r < frame || r >= height - frame || c < frame || c >= width - frame) border.push(r * width + c);
      }
    }
    const middle = quantile(border.map((i) => data[i]), 0.5);
    const distances = border.map((i) => Math.abs(data[i] - middle));
    const limit = quantile(distances, 0.5);
    const kept = border.filter((_, i) => distances[i] <= limit);
    const basis = (i) => [1, Math.floor(i / width) / height, (i % width) / width];
    const fit = fittedPlane(kept.map((i) => [...basis(i), data[i]]));
    const departure = plane(height, width);
    let highest = -Infinity, lowest = Infinity;
    for (let i = 0; i < data.length; i++) {
      const [a, b, c] = basis(i);
      const value = data[i] - (a * fit[0] + b * fit[1] + c * fit[2]);
      departure.data[i] = value;
      highest = Math.max(highest, value);
      lowest = Math.min(lowest, value);
    }
    const mean = kept.reduce((sum, i) => sum + departure.data[i], 0) / kept.length;
    const variance = kept.reduce((sum, i) => sum + (departure.data[i] - mean) ** 2, 0) / kept.length;
    const noise = 3 * Math.sqrt(variance), sign = highest > -lowest ? 1 : -1;
    const strongest = sign > 0 ? highest : -lowest;
    if (strongest - noise < 16) return null;
    const ink = departure.data.map((value) => sign * value);
    const full = quantile(ink.filter((value) => value > noise + 0.5 * (strongest - noise)), 0.9);
    return plane(height, width, ink.map((value) => Math.min(1, Math.max(0, (value - noise) / (full - noise)))));
  }

  // Keeps the connected parts that have at least a fiftieth of the largest one's ink.
  function withoutSpecks(ink) {
    const { height, width, data } = ink;
    const part = new Int32Array(data.length), mass = [0];
    for (let start = 0; start < data.length; start++) {
      if (part[start] || !(data[start] > 0.1)) continue;
      const label = mass.length, waiting = [start];
      let sum = 0;
      part[start] = label;
      while (waiting.length) {
        const i = waiting.pop(), row = Math.floor(i / width), column = i % width;
        sum += data[i];
        for (let r = Math.max(0, row - 1); r <= Math.min(height - 1, row + 1); r++) {
          for (let c = Math.max(0, column - 1); c <= Math.min(width - 1, column + 1); c++) {
            const next = r * width + c;
            if (!part[next] && data[next] > 0.1) {
              part[next] = label;
              waiting.push(next);
            }
          }
        }
      }
      mass.push(sum);
    }
    const least = 0.02 * mass.reduce((a, b) => Math.max(a, b), 0);
    return plane(height, width, data.map((value, i) => (part[i] && mass[part[i]] >= least ? value : 0)));
  }

  // Squared distances to the nearest 0 along one line (Felzenszwalb and Huttenlocher 2012).
  function lineDistances(line) {
    const count = line.length, places = new Int32Array(count), bounds = new Float64Array(count + 1);
    const result = new Float64Array(count);
    let last = 0;
    bounds[0] = -Infinity;
    bounds[1] = Infinity;
    const crossing = (q, v) => (line[q] + q * q - (line[v] + v * v)) / (2 * q - 2 * v);
    for (let q = 1; q < count; q++) {
      let s = crossing(q, places[last]);
      while (s <= bounds[last]) s = crossing(q, places[--last]);
      places[++last] = q;
      bounds[last] = s;
      bounds[last + 1] = Infinity;
    }
    for (let q = 0, k = 0; q < count; q++) {
      while (bounds[k + 1] < q) k++;
      result[q] = (q - places[k]) ** 2 + line[places[k]];
    }
    return result;
  }

  // The mean over stroke pixels of the distance to what is none; outside there is no stroke.
  function meanDepth(ink) {
    const height = ink.height + 2, width = ink.width + 2, far = 1e12;
    const squares = new Float64Array(height * width);
    for (let r = 0; r < ink.height; r++) {
      for (let c = 0; c < ink.width; c++) {
        if (ink.data[r * ink.width + c] > 0.5) squares[(r + 1) * width + c + 1] = far;
      }
    }
    const stroke = squares.map((value) => (value ? 1 : 0));
    for (let c = 0; c < width; c++) {
      const column = lineDistances(Float64Array.from({ length: height }, (_, r) => squares[r * width + c]));
      for (let r = 0; r < height; r++) squares[r * width + c] = column[r];
    }
    let sum = 0, count = 0;
    for (let r = 0; r < height; r++) {
      const line = lineDistances(squares.slice(r * width, (r + 1) * width));
      for (let c = 0; c < width; c++) {
        if (stroke[r * width + c]) {
          sum += Math.sqrt(line[c]);
          count += 1;
        }
      }
    }
    return sum / count;
  }

  function thickened(ink, leastWidth) {
    const radius = Math.ceil((leastWidth - (4 * meanDepth(ink) - 2)) / 2);
    if (radius < 1) return ink;
    const height = ink.height + 2 * radius, width = ink.width + 2 * radius;
    const wide = plane(height, width), result = plane(height, width);
    for (let r = 0; r < ink.height; r++) {
      for (let c = 0; c < width; c++) {
        let most = 0;
        for (let k = Math.max(0, c - 2 * radius); k <= Math.min(ink.width - 1, c); k++) {
          most = Math.max(most, ink.data[r * ink.width + k]);
        }
        wide.data[(r + radius) * width + c] = most;
      }
    }
    for (let r = 0; r < height; r++) {
      for (let k = Math.max(0, r - radius); k <= Math.min(height - 1, r + radius); k++) {
        for (let c = 0; c < width; c++) {
          const i = r * width + c;
          if (wide.data[k * width + c] > result.data[i]) result.data[i] = wide.data[k * width + c];
        }
      }
    }
    return result;
  }

  const FILTERS = {
    hamming: [1, (x) => {
      const away = Math.abs(x) * Math.PI;
      if (away === 0) return 1;
      return away >= Math.PI ? 0 : (Math.sin(away) / away) * (0.54 + 0.46 * Math.cos(away));
    }],
    bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
    bicubic: [2, (x) => {
      const away = Math.abs(x), a = -0.5;
      if (away < 1) return ((a + 2) * away - (a + 3)) * away * away + 1;
      return away < 2 ? (((away - 5) * away + 8) * away - 4) * a : 0;
    }],
    lanczos: [3, (x) => {
      const sinc = (y) => (y === 0 ? 1 : Math.sin(y * Math.PI) / (y * Math.PI));
      return Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0;
    }],
  };

  // The pixels and weights of each pixel of a scaled line, as Pillow has them.
  function weights(length, wanted, name) {
    const [reach, filter] = FILTERS[name], scale = length / wanted, spread = Math.max(scale, 1);
    return Array.from({ length: wanted }, (_, i) => {
      const center = (i + 0.5) * scale, support = reach * spread;
      const first = Math.max(0, Math.trunc(center - support + 0.5));
      const end = Math.min(length, Math.trunc(center + support + 0.5));
      const all = [];
      for (let k = first; k < end; k++) all.push(filter((k - center + 0.5) / spread));
      const sum = all.reduce((a, b) => a + b, 0);
      return { first, weights: all.map((weight) => (sum === 0 ? weight : weight / sum)) };
    });
  }

  // Scales one axis; `store` rounds sums as the type of the pixels does.
  function scaledLines(source, count, step, between, length, table, target, targetStep, targetBetween, store) {
    for (let line = 0; line < count; line++) {
      for (let i = 0; i < table.length; i++) {
        let sum = 0;
        const { first, weights: own } = table[i];
        for (let k = 0; k < own.length; k++) sum += source[line * between + (first + k) * step] * own[k];
        target[line * targetBetween + i * targetStep] = store(sum);
      }
    }
  }

  function resizedPlane(source, height, width, name, whole) {
    // Of bytes the weights are whole multiples of 2^-22, and sums are rounded up from the half.
    const exact = (table) =>
      whole
        ? table.map((entry) => ({ ...entry, weights: entry.weights.map((w) => Math.trunc((w < 0 ? -0.5 : 0.5) + w * 2 ** 22)) }))
        : table;
    const store = whole
      ? (sum) => Math.min(255, Math.max(0, Math.floor((sum + 2 ** 21) / 2 ** 22)))
      : Math.fround;
    let found = source;
    if (width !== found.width) {
      const next = plane(found.height, width), table = exact(weights(found.width, width, name));
      scaledLines(found.data, found.height, 1, found.width, found.width, table, next.data, 1, width, store);
      found = next;
    }
    if (height !== found.height) {
      const next = plane(height, width), table = exact(weights(found.height, height, name));
      scaledLines(found.data, width, width, 1, found.height, table, next.data, width, 1, store);
      found = next;
    }
    return found;
  }

  function nearest(source, height, width) {
    // Places are summed up as Pillow does, whose rounding decides ties.
    const places = (length, wanted) => {
      const found = [];
      for (let i = 0, at = (0.5 * length) / wanted; i < wanted; i++, at += length / wanted) found.push(Math.trunc(at));
      return found;
    };
    const next = plane(height, width), columns = places(source.width, width);
    places(source.height, height).forEach((row, r) => {
      for (let c = 0; c < width; c++) next.data[r * width + c] = source.data[row * source.width + columns[c]];
    });
    return next;
  }

  function cut(source, top, left, height, width) {
    const part = plane(height, width);
    for (let r = 0; r < height; r++) {
      for (let c = 0; c < width; c++) part.data[r * width + c] = source.data[(r + top) * source.width + c + left];
    }
    return part;
  }

  function placed(source, top, left, height, width) {
    const whole = plane(height, width);
    for (let r = 0; r < source.height; r++) {
      for (let c = 0; c < source.width; c++) {
        whole.data[(r + top) * width + c + left] = source.data[r * source.width + c];
      }
    }
    return whole;
  }

  function extent(ink) {
    let [top, left, bottom, right] = [Infinity, Infinity, -1, -1];
    for (let i = 0; i < ink.data.length; i++) {
      if (!ink.data[i]) continue;
      const row = Math.floor(i / ink.width), column = i % ink.width;
      [top, bottom] = [Math.min(top, row), Math.max(bottom, row)];
      [left, right] = [Math.min(left, column), Math.max(right, column)];
    }
    return { top, left, height: bottom - top + 1, width: right - left + 1 };
  }

  function scaledToBox(ink, side) {
    const found = extent(ink), scale = side / Math.max(found.height, found.width);
    const part = cut(ink, found.top, found.left, found.height, found.width);
    part.data = part.data.map(Math.fround);
    const sides = [part.height, part.width].map((length) => Math.max(1, round(length * scale)));
    const digit = resizedPlane(part, ...sides, "hamming", false);
    const most = digit.data.reduce((a, b) => Math.max(a, b), 0);
    const white = quantile(digit.data.filter((value) => value > 0.5 * most), 0.5);
    digit.data = digit.data.map((value) => Math.min(1, Math.max(0, value / white)));
    return digit;
  }

  function centered(digit, size) {
    let sum = 0, rows = 0, columns = 0;
    for (let i = 0; i < digit.data.length; i++) {
      sum += digit.data[i];
      rows += digit.data[i] * Math.floor(i / digit.width);
      columns += digit.data[i] * (i % digit.width);
    }
    const corner = (mean, side) => Math.min(size - side, Math.max(0, round(size / 2 - mean)));
    return placed(digit, corner(rows / sum, digit.height), corner(columns / sum, digit.width), size, size);
  }

  // A gray plane of bytes, 28 x 28, as MNIST was made; null where there is no digit.
  function digit(pixels, size = 28) {
    let ink = stretchedInk(grayWithBackground(pixels));
    if (!ink) return null;
    ink = withoutSpecks(ink);
    const side = Math.max(1, round((size * 20) / 28)), found = extent(ink);
    const scale = side / Math.max(found.height, found.width);
    const made = centered(scaledToBox(thickened(ink, (2 * size) / 28 / scale), side), size);
    made.data = made.data.map((value) => round(255 * value));
    return made;
  }

  // One plane of an image in the network's size; fit: {kind, share, resize, interpolation}.
  function fitted(source, height, width, fit) {
    const name = fit.interpolation || "bilinear";
    const resized = (part, h, w) =>
      part.height === h && part.width === w ? part
        : name === "nearest" ? nearest(part, h, w) : resizedPlane(part, h, w, name, true);
    if (fit.kind === "resize") return resized(source, height, width);
    if (fit.kind === "center") {
      const shorter = Math.min(source.height, source.width);
      const [h, w] = [source.height, source.width].map((side) => Math.trunc((fit.resize * side) / shorter));
      return cut(resized(source, h, w), round((h - height) / 2), round((w - width) / 2), height, width);
    }
    if (fit.kind === "crop") {
      const scale = fit.share * Math.min(source.height / height, source.width / width);
      const [h, w] = [height, width].map((side) => Math.max(1, round(side * scale)));
      const top = Math.floor((source.height - h) / 2), left = Math.floor((source.width - w) / 2);
      return resized(cut(source, top, left, h, w), height, width);
    }
    const scale = Math.min(1, height / source.height, width / source.width);
    const small = resized(source, ...[source.height, source.width].map((side) => Math.max(1, round(side * scale))));
    return placed(small, Math.floor((height - small.height) / 2), Math.floor((width - small.width) / 2), height, width);
  }

  // RGBA pixels as the planes of an image of 1 or 3 channels; transparency is laid over white.
  function planes(pixels, channels) {
    const found = [0, 1, 2].map((channel) => {
      const one = plane(pixels.height, pixels.width);
      for (let i = 0; i < one.data.length; i++) {
        const share = pixels.data[4 * i + 3] / 255;
        one.data[i] = round(pixels.data[4 * i + channel] * share + 255 * (1 - share));
      }
      return one;
    });
    if (channels === 3) return found;
    const [red, green, blue] = found.map((each) => each.data);
    const gray = red.map((_, i) => round(0.299 * red[i] + 0.587 * green[i] + 0.114 * blue[i]));
    return [plane(pixels.height, pixels.width, gray)];
  }

  // Bytes [height, width, channels] of the network's image; null where there is no digit.
  function image(pixels, [height, width, channels], how, fit) {
    let found;
    if (how === "digit") {
      const made = digit(pixels);
      if (!made) return null;
      found = Array.from({ length: channels }, () => made);
    } else {
      found = planes(pixels, channels);
    }
    found = found.map((each) => fitted(each, height, width, fit));
    const bytes = new Uint8Array(height * width * channels);
    for (let i = 0; i < height * width; i++) {
      for (let c = 0; c < channels; c++) bytes[i * channels + c] = found[c].data[i];
    }
    return bytes;
  }

  return { digit, image };
})();

if (typeof module !== "undefined") module.exports = prepare;
