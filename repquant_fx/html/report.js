"use strict";
// Draws the page from the JSON in #data. Overviews are drawn at once; a layer's figures when it is chosen.

const data = JSON.parse(document.getElementById("data").textContent);
const layers = data.layers, statistics = data.statistics || { activations: {}, weights: {} };
const main = document.getElementById("main");
const narrow = window.matchMedia("(max-width: 720px)").matches;
const COLORS = { norm_linear: "#2563a8", affine_linear: "#6d4fb8", linear: "#3a9188", matmul: "#d98324", conv: "#8a5fb0" };
const KINDS = { norm_linear: "behind a norm", affine_linear: "behind an activation", linear: "linear", matmul: "matrix product", conv: "convolution" };
const BEFORE = "#a9742b", AFTER = "#2563a8", BOUND = "#c62828", BARS = "#8fb3d9";
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover", modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };

window.addEventListener("error", e => main.prepend(element("p", { className: "problem" }, "The page could not be drawn: " + e.message)));

// ---- small helpers ----------------------------------------------------------------------------------------------------------------

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter(c => c !== null && c !== undefined));
  return made;
}
const known = v => v !== null && v !== undefined;
const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;"); // Plotly reads labels as markup
const number = (v, digits = 4) => known(v) ? String(Number(Number(v).toPrecision(digits))) : "–";
const percent = v => known(v) ? (v === 0 ? "0" : number(100 * v, 3)) + " %" : "–";
const size = b => b >= 1e6 ? (b / 1e6).toFixed(2) + " MB" : b >= 1e3 ? (b / 1e3).toFixed(1) + " kB" : b + " B";
const decibel = v => known(v) ? v.toFixed(1) + " dB" : "–";
const section = (title, ...children) => { const s = element("section", {}, element("h2", {}, title), ...children); main.append(s); return s; };
const note = text => element("p", { className: "note" }, text);
const plot = name => element("div", { className: "plot", id: name });
const kindOf = layer => layer.group || "linear";
const kindText = layer => KINDS[kindOf(layer)] || kindOf(layer).replace("_", " ");

function draw(place, traces, layout, height) {
  const base = {
    height: height || (narrow ? 270 : 320), margin: { l: 56, r: 12, t: 12, b: 46 }, paper_bgcolor: "#fff", plot_bgcolor: "#fff", bargap: 0.15,
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", size: 12, color: "#1b2330" }, hoverlabel: { align: "left" },
    dragmode: narrow ? false : "zoom", legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
  };
  const full = { ...base, ...layout };
  for (const axis of ["xaxis", "yaxis"]) full[axis] = { gridcolor: "#e8ecf0", zerolinecolor: "#cfd6de", fixedrange: narrow, ...full[axis] };
  return Plotly.newPlot(place, traces, full, CONFIG);
}

function table(columns, rows, onClick) {
  const head = element("tr", {}, ...columns.map(c => element("th", { className: c.number ? "number" : "" }, c.title)));
  const body = element("tbody", {}, ...rows.map(row => {
    const line = element("tr", { className: onClick ? "link" : "" }, ...columns.map(c => element("td", { className: c.number ? "number" : c.style || "" }, c.text(row))));
    if (onClick) line.addEventListener("click", () => onClick(row));
    return line;
  }));
  return element("div", { className: "scroll" }, element("table", {}, element("thead", {}, head), body));
}

// ---- summary ----------------------------------------------------------------------------------------------------------------------

