// The page of one text.  `data` is described in text_page.py.
// Axes: L layers, H heads, P prefix tokens, T tokens, S = P + T keys.

const data = JSON.parse(document.getElementById("data").textContent);
const L = data.layers, H = data.heads, S = data.tokens.length, P = data.prefix, T = S - P;
const NULL = data.hasNull ? 1 : 0; // columns before the keys
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const percent = (x) => `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)}\u00a0%`;
const number = (x) => x.toLocaleString("en-US", { maximumSignificantDigits: 5 });
const root = Math.sqrt; // the color scale of probabilities: small ones stay visible

const state = { layer: 0, head: 0, token: T - 1, weighted: false };

// --- The packed maps: see packing.py ------------------------------------------------------------

function unpack(text, lengths, levels) {
  const bytes = atob(text);
  let at = 0;
  const bit = () => (bytes.charCodeAt(at >> 3) >> (7 - (at++ & 7))) & 1;
  const bits = (count) => {
    let x = 0;
    while (count--) x = 2 * x + bit();
    return x;
  };
  return lengths.map((length) => {
    const k = bits(4);
    return Float32Array.from({ length }, () => {
      let ones = 0;
      while (bit()) ones++;
      return (ones * 2 ** k + bits(k)) / levels;
    });
  });
}

function unpackNorms({ top, text }) {
  const bytes = atob(text);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) =>
    top * (bytes.charCodeAt(2 * i) + 256 * bytes.charCodeAt(2 * i + 1)) / 65535);
}

const rowLengths = Array.from({ length: T }, (_, t) => NULL + P + t + 1);
const maps = new Map();

/** What the selected head reads: rows of T tokens, columns null (if there is one), then S keys. */
function attention() {
  const index = state.layer * H + state.head, key = `${index} ${state.weighted}`;
  if (!maps.has(key)) {
    const rows = unpack(data.maps[index], rowLengths, data.levels);
    if (state.weighted) {
      const norms = unpackNorms(data.norms[index]);
      const nulls = data.nullNorms ? unpackNorms(data.nullNorms[index]) : null;
      rows.forEach((row, t) => {
        if (NULL) row[0] = nulls ? nulls[t] : 0;
        for (let j = 0; j < row.length - NULL; j++) row[NULL + j] *= norms[j];
      });
    }
    maps.set(key, rows);
  }
  return maps.get(key);
}

const columnName = (c) => (c < NULL ? "the null option" : data.names[c - NULL]);
const readName = (t) => data.names[P + t];
const amount = (x) => (state.weighted ? number(Number(x.toPrecision(3))) : percent(x));

// --- The text -----------------------------------------------------------------------------------

const shown = (text) => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t") || "·";
const options = data.tokens.map((text, j) => {
  const option = document.createElement("span");
  option.setAttribute("role", "option");
  option.setAttribute("aria-label", data.names[j] + (data.sinks.includes(j) ? ", sink" : ""));
  option.textContent = j < P ? `[${shown(text)}]` : shown(text);
  if (data.sinks.includes(j)) option.dataset.sink = "";
  option.addEventListener("pointerenter", () => describeToken(j));
  option.addEventListener("focus", () => describeToken(j));
  return option;
});
$("tokens").append(...options);
roving(options, 1, (j) => selectToken(Math.max(0, j - P)));

function describeToken(j) {
  const parts = [`receives ${percent(data.received[j])} of all attention`];
  if (NULL && j >= P) parts.push(`null probability ${percent(data.nullOfToken[j - P])}`);
  if (j >= P) {
    const [layer, { value, channel }] = largestOfToken(j - P);
    parts.push(`largest activation ${number(value)} (layer ${layer}, channel ${channel})`);
  }
  $("token-readout").textContent = `${data.names[j]}: ${parts.join("; ")}`;
}

function drawText() {
  const kind = chosen("text-color");
  const row = kind === "read" ? attention()[state.token] : null;
  const most = row && state.weighted ? Math.max(...row) || 1 : 1;
  options.forEach((option, j) => {
    const value = {
      received: () => data.received[j],
      null: () => data.nullOfToken[j - P] ?? 0,
      read: () => (row[NULL + j] ?? 0) / most,
    }[kind]();
    option.style.setProperty("--share", root(Math.min(1, value)).toFixed(3));
    option.classList.toggle("null", kind === "null");
    option.classList.toggle("read", kind === "read");
  });
  const tint = { received: "var(--sink-tint)", null: "var(--null-tint)", read: "var(--read-tint)" };
  legend("text-scale", tint[kind], "0", state.weighted && row ? amount(most) : "100 %");
}

