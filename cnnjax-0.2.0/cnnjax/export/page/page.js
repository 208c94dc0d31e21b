// Draws or reads an image, prepares it, runs the network on it, and shows the probabilities.
"use strict";

const MODEL = globalThis.CNNJAX_MODEL;
const MOST_BARS = 10;
const PEN_SHARE = 0.075;
const find = (id) => document.getElementById(id);
const paper = find("paper"), pen = paper.getContext("2d", { willReadFrequently: true });
let session = null, shown = null, running = false, again = false;

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpacked(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// All is in scripts: of a page that is a file, browsers refuse to fetch any other.
async function open() {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await unpacked(globalThis.CNNJAX_WASM);
  const glue = URL.createObjectURL(new Blob([globalThis.CNNJAX_GLUE], { type: "text/javascript" }));
  ort.env.wasm.wasmPaths = { mjs: glue };
  return ort.InferenceSession.create(bytesOf(MODEL.onnx), { executionProviders: ["wasm"] });
}

function probabilitiesOf(logits) {
  const all = logits.length === 1 ? [0, logits[0]] : Array.from(logits);
  const most = Math.max(...all), weights = all.map((logit) => Math.exp(logit - most));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / sum);
}

// The bytes that the network gets of what is on the paper, or null.
function input() {
  if (!shown) return null;
  const pixels = shown === "drawing" ? pen.getImageData(0, 0, paper.width, paper.height) : shown;
  return prepare.image(pixels, MODEL.image_shape, MODEL.prepare, MODEL.fit);
}

async function answer() {
  if (!session) return;
  if (running) {
    again = true;
    return;
  }
  running = true;
  try {
    const bytes = input();
    if (bytes) await show(bytes);
    else clearAnswer(shown ? "Nothing stands out from the background." : invitation());
  } catch (error) {
    fail(error);
  }
  running = false;
  if (again) {
    again = false;
    await answer();
  }
}

async function show(bytes) {
  const tensor = new ort.Tensor("uint8", bytes, [1, ...MODEL.image_shape]);
  const begun = performance.now();
  const outputs = await session.run({ [session.inputNames[0]]: tensor });
  const milliseconds = performance.now() - begun;
  const probabilities = probabilitiesOf(outputs[session.outputNames[0]].data);
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
  // Few classes keep their places; of many only the likeliest are shown.
  const listed = probabilities.length > MOST_BARS ? order.slice(0, MOST_BARS) : [...order].sort((a, b) => a - b);
  drawBars(listed, probabilities, order[0]);
  drawSeen(bytes);
  find("answer").textContent = `${MODEL.class_names[order[0]]}, ${percent(probabilities[order[0]])}`;
  find("answer").className = "";
  globalThis.cnnjaxAnswer = { probabilities, bytes: Array.from(bytes), milliseconds };
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

function drawBars(listed, probabilities, best) {
  const bars = find("bars");
  while (bars.children.length < listed.length) {
    const row = document.createElement("li");
    for (const name of ["name", "track", "share"]) row.appendChild(document.createElement("span")).className = name;
    row.children[1].appendChild(document.createElement("span")).className = "fill";
    bars.appendChild(row);
  }
  listed.forEach((label, place) => {
    const row = bars.children[place], [name, track, share] = row.children;
    row.className = label === best && probabilities.length ? "best" : "";
    name.textContent = name.title = MODEL.class_names[label];
    track.firstChild.style.width = percent(probabilities[label] || 0);
    share.textContent = probabilities.length ? percent(probabilities[label]) : "";
  });
}

function drawSeen(bytes) {
  const [height, width, channels] = MODEL.image_shape, seen = find("seen");
  [seen.width, seen.height] = [width, height];
  seen.style.aspectRatio = `${width} / ${height}`;
  const pixels = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = bytes ? bytes[i * channels + (channels === 1 ? 0 : c)] : 0;
    pixels.data[4 * i + 3] = 255;
  }
  seen.getContext("2d").putImageData(pixels, 0, 0);
}