function summary() {
  const report = data.report, parity = data.parity, calibration = report.calibration;
  const weighted = layers.filter(l => l.weight).length;
  document.getElementById("head").append(element("h1", {}, data.title), element("p", {},
    [report.compiled === false ? "not compiled yet: what would be done" : null, report.bits, layers.length ? layers.length + " quantized layers" : null, report.target && "for " + report.target, report.repquant_fx && "repquant-fx " + report.repquant_fx].filter(Boolean).join(" · ")));
  const cards = element("div", { className: "cards" });
  const card = (value, text, bad) => cards.append(element("div", { className: bad ? "card bad" : "card" }, element("b", {}, value), element("span", {}, text)));
  if (known(report.output_sqnr_db)) card(decibel(report.output_sqnr_db), "output against the float model (SQNR)" + (calibration ? `, ${calibration.held_back} held-back samples` : ""));
  if (parity) card(parity.agrees ? "agrees" : "disagrees", `checked in ONNX Runtime at each of ${parity.compared} quantizers on equal inputs: ${parity.worst_share ? `at most ${percent(parity.worst_share)} of the codes differ` : "0 codes differ, ties aside"}`, !parity.agrees);
  if (layers.length) card(`${weighted} + ${layers.length - weighted}`, "layers with weights + matrix products");
  if (known(report.weighted_layers)) card(`${report.weighted_layers} + ${report.products}`, "layers with weights + matrix products");
  if (known(report.sites)) card(String(report.sites), (report.compiled ? "quantized activations: " : "activations would be quantized: ") + Object.entries(report.kinds).map(([kind, n]) => `${n} ${kind}`).join(", "));
  if (known(report.quantized_parameters)) card(report.quantized_parameters.toLocaleString("en"), report.compiled ? "quantized weights" : "weights would be quantized");
  if (known(data.products)) card(`${data.products - data.lost.length} of ${data.products}`, "quantized products run as integer kernels under ONNX Runtime");
  if (known(report.file_bytes)) card(size(report.file_bytes), "size of the ONNX file" + (report.float_bytes ? `; in float ${size(report.float_bytes)}` : ""));
  if (known(report.left_alone)) card(String(report.left_alone.length), "norms, Softmaxes and products left alone");
  if (calibration) card(String(calibration.samples), `calibration samples: ${calibration.origin}`, calibration.synthetic);
  if (known(report.peak_memory_mb)) card((report.peak_memory_mb / 1000).toFixed(2) + " GB", "peak memory while compiling");
  main.append(cards);
  if (calibration && calibration.synthetic) main.append(element("p", { className: "problem" }, "Calibrated on made-up inputs: the figures say little about real data."));
}

function leftAlone() {
  const items = data.report.left_alone || [];
  if (!items.length) return;
  section("Left alone", note("Norms, Softmaxes and products that were not quantized or not rewritten, and why."),
    table([{ title: "path", text: i => i.path }, { title: "operator", text: i => i.operator }, { title: "reason", style: "reason", text: i => i.reason }], items));
}

function lost() {
  if (!known(data.products) || (!data.lost.length && !data.products)) return;
  if (!data.lost.length) return void section("Products in float", note(`None: all ${data.products} quantized products run as integer kernels under ONNX Runtime.`));
  section("Products in float", note(`${data.lost.length} of ${data.products} quantized products did not become integer kernels under ONNX Runtime (CPU); their operands are dequantized and multiplied in float.`),
    table([{ title: "path", text: i => i.path }, { title: "operator", text: i => i.operator }, { title: "reason", style: "reason", text: i => i.reason || "no known reason" }], data.lost));
}

function sites() {
  if (!data.sites) return;
  const compiled = data.report.compiled, several = v => Array.isArray(v) ? `${number(v[0])} … ${number(v[1])}` : number(v);
  const bits = r => (r.weight_bits.length ? "W" + [...new Set(r.weight_bits)].join("/") : "") + "A" + r.bits;
  const others = r => r.layers.length > 1 ? ` (also ${r.layers.slice(1).map(p => p.split(".").pop()).join(", ")})` : "";
  const columns = [{ title: "site", text: r => r.site + others(r) }, { title: "kind", text: r => r.kind }, { title: "bits", text: bits }];
  if (compiled) columns.push({ title: "grid", text: r => r.grid }, { title: "scale", number: true, text: r => several(r.scale) }, { title: "zero point", number: true, text: r => several(r.zero_point) },
    { title: "integer kernel", text: r => known(r.integer) ? (r.integer ? "yes" : "no") : "?" }, { title: "size", number: true, text: r => size(r.bytes) });
  else columns.push({ title: "weights", number: true, text: r => r.parameters ? r.parameters.toLocaleString("en") : "" });
  columns.push({ title: "rewritten", style: "reason", text: r => r.rewritten.join("; ") });
  siteFigures(compiled);
  section(compiled ? "Quantized sites" : "What would be quantized", note("One row per activation and what reads it, in graph order."), table(columns, data.sites));
}

