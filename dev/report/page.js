// The page's own script: it draws the panels that Python described when they come into sight, in the colours of the page,
// shows what belongs to the chosen layers, and shades the coloured text. `report` is for the tests and for pictures.py.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const narrow = () => innerWidth < 560;
const touch = matchMedia("(pointer: coarse)").matches;
const state = { layers: new Set(), logSteps: data.logSteps, theme: "" };
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
}

// a choice that outlives a reload; some browsers forbid storage to files
const memory = {
    get(key) { try { return localStorage.getItem("remoe-" + key); } catch { return null; } },
    set(key, value) { try { localStorage.setItem("remoe-" + key, value); } catch { /* not kept, then */ } },
};

// ---------------------------------------------------------------- panels

// a CSS variable as the browser resolves it: plotly knows nothing of light-dark()
function cssColour(name) {
    const probe = make("i", { style: `display:none;color:var(${name})` });
    document.body.append(probe);
    const colour = getComputedStyle(probe).color;
    probe.remove();
    return colour;
}

function layoutOf(panel) {
    const ink = cssColour("--ink"), pale = cssColour("--pale"), grid = cssColour("--grid"), card = cssColour("--card"), rim = cssColour("--line");
    const given = panel.figure.layout;
    const lines = panel.figure.data.filter((trace) => trace.type === "scatter");
    const heat = panel.figure.data.some((trace) => trace.type === "heatmap");
    const unified = panel.steps && lines.length === panel.figure.data.length && lines.length <= 6;
    const layout = {
        autosize: true, showlegend: false, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: pale, size: narrow() ? 10.5 : 11.5, family: getComputedStyle(document.body).fontFamily },
        margin: { l: narrow() ? 46 : 58, r: given.yaxis2 && given.yaxis2.side ? 58 : 14, t: 12, b: 40 },
        hovermode: unified ? "x unified" : "closest", hoversubplots: "axis", hoverdistance: 30,
        hoverlabel: { bgcolor: card, bordercolor: rim, font: { color: ink, size: 12 }, align: "left", namelength: -1 },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: pale, activecolor: ink }, dragmode: touch ? false : "zoom", ...given,
    };
    for (const key of new Set(["xaxis", "yaxis", ...Object.keys(given).filter((k) => /^[xy]axis/.test(k))])) {
        layout[key] = {
            gridcolor: grid, linecolor: rim, zeroline: false, automargin: true, fixedrange: touch, tickfont: { color: pale },
            ...(heat && { showgrid: false }), ...given[key], title: { ...(given[key] || {}).title, standoff: 6 },
        };
    }
    if (panel.steps) {
        layout.xaxis.type = state.logSteps ? "log" : "linear";
        layout.xaxis.exponentformat = "none";
        layout.xaxis.unifiedhovertitle = { text: "step %{x}" };
        if (state.logSteps) layout.xaxis.dtick = "D1";
        if (state.logSteps && (panel.figure.data[0] || {}).type !== "heatmap") layout.xaxis.dtick = 1;
    }
    layout.shapes = (given.shapes || []).map((shape) => ({ ...shape, label: shape.label && { ...shape.label, font: { color: pale, ...shape.label.font } } }));
    return layout;
}

// each call makes new traces: plotly keeps its own marks in those it was given
function tracesOf(panel) {
    const closest = panel.steps && layoutOf(panel).hovermode === "closest";
    return panel.figure.data.map((trace) => ({
        ...trace,
        visible: shown(panel, trace),
        hovertemplate: closest && trace.type === "scatter" && trace.hovertemplate ? "step %{x}<br>" + trace.hovertemplate : trace.hovertemplate,
        ...(trace.colorbar && { colorbar: { ...trace.colorbar, outlinewidth: 0, tickfont: { color: cssColour("--pale") } } }),
    }));
}

function shown(panel, trace) {
    const layer = trace.meta && trace.meta.layer;
    return !panel.off.has(trace.name) && (layer === undefined || layer === null || state.layers.has(layer));
}

function draw(panel) {
    panel.drawn = true;
    return Plotly.react(panel.plot, tracesOf(panel), layoutOf(panel), {
        responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
        modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
        toImageButtonOptions: { format: "svg" },
    });
}