const invitation = () => (MODEL.prepare === "digit" ? "Write a digit." : "Choose an image, or drop one here.");

function clearAnswer(text) {
  find("answer").textContent = text;
  find("answer").className = "";
  drawBars(MODEL.class_names.slice(0, MOST_BARS).map((_, i) => i), [], -1);
  drawSeen(null);
  globalThis.cnnjaxAnswer = null;
}

function fail(error) {
  find("answer").className = "bad";
  find("answer").textContent = `The network cannot run here: ${error.message || error}`;
}

function clearPaper() {
  shown = null;
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, paper.width, paper.height);
}

function startDrawing() {
  document.body.classList.add("draws");
  let last = null;
  const place = (event) => {
    const box = paper.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * paper.width, ((event.clientY - box.top) / box.height) * paper.height];
  };
  const line = (from, to) => {
    pen.strokeStyle = "#000";
    pen.lineWidth = PEN_SHARE * paper.width;
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(...from);
    // A line without length would leave no dot.
    pen.lineTo(to[0], to[1] + (from[0] === to[0] && from[1] === to[1] ? 0.01 : 0));
    pen.stroke();
  };
  paper.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    try {
      paper.setPointerCapture(event.pointerId);
    } catch {
      // Of a pointer that a script made there is nothing to capture.
    }
    if (shown !== "drawing") clearPaper();
    shown = "drawing";
    last = { id: event.pointerId, at: place(event) };
    line(last.at, last.at);
    answer();
  });
  paper.addEventListener("pointermove", (event) => {
    if (!last || event.pointerId !== last.id) return;
    const between = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
    for (const each of between.length ? between : [event]) {
      const at = place(each);
      line(last.at, at);
      last.at = at;
    }
    answer();
  });
  for (const name of ["pointerup", "pointercancel"]) {
    paper.addEventListener(name, (event) => {
      if (last && event.pointerId === last.id) last = null;
    });
  }
}

async function read(file) {
  if (!file) return;
  try {
    const image = await createImageBitmap(file, { premultiplyAlpha: "none" });
    const whole = new OffscreenCanvas(image.width, image.height).getContext("2d");
    whole.drawImage(image, 0, 0);
    clearPaper();
    shown = whole.getImageData(0, 0, image.width, image.height);
    const scale = Math.min(paper.width / image.width, paper.height / image.height);
    const [width, height] = [image.width * scale, image.height * scale];
    pen.drawImage(image, (paper.width - width) / 2, (paper.height - height) / 2, width, height);
    await answer();
  } catch {
    find("answer").className = "bad";
    find("answer").textContent = `${file.name} is no image that this browser reads.`;
  }
}

function startReading() {
  find("file").addEventListener("change", (event) => read(event.target.files[0]));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
  document.addEventListener("dragleave", () => document.body.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    read(event.dataTransfer.files[0]);
  });
}

async function main() {
  const isDigit = MODEL.prepare === "digit";
  document.title = find("title").textContent = MODEL.title;
  find("task").textContent = isDigit
    ? "Write a digit with mouse or finger. The network runs in this page; nothing leaves it."
    : "Choose an image or drop one on the page. The network runs in this page; nothing leaves it.";
  find("facts").textContent = MODEL.facts;
  paper.setAttribute("aria-label", isDigit ? "Paper to write a digit on" : "The image");
  find("clear").addEventListener("click", () => {
    clearPaper();
    find("file").value = "";
    clearAnswer(invitation());
  });
  clearPaper();
  drawBars(MODEL.class_names.slice(0, MOST_BARS).map((_, i) => i), [], -1);
  drawSeen(null);
  if (isDigit) startDrawing();
  startReading();
  try {
    session = await open();
    find("answer").textContent = invitation();
    globalThis.cnnjaxReady = true;
    await answer();
  } catch (error) {
    fail(error);
  }
}

main();