// Where the weights are, and how far apart the scales: a bar and a mark for each site.
function siteFigures(compiled) {
  if (typeof Plotly === "undefined" || !data.sites.length) return;
  const rows = data.sites, x = rows.map((_, i) => i), names = rows.map(r => plain(r.site)), kinds = [...new Set(rows.map(r => r.kind))];
  const colors = Object.fromEntries(kinds.map((kind, i) => [kind, Object.values(COLORS)[i % 5]]));
  const axis = { title: { text: "site, in graph order" }, range: [-0.7, rows.length - 0.3], showgrid: false, zeroline: false };
  const weight = r => compiled ? r.bytes : r.parameters, place = plot("sizes");
  section(compiled ? "Where the bytes are" : "Where the weights are", note((compiled ? "Bytes of the weights, scales and biases" : "Number of the weights") + " behind each site, by kind."), place);
  draw(place, kinds.map(kind => {
    const own = x.filter(i => rows[i].kind === kind);
    return { type: "bar", width: 0.85, name: plain(kind), x: own, y: own.map(i => weight(rows[i])), marker: { color: colors[kind] },
      customdata: own.map(i => names[i]), hovertemplate: "%{customdata}<br>%{y:,}<extra></extra>" };
  }), { barmode: "overlay", xaxis: axis, yaxis: { title: { text: compiled ? "bytes" : "weights" } }, showlegend: kinds.length > 1 });
  const scaled = x.filter(i => known(rows[i].scale));
  if (!scaled.length) return;
  const ends = v => Array.isArray(v) ? v : [v, v], scales = plot("scales");
  section("Scales", note("The scale of each activation, on a logarithmic axis; where there is one per channel, the smallest and the largest."), scales);
  const marks = (name, side, symbol) => ({ mode: "markers", name, x: scaled, y: scaled.map(i => ends(rows[i].scale)[side]), marker: { color: AFTER, symbol, size: 7 },
    customdata: scaled.map(i => names[i]), hovertemplate: "%{customdata}<br>%{y:.4g}<extra></extra>", showlegend: false });
  draw(scales, [marks("smallest", 0, "circle"), marks("largest", 1, "circle-open")], { xaxis: axis, yaxis: { type: "log", title: { text: "scale" }, exponentformat: "power" } });
}

// ---- overviews over all layers ------------------------------------------------------------------------------------------------------

const layerAxis = () => {
  const title = { text: "layer, in graph order" };
  if (narrow || layers.length > 40) return { title, showgrid: false, zeroline: false, range: [-0.7, layers.length - 0.3] };
  return { tickmode: "array", tickvals: layers.map((_, i) => i), ticktext: layers.map(l => plain(l.label)), tickangle: -50, automargin: true, showgrid: false, zeroline: false,
    range: [-0.7, layers.length - 0.3] };
};
const overviews = [];

function overview(place, traces, layout, height) {
  draw(place, traces, layout, height).then(drawn => {
    drawn.on("plotly_click", event => choose(event.points[0].customdata[0], true));
    overviews.push(drawn);
    mark(drawn);
  });
}

function mark(drawn) {
  const shape = { type: "rect", x0: chosen - 0.5, x1: chosen + 0.5, y0: 0, y1: 1, yref: "paper", fillcolor: "#2563a8", opacity: 0.13, line: { width: 0 }, layer: "below" };
  Plotly.relayout(drawn, { shapes: [shape] });
}