function redraw(which = () => true) {
    for (const panel of data.panels) if (panel.drawn && which(panel)) draw(panel);
}

function watchPanels() {
    const watcher = new IntersectionObserver((entries) => {
        for (const { isIntersecting, target } of entries) {
            const panel = data.panels[+target.id.slice(5)];
            if (isIntersecting && !panel.drawn) draw(panel);
        }
    }, { rootMargin: "500px" });
    for (const panel of data.panels) watcher.observe(panel.plot);
}

function drawAll() {
    return Promise.all(data.panels.filter((panel) => !panel.plot.closest("[hidden]")).map((panel) => draw(panel)));
}

// one legend for all panels of a card: the same name has the same colour in each of them
function makeLegend(card) {
    const panels = $$(".plot", card).map((plot) => data.panels[+plot.id.slice(5)]);
    const entries = new Map();
    for (const panel of panels) {
        for (const trace of panel.figure.data) {
            const bar = trace.type === "bar", colour = bar || trace.mode === "markers" ? (trace.marker || {}).color : (trace.line || {}).color;
            if (trace.showlegend !== false && colour && trace.name && !entries.has(trace.name))
                entries.set(trace.name, { colour, bar: bar || trace.mode === "markers", dash: (trace.line || {}).dash, layer: (trace.meta || {}).layer });
        }
    }
    const legend = $(".legend", card);
    if (!legend || entries.size < 2) return;
    for (const [name, entry] of entries) {
        const style = entry.bar ? `background:${entry.colour}` : `border-color:${entry.colour};border-top-style:${entry.dash ? "dotted" : "solid"}`;
        const button = make("button", { type: "button", title: "show or hide", innerHTML: `<i class="${entry.bar ? "block" : ""}" style="${style}"></i><span>${name}</span>` });
        if (entry.layer !== undefined && entry.layer !== null) button.dataset.layer = entry.layer;
        button.onclick = () => {
            const off = button.classList.toggle("off");
            for (const panel of panels) panel.off[off ? "add" : "delete"](name);
            redraw((panel) => panels.includes(panel));
        };
        legend.append(button);
    }
}

// ---------------------------------------------------------------- choices

function chooseLayers(layers) {
    state.layers = new Set(layers);
    memory.set("layers", [...state.layers].join());
    for (const button of $$("#choose-layers button[data-n]")) button.classList.toggle("on", state.layers.has(+button.dataset.n));
    for (const element of $$("[data-layer]")) element.hidden = !state.layers.has(+element.dataset.layer);
    redraw((panel) => panel.figure.data.some((trace) => trace.meta && typeof trace.meta.layer === "number"));
    drawText();
}

function makeLayerChoice() {
    const n = data.layers, all = [...Array(n).keys()], few = [...new Set([0, (n - 1) >> 1, n - 1])];
    const chips = $("#choose-layers .chips");
    if (n > 4) {
        chips.append(make("button", { type: "button", className: "preset", textContent: "all", onclick: () => chooseLayers(all) }));
        chips.append(make("button", { type: "button", className: "preset", textContent: few.join(" "), title: "first, middle, last", onclick: () => chooseLayers(few) }));
    }
    for (const l of all) {
        const button = make("button", { type: "button", textContent: l, title: `layer ${l}` });
        button.dataset.n = l;
        button.onclick = () => {
            const layers = new Set(state.layers);
            if (!layers.delete(l)) layers.add(l);
            if (layers.size) chooseLayers([...layers].sort((a, b) => a - b));
        };
        chips.append(button);
    }
    $("#choose-layers").hidden = n < 2;
    const kept = (memory.get("layers") || "").split(",").filter((x) => x !== "").map(Number).filter((l) => l < n);
    chooseLayers(kept.length && data.refresh ? kept : n <= 4 ? all : few);
}

function chooseSteps(log) {
    state.logSteps = log;
    for (const button of $$("#choose-steps button")) button.classList.toggle("on", (button.dataset.log === "1") === log);
    redraw((panel) => panel.steps);
}