function selectToken(token) {
  state.token = token;
  mark(options, P + token);
  drawReads();
  drawAttention();
  drawDepth();
}

// --- The heads ----------------------------------------------------------------------------------

/** A row of the grid: the header of a row or a corner, and a cell for each head. */
function gridRow(header, cell) {
  const row = document.createElement("div"), first = document.createElement("span");
  row.setAttribute("role", "row");
  first.setAttribute("role", header === "" ? "columnheader" : "rowheader");
  first.textContent = header;
  row.append(first, ...Array.from({ length: H }, (_, head) => cell(head)));
  $("grid").append(row);
}

const cells = [];
$("grid").style.setProperty("--heads", H);
gridRow("", (head) => {
  const header = document.createElement("span");
  header.setAttribute("role", "columnheader");
  header.textContent = head % Math.ceil(H / 16) ? "" : head;
  return header;
});
for (let layer = 0; layer < L; layer++) {
  gridRow(layer, (head) => {
    const cell = document.createElement("button");
    cell.type = "button";
    cell.setAttribute("role", "gridcell");
    cell.addEventListener("pointerenter", () => summarize(layer, head));
    cell.addEventListener("pointerleave", () => summarize(state.layer, state.head));
    cells.push(cell);
    return cell;
  });
}
roving(cells, H, (i) => selectHead(Math.floor(i / H), i % H));

const sinkOf = (i) => (state.weighted ? data.weightedSink : data.sink)[i];

function summarize(layer, head) {
  const i = layer * H + head;
  $("head-title").textContent = `Layer ${layer}, head ${head}`;
  const null_ = NULL ? `; null probability ${percent(data.nullOfHead[i])}` : "";
  $("head-summary").textContent = `Sink probability ${percent(sinkOf(i).value)}`
    + `${state.weighted ? " by norm" : ""}, on ${data.names[sinkOf(i).at]}${null_}`;
}

function drawGrid() {
  const byNull = chosen("head-color") === "null";
  const tone = byNull ? "var(--null)" : "var(--sink)";
  $("grid").style.setProperty("--tone", tone);
  cells.forEach((cell, i) => {
    const value = byNull ? data.nullOfHead[i] : sinkOf(i).value;
    cell.style.setProperty("--share", value.toFixed(3));
    const what = byNull ? "null" : "sink";
    cell.setAttribute("aria-label",
      `layer ${Math.floor(i / H)}, head ${i % H}: ${what} probability ${percent(value)}`);
  });
  legend("grid-scale", tone, "0", "100 %");
}

const attentionMap = new HeatMap("attention", (t, c) => {
  options.forEach((option, j) => option.classList.toggle("pointed", j === P + t || j === c - NULL));
  return `${readName(t)} reads ${columnName(c)}: ${amount(attention()[t][c])}`;
}, (t) => selectToken(t));

function drawAttention() {
  const rows = attention();
  const most = state.weighted ? Math.max(...rows.map((row) => Math.max(...row))) || 1 : 1;
  attentionMap.show(`Attention of layer ${state.layer}, head ${state.head}`,
    rows.map((row) => row.map((x) => root(x / most))),
    { high: "--read", apart: NULL, row: state.token, start: [state.token, NULL],
      labels: data.tokens.slice(P).map((text) => shown(text).trim()), ends: true });
  legend("attention-scale", "var(--read)", "0",
    state.weighted ? `${amount(most)} (norm)` : "100 % of a token's attention");
}

function drawReads() {
  const row = attention()[state.token], total = row.reduce((sum, x) => sum + x, 0) || 1;
  const read = [...row.keys()].filter((c) => row[c] > 0);
  const order = read.sort((a, b) => row[b] - row[a]).slice(0, 8);
  $("reads-title").textContent = `${readName(state.token)} reads`;
  $("reads").replaceChildren(...order.map((c) => {
    const item = document.createElement("li"), name = document.createElement("span");
    const value = document.createElement("b");
    name.textContent = columnName(c);
    value.textContent = amount(row[c]);
    item.classList.toggle("null", c < NULL);
    item.style.setProperty("--share", row[c] / (state.weighted ? total : 1));
    item.append(name, value);
    return item;
  }));
  drawText();
}

function selectHead(layer, head) {
  Object.assign(state, { layer, head });
  mark(cells, layer * H + head);
  summarize(layer, head);
  drawReads();
  drawAttention();
}

// --- Activations --------------------------------------------------------------------------------

const activation = (layer, t) =>
  ({ value: data.largest[layer][t], channel: data.channels[layer][t] });

/** The layer with the token's largest activation, and this activation. */
function largestOfToken(t) {
  let best = 0;
  for (let layer = 1; layer < L; layer++) {
    if (Math.abs(data.largest[layer][t]) > Math.abs(data.largest[best][t])) best = layer;
  }
  return [best, activation(best, t)];
}