function sqnr() {
  const measured = layers.map((l, i) => [l, i]).filter(([l]) => known(l.sqnr_db));
  if (!measured.length) return;
  const place = plot("sqnr"), kinds = [...new Set(measured.map(([l]) => kindOf(l)))];
  const weakest = [...measured].sort((a, b) => a[0].sqnr_db - b[0].sqnr_db).slice(0, 8);
  section("Which layers lose most",
    note("Signal-to-quantization-noise ratio of each layer's output against the float model, with everything before it quantized too. Lower is worse; 6 dB are about one bit. " +
      "Choose a layer by clicking its bar."), place,
    element("h3", {}, "Lowest"), table([{ title: "layer", text: r => r[0].label }, { title: "kind", text: r => kindText(r[0]) }, { title: "SQNR", number: true, text: r => decibel(r[0].sqnr_db) }],
      weakest, r => choose(r[1], true)));
  overview(place, kinds.map(kind => {
    const own = measured.filter(([l]) => kindOf(l) === kind);
    return { type: "bar", width: 0.85, name: kindText(own[0][0]), x: own.map(([, i]) => i), y: own.map(([l]) => l.sqnr_db), customdata: own.map(([l, i]) => [i, plain(l.label)]),
      marker: { color: COLORS[kind] || "#778" }, hovertemplate: "%{customdata[1]}<br>%{y:.2f} dB<extra></extra>" };
  }), { barmode: "overlay", xaxis: layerAxis(), yaxis: { title: { text: "SQNR (dB)" } }, showlegend: kinds.length > 1 }, narrow ? 320 : layers.length > 40 ? 340 : 430);
}

// Relative errors where they were collected, else the report's sums of squares.
function errorsOf(layer) {
  const found = statistics.weights[layer.node], stored = layer.weight && layer.weight.output_error;
  if (found && known(found.nearest.output)) return { nearest: found.nearest.output, chosen: found.chosen.output, relative: true };
  return stored ? { nearest: stored.round_to_nearest, chosen: stored.chosen, relative: false } : null;
}

function weights() {
  const rows = layers.map((layer, index) => ({ layer, index, error: errorsOf(layer) })).filter(r => r.error && r.error.nearest > 0);
  if (!rows.length) return;
  const relative = rows.every(r => r.error.relative), place = plot("weights");
  const ratio = r => r.error.chosen / r.error.nearest;
  const mean = Math.exp(rows.reduce((sum, r) => sum + Math.log(Math.max(1e-12, ratio(r))), 0) / rows.length);
  section("Rounding of weights", note(`Squared error of a layer's output that comes from its weights alone, on the calibration data${relative ? ", relative to the output" : ""}: ` +
    `rounded to nearest (RTN), and as chosen (GPTQ). On the geometric mean over layers the error chosen is ${percent(mean)} of RTN's.`), place);
  const custom = rows.map(r => [r.index, plain(r.layer.label), percent(ratio(r))]), x = rows.map(r => r.index);
  const shown = v => relative ? 100 * v : v;
  const joints = { x: x.flatMap(i => [i, i, null]), y: rows.flatMap(r => [shown(r.error.nearest), shown(r.error.chosen), null]), mode: "lines", line: { color: "#c3ccd6", width: 2 },
    hoverinfo: "skip", showlegend: false };
  const dots = (name, key, marker) => ({ name, x, y: rows.map(r => shown(r.error[key])), customdata: custom, mode: "markers", marker,
    hovertemplate: `%{customdata[1]}<br>${name} %{y:.3g}${relative ? " %" : ""}<br>GPTQ / RTN: %{customdata[2]}<extra></extra>` });
  overview(place, [joints, dots("RTN", "nearest", { color: BEFORE, size: 8, symbol: "circle-open", line: { width: 2 } }), dots("GPTQ", "chosen", { color: AFTER, size: 8 })],
    { xaxis: layerAxis(), yaxis: { type: "log", title: { text: relative ? "output error (%)" : "output error (sum of squares)" }, exponentformat: "power", dtick: 1 } },
    narrow ? 320 : layers.length > 40 ? 340 : 430);
}

// ---- one layer ----------------------------------------------------------------------------------------------------------------------