function chooseTheme(theme) {
    state.theme = theme;
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    redraw();
    drawText();
}

function isDark() {
    return state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// ---------------------------------------------------------------- the coloured text

const view = { source: 0, shade: "count", layer: 0, pinned: null };
const shades = { count: "number of experts", expert: "which experts", loss: "loss" };

function expertColour(e, experts) {
    return experts <= data.colours.length ? data.colours[e] : `hsl(${(e * 137.508) % 360} 62% ${50 + 8 * (e % 3)}%)`;
}

function withAlpha(colour, alpha) {
    return `color-mix(in srgb, ${colour} ${(100 * alpha).toFixed(1)}%, transparent)`;
}

function quantile(values, q) {
    const sorted = values.filter((v) => v !== null && isFinite(v)).sort((a, b) => a - b);
    return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : 0;
}

// mean active experts of each token over the chosen layers
function counts(source) {
    const layers = [...state.layers].filter((l) => l < source.on.length);
    return source.ids.map((_, t) => layers.reduce((sum, l) => sum + source.on[l][t].length / 2, 0) / Math.max(1, layers.length));
}

function makeText() {
    const root = $("#coloured");
    if (!root) return;
    const names = [...new Set(data.text.flatMap((text) => text.sources.map((source) => source.name)))];
    const source = make("select", { onchange: () => { view.source = source.value; view.pinned = null; drawText(); } }, ...names.map((name) => make("option", { value: name, textContent: name })));
    view.source = names[0];
    const shadeChips = make("span", { className: "chips", id: "shade" });
    for (const [key, name] of Object.entries(shades)) {
        const button = make("button", { type: "button", textContent: name, onclick: () => { view.shade = key; drawText(); } });
        button.dataset.shade = key;
        shadeChips.append(button);
    }
    const layers = Math.max(...data.text.map((text) => text.layers));
    const layer = make("select", { id: "text-layer", onchange: () => { view.layer = +layer.value; drawText(); } }, ...[...Array(layers).keys()].map((l) => make("option", { value: l, textContent: `of layer ${l}` })));
    view.layer = (layers - 1) >> 1;
    layer.value = view.layer;
    const control = (name, ...elements) => make("span", { className: "control" }, make("label", { textContent: name }), ...elements);
    root.append(make("div", { className: "text-controls" }, ...(names.length > 1 ? [control("Text", source)] : []), control("Shade", shadeChips, layer)), make("div", { className: "readers" }));
    addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1, Escape: 0 }[event.key];
        if (step === undefined || !view.pinned) return;
        event.preventDefault();
        const next = step ? $(`[data-t="${+view.pinned.dataset.t + step}"]`, view.pinned.parentNode) : null;
        pin(next || (step ? view.pinned : null));
    });
    document.addEventListener("click", (event) => { if (!event.target.closest(".tokens, #tip")) pin(null); });
    addEventListener("scroll", () => { if (!narrow()) pin(null); }, { passive: true });
}

function drawText() {
    const root = $("#coloured .readers");
    if (!root) return;
    for (const button of $$("#shade button")) button.classList.toggle("on", button.dataset.shade === view.shade);
    $("#text-layer").hidden = view.shade !== "expert";
    const scrolled = $$(".tokens", root).map((element) => element.scrollTop);
    pin(null);
    root.replaceChildren();
    for (const [i, text] of data.text.entries()) {
        const source = text.sources.find((s) => s.name === view.source);
        if (!source) continue;
        const tokens = make("div", { className: "tokens" });
        const scale = make("div", { className: "scale" });
        shadeTokens(text, source, tokens, scale);
        const more = text.cut && source.ids.length >= text.most ? `, the first ${source.ids.length} tokens` : "";
        root.append(make("div", { className: "reader" }, make("h4", { textContent: `${text.name}${text.name.includes(text.router) ? "" : ` (${text.router})`}${more}` }), scale, tokens));
        tokens.onpointerover = (event) => { if (event.pointerType === "mouse" && !view.pinned) point(event.target.closest("[data-t]"), i); };
        tokens.onpointerleave = () => { if (!view.pinned) hideTip(); };
        tokens.onclick = (event) => { const token = event.target.closest("[data-t]"); pin(token === view.pinned ? null : token, i); };
    }
    $$(".tokens", root).forEach((element, i) => { element.scrollTop = scrolled[i] || 0; });
}