const massive = new Set(data.massive.map(([layer, t]) => `${layer} ${t}`));
const activationMap = new HeatMap("activations", (layer, t) => {
  const { value, channel } = activation(layer, t);
  const ratio = Math.abs(value) / data.medians[layer];
  const size = data.medians[layer] ? `${number(Number(ratio.toPrecision(3)))} times the median`
    : "the median is 0";
  const note = massive.has(`${layer} ${t}`) ? "massive: " : "";
  return `Layer ${layer}, ${readName(t)}: ${number(value)} in channel ${channel}`
    + ` (${note}${size})`;
}, (_, t) => selectToken(t));

function drawActivations() {
  const sizes = data.largest.flat().map(Math.abs).filter((x) => x > 0);
  const low = Math.log(Math.min(...sizes)), span = Math.log(Math.max(...sizes)) - low || 1;
  const scaled = (x) => (x ? (Math.log(Math.abs(x)) - low) / span : 0);
  activationMap.show("Largest activation of each layer and token",
    data.largest.map((row) => row.map(scaled)),
    { high: "--peak", marks: data.massive, labels: data.largest.map((_, layer) => layer),
      height: (width) => Math.min(14 * L, Math.max(0.35 * width, 180)) });
  const note = data.massive.length ? "; framed: massive" : "";
  legend("activations-scale", "var(--peak)", Math.exp(low).toPrecision(2),
    `${number(Math.exp(low + span))}, logarithmic${note}`);
}

// --- Depth routing ------------------------------------------------------------------------------

const depthCache = new Map();

/** Weights [router][source] of a token, or their mean over all tokens. */
function depthWeights(kind, token) {
  const key = `${kind} ${token}`;
  if (!depthCache.has(key)) {
    const of = (t) => unpack(data.depth[kind][t], data.depth.lengths, data.levels);
    let rows;
    if (token === "mean") {
      rows = data.depth.lengths.map((n) => new Float32Array(n));
      for (let t = 0; t < T; t++) {
        of(t).forEach((row, r) => row.forEach((x, i) => { rows[r][i] += x / T; }));
      }
    } else rows = of(token);
    depthCache.set(key, rows);
  }
  return depthCache.get(key);
}

function depthRows() {
  const token = chosen("depth-token") === "mean" ? "mean" : state.token, kind = chosen("signal");
  if (kind !== "change") return depthWeights(kind, token);
  const off = depthWeights("off", token);
  return depthWeights("on", token).map((row, r) => row.map((x, i) => x - off[r][i]));
}

const depthMap = data.depth && new HeatMap("depth", (r, i) => {
  const value = depthRows()[r][i], sign = chosen("signal") === "change" && value > 0 ? "+" : "";
  return `Input of ${data.depth.routers[r]}: ${sign}${percent(value)} ${data.depth.sources[i]}`;
});

function drawDepth() {
  if (!data.depth) return;
  const change = chosen("signal") === "change", rows = depthRows();
  const most = change ? Math.max(...rows.flatMap((row) => [...row.map(Math.abs)])) || 1 : 1;
  const scaled = (x) => Math.sign(x) * root(Math.abs(x) / most);
  depthMap.show("Weights of the depth routers", rows.map((row) => row.map(scaled)),
    { high: "--read", low: "--sink", labels: data.depth.routers, ends: true });
  if (change) {
    legend("depth-scale", "var(--read)", `−${percent(most)}`, `+${percent(most)}`,
      "var(--sink), var(--empty)");
  } else legend("depth-scale", "var(--read)", "0", "100 % of a router's weight");
}

// --- Start --------------------------------------------------------------------------------------

document.body.classList.toggle("with-null", data.hasNull);
document.body.classList.toggle("with-signal", Boolean(data.depth?.off));
$("depth-section").hidden = !data.depth;
const on = (name, draw) => document.querySelectorAll(`input[name=${name}]`).forEach((input) =>
  input.addEventListener("change", draw));
on("text-color", drawText);
on("head-color", drawGrid);
on("depth-token", drawDepth);
on("signal", drawDepth);
$("weighted").addEventListener("change", (event) => {
  state.weighted = event.target.checked;
  drawGrid();
  selectHead(state.layer, state.head);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const map of [attentionMap, activationMap, depthMap]) map?.draw();
});
mark(options, P + state.token);
drawGrid();
const first = data.sink.reduce((best, x, i) => (x.value > data.sink[best].value ? i : best), 0);
selectHead(Math.floor(first / H), first % H);
drawActivations();
drawDepth();
describeToken(data.sinks[0] ?? P);