let chosen = 0;
const picker = element("select", { id: "layer", ariaLabel: "layer" }), detail = element("div", { id: "detail" });
let layerSection = null;

function layerView() {
  if (!layers.length) return;
  picker.append(...layers.map((l, i) => element("option", { value: i }, l.label + "  (" + kindText(l) + (known(l.sqnr_db) ? ", " + decibel(l.sqnr_db) : "") + ")")));
  picker.addEventListener("change", () => choose(Number(picker.value)));
  const step = (text, by) => { const b = element("button", { type: "button", ariaLabel: by < 0 ? "previous layer" : "next layer" }, text); b.addEventListener("click", () => choose(chosen + by)); return b; };
  layerSection = section("One layer", element("div", { className: "pick" }, step("‹", -1), picker, step("›", 1)), detail);
}

function choose(index, scroll) {
  if (!(index >= 0 && index < layers.length)) return;
  chosen = index;
  picker.value = String(index);
  history.replaceState(null, "", "#layer=" + index);
  overviews.forEach(mark);
  for (const old of detail.querySelectorAll(".plot")) Plotly.purge(old);
  detail.replaceChildren();
  showLayer(layers[index]);
  if (scroll) layerSection.scrollIntoView({ behavior: "smooth", block: "start" });
}

function showLayer(layer) {
  const facts = element("dl", {});
  const fact = (name, text) => { if (text) facts.append(element("dt", {}, name), element("dd", {}, text)); };
  const range = v => Array.isArray(v) ? `${number(v[0])} … ${number(v[1])}` : number(v);
  fact("operator", `${layer.operator}, ${kindText(layer)}`);
  fact("SQNR", known(layer.sqnr_db) ? decibel(layer.sqnr_db) : "");
  const inputs = layer.inputs || [], w = layer.weight;
  for (const input of inputs) fact(inputs.length > 1 ? "input " + input.name.split("/").pop() : "input", input.quantizer === "none" ? "float" :
    [`${input.bits} bits`, input.quantizer, known(input.scale) && "scale " + range(input.scale), known(input.zero_point) && "zero point " + range(input.zero_point),
      known(input.codes_per_octave) && `${input.codes_per_octave} codes per octave`].filter(Boolean).join(", "));
  if (w) fact("weight", [`${w.bits} bits`, w.granularity, w.scale && `scales ${number(w.scale.min)} … ${number(w.scale.max)}`, (statistics.weights[layer.node] || w).method].filter(Boolean).join(", "));
  fact("rewritten", (layer.rewritten || []).join("; "));
  detail.append(facts);
  let drawn = false;
  for (const input of inputs) {
    let found = statistics.activations[input.name];
    if (found && found.same_as) found = statistics.activations[found.same_as];
    if (!found) continue;
    ({ channels: showChannels, probabilities: showProbabilities, values: showValues })[found.kind](found, input);
    drawn = true;
  }
  if (statistics.weights[layer.node]) { showRounding(statistics.weights[layer.node]); drawn = true; }
  if (!drawn) detail.append(note("No statistics were collected for this layer."));
}

function boxes(found, side, color, name) {
  const labels = found.channels.map(String), q = found[side].quantiles, column = k => q.map(row => row[k]);
  return { type: "box", name, x: labels, lowerfence: column(0), q1: column(1), median: column(2), q3: column(3), upperfence: column(4), boxpoints: false, whiskerwidth: 0.5,
    fillcolor: color + "55", line: { color, width: 1 }, showlegend: false };
}
const line = (axis, at, color, dash) => ({ type: "line", [axis + "0"]: at, [axis + "1"]: at, [(axis === "x" ? "y" : "x") + "0"]: 0, [(axis === "x" ? "y" : "x") + "1"]: 1,
  [(axis === "x" ? "yref" : "xref")]: "paper", line: { color, width: 1.5, dash: dash || "dash" } });
const channelAxis = { type: "category", title: { text: "channel" }, nticks: narrow ? 8 : 16, tickangle: 0, showgrid: false };