function shadeTokens(text, source, tokens, scale) {
    const number = view.shade === "loss" ? source.loss : counts(source);
    const colour = view.shade === "loss" ? "#e8762d" : "#3d82e0";
    const high = Math.max(view.shade === "loss" ? quantile(number, 0.98) : Math.max(...number), 1e-6);
    const low = view.shade === "loss" ? 0 : Math.min(...number);
    const strength = (x) => 0.06 + 0.74 * Math.max(0, Math.min(1, (x - low) / Math.max(high - low, 1e-9)));
    const on = source.on[Math.min(view.layer, source.on.length - 1)];
    for (let t = 0; t < source.ids.length; t++) {
        const token = make("span");
        token.dataset.t = t;
        const piece = source.text[t];
        if (piece.includes("\n")) token.append(...piece.split(/(\n)/).filter(Boolean).map((part) => part === "\n" ? make("em", { textContent: "⏎\n" }) : part));
        else token.textContent = piece;
        if (view.shade === "expert") {
            const experts = on[t].filter((_, i) => i % 2 === 0), bands = experts.map((e) => withAlpha(expertColour(e, text.experts), 0.55));
            if (bands.length === 1) token.style.background = bands[0];
            else if (bands.length) token.style.background = `linear-gradient(${bands.map((c, i) => `${c} ${(100 * i) / bands.length}% ${(100 * (i + 1)) / bands.length}%`).join(",")})`;
            else token.className = "none";
        } else if (number[t] !== null && (view.shade === "loss" || number[t] > 0)) {
            token.style.background = withAlpha(colour, strength(number[t]));
        } else token.className = "none";
        tokens.append(token);
    }
    if (view.shade === "expert") {
        if (text.experts <= 32) for (let e = 0; e < text.experts; e++) scale.append(make("b", {}, make("i", { style: `background:${withAlpha(expertColour(e, text.experts), 0.7)}` }), `${e}`));
        scale.append("stripes: several; underlined: none");
    } else {
        scale.append(`${low.toFixed(2)}`, make("span", { className: "ramp", style: `background:linear-gradient(90deg, ${withAlpha(colour, 0.06)}, ${withAlpha(colour, 0.8)})` }), `${high.toFixed(2)} ${view.shade === "loss" ? "nats" : "experts per layer"}`);
    }
}

function pin(token, i) {
    for (const element of $$(".tokens .here")) element.classList.remove("here");
    if (!token) { view.pinned = null; hideTip(); return; }
    view.pinned = null;
    point(token, i === undefined ? $$("#coloured .tokens").indexOf(token.parentNode) : i);
    view.pinned = token;
    $("#tip").classList.add("fixed");
}

function hideTip() {
    for (const element of $$(".tokens .here")) element.classList.remove("here");
    $("#tip").hidden = true;
}