function showChannels(found) {
  const count = found.channels.length, before = found.before, after = found.after;
  const which = count < found.total ? `${count} of ${found.total} channels are drawn: those at even ranks of their range, with the narrowest and the widest. ` : `All ${found.total} channels. `;
  detail.append(element("h3", {}, "Channels of the norm's output"), note(which + "Boxes span the quartiles, whiskers the extremes" +
    "; red marks are the clipping bounds" + (after ? ", one pair per channel before reparameterization and one pair for all after it." : ".") + " Click a box for its histogram."));
  const left = plot("before"), right = plot("after"), span = s => known(s) ? `: ranges ${number(s, 3)}× apart` : "";
  const column = (place, text) => element("div", {}, element("h3", {}, text), place);
  const pair = element("div", { className: after ? "two" : "" }, column(left, (after ? "Before" : "As quantized") + span(before.span)));
  if (after) pair.append(column(right, "After" + span(after.span)));
  detail.append(pair);
  const labels = found.channels.map(String);
  const marks = { x: labels.concat(labels), y: before.low.concat(before.up), mode: "markers", name: "clipping bounds", hovertemplate: "channel %{x}<br>bound %{y:.4g}<extra></extra>",
    marker: { symbol: "line-ew-open", color: BOUND, size: narrow ? 5 : 7, line: { width: 1.8, color: BOUND } }, showlegend: false };
  draw(left, [boxes(found, "before", BEFORE, "before"), marks], { xaxis: channelAxis, yaxis: { title: { text: "activation" } } }, 330).then(follow);
  if (after) draw(right, [boxes(found, "after", AFTER, "after")], { xaxis: channelAxis, yaxis: { title: { text: "activation" } },
    shapes: [line("y", after.low, BOUND), line("y", after.up, BOUND)] }, 330).then(follow);

  const picked = element("select", { ariaLabel: "channel" }, ...found.channels.map((c, i) => element("option", { value: i }, String(c))));
  const logarithmic = element("input", { type: "checkbox", checked: true }), place = plot("channel");
  detail.append(element("h3", {}, "Clipping bounds of one channel"), note("Values beyond a bound are moved to it: a finer step for the many, an error for the few."),
    element("div", { className: "choices" }, element("label", {}, "channel ", picked), element("label", {}, logarithmic, " logarithmic counts")), place);
  const show = () => drawHistogram(place, found.histograms[picked.value], before.low[picked.value], before.up[picked.value], logarithmic.checked);
  picked.addEventListener("change", show);
  logarithmic.addEventListener("change", show);
  const width = before.quantiles.map(q => q[4] - q[0]);
  picked.value = String(width.indexOf(Math.max(...width)));
  show();
  function follow(drawn) {
    drawn.on("plotly_click", event => { picked.value = String(found.channels.indexOf(Number(event.points[0].x))); show(); });
  }
}

function bins(histogram) {
  const n = histogram.counts.length, width = (histogram.high - histogram.low) / n;
  return { x: histogram.counts.map((_, i) => histogram.low + (i + 0.5) * width), y: histogram.counts, width };
}

function drawHistogram(place, histogram, low, up, logarithmic) {
  const b = bins(histogram), reach = Math.max(b.width, 0.04 * (Math.max(histogram.high, up) - Math.min(histogram.low, low)));
  const clipped = side => ({ x0: side < 0 ? histogram.low : up, x1: side < 0 ? low : histogram.high });
  const outside = [-1, 1].map(clipped).filter(r => r.x1 > r.x0).map(r => ({ type: "rect", ...r, y0: 0, y1: 1, yref: "paper", fillcolor: BOUND, opacity: 0.07, line: { width: 0 } }));
  const label = (at, anchor) => ({ x: at, y: 1, yref: "paper", yanchor: "bottom", xanchor: anchor, text: number(at), showarrow: false, font: { color: BOUND, size: 12 } });
  return draw(place, [{ type: "bar", x: b.x, y: b.y, width: b.width * 0.94, marker: { color: BARS }, hovertemplate: "%{x:.4g}: %{y}<extra></extra>" }], {
    margin: { l: 56, r: 14, t: 26, b: 46 }, xaxis: { title: { text: "activation" }, range: [Math.min(histogram.low, low) - reach, Math.max(histogram.high, up) + reach] },
    yaxis: { title: { text: "count" }, ...(logarithmic ? { type: "log", dtick: 1, exponentformat: "power" } : {}) },
    shapes: [...outside, line("x", low, BOUND), line("x", up, BOUND)], annotations: [label(low, "center"), label(up, "center")],
  }, 290);
}

function showValues(found, input) {
  const place = plot("values-" + input.name);
  detail.append(element("h3", {}, `Values of ${input.name}`), note("One scale for the whole tensor; red lines are the clipping bounds. Counts are logarithmic."), place);
  drawHistogram(place, found.histogram, found.low, found.up, true);
}

function showProbabilities(found, input) {
  const levels = found.levels, n = levels.length;
  const aside = [found.zeros > 0 && `${percent(found.zeros)} of the values are exactly zero and stay so`, found.below > 0 && `${percent(found.below)} lie below what is drawn`].filter(Boolean).join("; ");
  const left = plot("logarithms"), right = plot("probabilities");
  detail.append(element("h3", {}, `Softmax values of ${input.name}`), note(`Red lines are the ${n} positive levels of the ${found.bits}-bit quantizer, ${found.steps} per octave; ` +
    `one more code is zero. They lie evenly on the logarithm.${aside ? " Of the sample " + aside + "." : ""}`));
  detail.append(element("div", { className: "two" }, element("div", {}, element("h3", {}, "Logarithmic axis"), left), element("div", {}, element("h3", {}, "Linear axis"), right)));
  // all levels as one trace on an axis of its own: full height where they are few, a rug where they are many
  const height = n <= 40 ? 1 : 0.12;
  const grid = at => ({ x: at.flatMap(v => [v, v, null]), y: at.flatMap(() => [0, height, null]), yaxis: "y2", mode: "lines", line: { color: BOUND, width: n <= 40 ? 1.2 : 0.8 },
    opacity: n <= 40 ? 0.75 : 0.6, hoverinfo: "skip", showlegend: false });
  const over = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
  const counts = { title: { text: "count" }, exponentformat: "power" };
  if (found.logarithms) {
    const b = bins(found.logarithms), at = levels.map(Math.log2);
    const first = Math.min(found.logarithms.low, at[n - 1]) - 0.5, last = Math.max(found.logarithms.high, at[0]) + 0.5, every = Math.max(1, Math.round((last - first) / (narrow ? 6 : 9)));
    const ticks = []; for (let k = Math.floor(last); k >= first; k -= every) ticks.push(k);
    draw(left, [{ type: "bar", x: b.x, y: b.y, width: b.width * 0.94, marker: { color: BARS }, hovertemplate: "2<sup>%{x:.2f}</sup>: %{y}<extra></extra>", showlegend: false }, grid(at)],
      { xaxis: { title: { text: "Softmax value" }, range: [first, last], tickvals: ticks, ticktext: ticks.map(k => k === 0 ? "1" : `2<sup>${String(k).replace("-", "−")}</sup>`) }, yaxis: counts, yaxis2: over });
  } else left.append(note("All values of the sample are zero or below the smallest level."));
  const b = bins(found.values);
  draw(right, [{ type: "bar", x: b.x, y: b.y, width: b.width * 0.94, marker: { color: BARS }, hovertemplate: "%{x:.4g}: %{y}<extra></extra>", showlegend: false }, grid(levels)],
    { xaxis: { title: { text: "Softmax value" }, range: [-0.01 * found.values.high, Math.max(found.values.high, levels[0]) * 1.02] }, yaxis: { ...counts, type: "log", dtick: 1 }, yaxis2: over });
}