// the token's gates of every run that has the same token at the same place
function point(token, i) {
    hideTip();
    if (!token) return;
    const t = +token.dataset.t, tip = $("#tip"), readers = data.text.filter((text) => text.sources.some((s) => s.name === view.source));
    const of = (text) => text.sources.find((s) => s.name === view.source);
    const here = readers[Math.min(i, readers.length - 1)], id = of(here).ids[t];
    tip.replaceChildren(make("h5", { textContent: JSON.stringify(of(here).text[t]).slice(1, -1).replace(/\\"/g, '"') }), make("p", { textContent: `token ${t}, id ${id}` }));
    for (const [r, text] of readers.entries()) {
        const source = of(text);
        if (text !== here && source.ids[t] !== id) continue;
        $$("#coloured .tokens")[r].children[t].classList.add("here");
        const loss = source.loss[t] === null ? "no loss: nothing before it" : `loss ${source.loss[t].toFixed(3)}`;
        tip.append(make("h6", { textContent: `${text.name}: ${loss}` }), gateGrid(text, source, t));
    }
    tip.classList.remove("fixed");
    tip.hidden = false;
    const box = token.getBoundingClientRect(), size = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 12))}px`;
    tip.style.top = `${box.bottom + size.height + 12 < innerHeight ? box.bottom + 6 : Math.max(8, box.top - size.height - 6)}px`;
}

function gateGrid(text, source, t) {
    const gateText = (gate) => gate === null ? "NaN" : gate.toPrecision(2).replace(/^0\./, ".");
    if (text.experts > 12) {
        const rows = source.on.map((layer, l) => {
            const pairs = [];
            for (let i = 0; i < layer[t].length; i += 2) pairs.push(`${layer[t][i]} (${gateText(layer[t][i + 1])})`);
            return make("div", { textContent: `layer ${l}: ${pairs.join(", ") || "none"}` });
        });
        return make("div", {}, ...rows);
    }
    const most = Math.max(1e-9, ...source.on.flatMap((layer) => layer[t].filter((_, i) => i % 2)));
    const head = make("tr", {}, make("th", { textContent: "layer" }), ...[...Array(text.experts).keys()].map((e) => make("th", { textContent: e })));
    const rows = source.on.map((layer, l) => {
        const gates = new Map();
        for (let i = 0; i < layer[t].length; i += 2) gates.set(layer[t][i], layer[t][i + 1]);
        return make("tr", {}, make("th", { textContent: l }), ...[...Array(text.experts).keys()].map((e) => {
            const cell = make("i", { textContent: gates.has(e) ? gateText(gates.get(e)) : "·" });
            if (gates.has(e)) cell.style = `color:var(--ink);background:${withAlpha(expertColour(e, text.experts), 0.25 + (0.55 * (gates.get(e) || 0)) / most)}`;
            return make("td", {}, cell);
        }));
    });
    return make("table", {}, head, ...rows);
}

// ---------------------------------------------------------------- start

async function loadPlotly() {
    const packed = Uint8Array.from(atob($("#plotly").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    document.head.append(make("script", { textContent: await new Response(stream).text() }));
}

async function start() {
    data.panels.forEach((panel, i) => { panel.plot = $(`#plot-${i}`); panel.off = new Set(); });
    chooseTheme(memory.get("theme") || "");
    makeText();
    makeLayerChoice();
    chooseSteps(state.logSteps);
    for (const button of $$("#choose-steps button")) button.onclick = () => chooseSteps(button.dataset.log === "1");
    $$(".card").forEach(makeLegend);
    for (const element of $$(".legend [data-layer]")) element.hidden = !state.layers.has(+element.dataset.layer);
    $("#theme").onclick = () => { chooseTheme(isDark() ? "light" : "dark"); memory.set("theme", state.theme); };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
    if (data.refresh) setInterval(() => { if (!view.pinned && document.visibilityState === "visible") location.reload(); }, 1000 * data.refresh);
    try {
        await loadPlotly();
    } catch (error) {
        $("#trouble").textContent = `The figures cannot be drawn (${error.message}): a browser of 2023 or later unpacks them.`;
        $("#trouble").hidden = false;
        return;
    }
    watchPanels();
    addEventListener("beforeprint", () => drawAll());
    report.ready = true;
}

// both shades of the first run side by side: the README's picture
function pictureOfText(name, layer) {
    const [text] = data.text, source = text.sources.find((s) => s.name === name) || text.sources[0];
    const pairs = source.on.map((tokens) => tokens.reduce((sum, token) => sum + token.length, 0));
    view.source = source.name;
    view.layer = layer === null ? pairs.indexOf(Math.max(...pairs)) : layer;
    const readers = ["count", "expert"].map((shade) => {
        view.shade = shade;
        drawText();
        const reader = $("#coloured .reader");
        $("h4", reader).textContent = shade === "count" ? `experts per layer, mean of ${text.layers} layers` : `experts of layer ${view.layer}`;
        return reader;
    });
    $("#coloured .readers").replaceChildren(...readers);
    $(".text-controls").hidden = true;
}

const report = { ready: false, data, state, drawAll, chooseLayers, chooseSteps, chooseTheme, pictureOfText };
window.report = report;
start();