function showRounding(found) {
  const { nearest, chosen: best } = found, rows = nearest.channels;
  const text = `Of the weight's own energy, rounding to nearest loses ${percent(nearest.weight)} and the codes chosen ${percent(best.weight)}` +
    (known(nearest.output) ? `; of the output's, ${percent(nearest.output)} and ${percent(best.output)}.` : ".");
  detail.append(element("h3", {}, "Rounding of the weight"), note(text + (known(nearest.output) && best.weight > nearest.weight ? " GPTQ moves weights further to move the output less." : "")));
  if (!rows) return;
  const place = plot("rounding"), x = rows.map((_, i) => i + 1);
  detail.append(note((rows.length < found.total ? `${rows.length} of ${found.total} output channels are drawn, at even ranks of RTN's error.` : `All ${found.total} output channels, by RTN's error.`)), place);
  const trace = (name, entry, color) => ({ name, x, y: entry.channels.map(v => 100 * v), mode: "lines+markers", line: { color, width: 1.5 }, marker: { size: 5 }, hovertemplate: name + " %{y:.3g} %<extra></extra>" });
  draw(place, [trace("RTN", nearest, BEFORE), trace(found.method === "GPTQ" ? "GPTQ" : "chosen", best, AFTER)],
    { xaxis: { title: { text: "output channel, by rank" } }, yaxis: { title: { text: "output error (%)" }, type: "log", exponentformat: "power" } }, 290);
}

// ---- all layers, recipe, reproduction -----------------------------------------------------------------------------------------------

function allLayers() {
  if (!layers.length) return;
  const activation = l => (l.inputs || []).map(i => i.quantizer === "none" ? "float" : i.bits).join(" × ");
  const ratio = l => { const e = errorsOf(l); return e && e.nearest > 0 ? percent(e.chosen / e.nearest) : "–"; };
  const columns = [{ title: "layer", text: r => r[0].label }, { title: "kind", text: r => kindText(r[0]) }, { title: "weight bits", number: true, text: r => r[0].weight ? String(r[0].weight.bits) : "–" },
    { title: "activation bits", number: true, text: r => activation(r[0]) || "–" }, { title: "SQNR", number: true, text: r => decibel(r[0].sqnr_db) }, { title: "GPTQ / RTN error", number: true, text: r => ratio(r[0]) }];
  section("All layers", note("In graph order; click a row to see its figures."), table(columns, layers.map((l, i) => [l, i]), r => choose(r[1], true)));
}

function saveLink(text, name) {
  return element("a", { href: URL.createObjectURL(new Blob([text], { type: "text/plain" })), download: name }, "Save as " + name);
}

function recipe() {
  if (data.recipe) section("Recipe", note("The effective settings, defaults included. The file feeds back with --recipe."), saveLink(data.recipe, "recipe.yaml"), element("pre", {}, data.recipe));
}

function reproduce() {
  const rows = Object.entries(data.versions || {}), calibration = data.report.calibration;
  if (!data.reproduce && !rows.length) return;
  const made = section("How to reproduce", note(data.report.compiled === false ? "Nothing is compiled yet; this made the page." :
    "The same model, data, recipe, seed and versions give the same file, byte for byte."));
  if (data.reproduce) made.append(element("pre", {}, data.reproduce));
  const facts = element("dl", {});
  if (calibration) facts.append(element("dt", {}, "seed"), element("dd", {}, String(calibration.seed)), element("dt", {}, "calibration"),
    element("dd", {}, `${calibration.origin}: ${calibration.samples} samples, and ${calibration.held_back} held back for the check`));
  if (rows.length) facts.append(element("dt", {}, "versions"), element("dd", {}, rows.map(([k, v]) => `${k} ${v}`).join(", ")));
  made.append(facts);
}

const asked = Number((/^#layer=(\d+)$/.exec(location.hash) || [])[1]);
summary();
sqnr();
layerView();
weights();
allLayers();
sites();
leftAlone();
lost();
recipe();
reproduce();
if (layers.length) choose(asked < layers.length ? asked : Math.max(0, layers.findIndex(l => kindOf(l) === "norm_linear")));
document.body.dataset.drawn = "yes";
