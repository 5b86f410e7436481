// The page's own script: it draws the panels that Python described when they come into sight, in the page's
// colours, and shows what belongs to the chosen layers. text.js is the coloured text.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const narrow = () => innerWidth < 560;
const touch = matchMedia("(pointer: coarse)").matches;
const state = { layers: new Set(), logSteps: data.logSteps, theme: "" };

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const upTo = (n) => [...Array(n).keys()];

function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
}

function makeButton(text, onclick, more = {}) {
    return make("button", { type: "button", textContent: text, onclick, ...more });
}

// a choice that outlives a reload; some browsers forbid storage to files
const memory = {
    get(key) {
        try {
            return localStorage.getItem("remoe-" + key) || "";
        } catch {
            return "";
        }
    },
    set(key, value) {
        try {
            localStorage.setItem("remoe-" + key, value);
        } catch {
            // not kept, then
        }
    },
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

function pageColours() {
    const names = ["ink", "pale", "grid", "card", "line"];
    return Object.fromEntries(names.map((name) => [name, cssColour("--" + name)]));
}

// few curves over steps are told together, at the step that is pointed at
function isUnified(panel) {
    const traces = panel.figure.data;
    return panel.steps && traces.length <= 6 && traces.every((trace) => trace.type === "scatter");
}

function axisLayout(panel, key, colours) {
    const given = panel.figure.layout[key] || {};
    const heat = panel.figure.data.some((trace) => trace.type === "heatmap");
    return {
        gridcolor: colours.grid,
        linecolor: colours.line,
        spikecolor: colours.pale,
        spikethickness: 1,
        tickfont: { color: colours.pale },
        zeroline: false,
        automargin: true,
        fixedrange: touch,
        showgrid: !heat,
        ...given,
        title: { ...given.title, standoff: 6 },
    };
}

function layoutOf(panel) {
    const colours = pageColours(), given = panel.figure.layout;
    const family = getComputedStyle(document.body).fontFamily;
    const layout = {
        autosize: true,
        showlegend: false,
        paper_bgcolor: colours.card,
        plot_bgcolor: colours.card,
        font: { color: colours.pale, size: narrow() ? 10.5 : 11.5, family },
        margin: { l: narrow() ? 46 : 58, r: given.yaxis2 && given.yaxis2.side ? 58 : 14, t: 12, b: 40 },
        hovermode: isUnified(panel) ? "x unified" : "closest",
        hoversubplots: "axis",
        hoverdistance: 30,
        hoverlabel: {
            bgcolor: colours.card,
            bordercolor: colours.line,
            font: { color: colours.ink, size: 12 },
            align: "left",
            namelength: -1,
        },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.pale, activecolor: colours.ink },
        dragmode: touch ? false : "zoom",
        ...given,
    };
    const axes = Object.keys(given).filter((key) => /^[xy]axis/.test(key));
    for (const key of new Set(["xaxis", "yaxis", ...axes])) layout[key] = axisLayout(panel, key, colours);
    if (panel.steps) {
        Object.assign(layout.xaxis, { type: state.logSteps ? "log" : "linear", exponentformat: "none" });
        if (state.logSteps) layout.xaxis.dtick = 1;
        layout.xaxis.unifiedhovertitle = { text: "step %{x}" };
    }
    const pale = (label) => label && { ...label, font: { color: colours.pale, ...label.font } };
    layout.shapes = (given.shapes || []).map((shape) => ({ ...shape, label: pale(shape.label) }));
    return layout;
}

// each call makes new traces: plotly keeps its own marks in those it was given
function tracesOf(panel) {
    const tellStep = panel.steps && !isUnified(panel);
    return panel.figure.data.map((given) => {
        const trace = { ...given, visible: isShown(panel, given) };
        if (tellStep && trace.type === "scatter" && trace.hovertemplate)
            trace.hovertemplate = "step %{x}<br>" + trace.hovertemplate;
        if (trace.colorbar)
            trace.colorbar = { ...trace.colorbar, outlinewidth: 0, tickfont: { color: cssColour("--pale") } };
        return trace;
    });
}

function layerOf(trace) {
    return trace.meta && typeof trace.meta.layer === "number" ? trace.meta.layer : null;
}

function isShown(panel, trace) {
    const layer = layerOf(trace);
    return !panel.off.has(trace.name) && (layer === null || state.layers.has(layer));
}

function draw(panel) {
    panel.drawn = true;
    return Plotly.react(panel.plot, tracesOf(panel), layoutOf(panel), {
        responsive: true,
        displaylogo: false,
        displayModeBar: touch ? false : "hover",
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
            const panel = panelOf(target);
            if (isIntersecting && !panel.drawn) draw(panel);
        }
    }, { rootMargin: "500px" });
    for (const panel of data.panels) watcher.observe(panel.plot);
}

function panelOf(plot) {
    return data.panels[+plot.id.replace("plot-", "")];
}

function drawAll() {
    return Promise.all(data.panels.filter((panel) => !panel.plot.closest("[hidden]")).map(draw));
}

// ---------------------------------------------------------------- legends

// what stands for a trace in the legend, or null
function legendEntry(trace) {
    const block = trace.type === "bar" || trace.mode === "markers";
    const { color, dash } = (block ? trace.marker : trace.line) || {};
    if (trace.showlegend === false || !color || !trace.name) return null;
    return { name: trace.name, block, color, dash, layer: layerOf(trace) };
}

function legendButton(entry) {
    const border = `border-color:${entry.color};border-top-style:${entry.dash ? "dotted" : "solid"}`;
    const sign = make("i", { style: entry.block ? `background:${entry.color}` : border });
    if (entry.block) sign.className = "block";
    const button = makeButton("", null, { title: "show or hide" });
    button.append(sign, make("span", { innerHTML: entry.name })); // Python has escaped it
    if (entry.layer !== null) button.dataset.layer = entry.layer;
    return button;
}

// one legend for all panels of a card: the same name has the same colour in each of them
function makeLegend(card) {
    const panels = $$(".plot", card).map(panelOf), entries = new Map();
    for (const entry of panels.flatMap((panel) => panel.figure.data.map(legendEntry)))
        if (entry && !entries.has(entry.name)) entries.set(entry.name, entry);
    if (entries.size < 2) return;
    for (const entry of entries.values()) {
        const button = legendButton(entry);
        button.onclick = () => {
            const off = button.classList.toggle("off");
            for (const panel of panels) panel.off[off ? "add" : "delete"](entry.name);
            redraw((panel) => panels.includes(panel));
        };
        $(".legend", card).append(button);
    }
}

// ---------------------------------------------------------------- choices

function turnOn(buttons, which) {
    for (const button of $$(buttons)) button.classList.toggle("on", which(button));
}

function chooseLayers(layers) {
    state.layers = new Set(layers);
    memory.set("layers", [...state.layers].join());
    turnOn("#choose-layers [data-n]", (button) => state.layers.has(+button.dataset.n));
    for (const element of $$("[data-layer]")) element.hidden = !state.layers.has(+element.dataset.layer);
    redraw((panel) => panel.figure.data.some((trace) => layerOf(trace) !== null));
    drawText();
}

function toggleLayer(l) {
    const layers = new Set(state.layers);
    if (!layers.delete(l)) layers.add(l);
    if (layers.size) chooseLayers([...layers].sort((a, b) => a - b));
}

function makeLayerChoice() {
    const n = data.layers, all = upTo(n), few = [...new Set([0, (n - 1) >> 1, n - 1])];
    const chips = $("#choose-layers .chips");
    if (n > 4) {
        chips.append(makeButton("all", () => chooseLayers(all), { className: "preset" }));
        const title = "first, middle, last";
        chips.append(makeButton(few.join(" "), () => chooseLayers(few), { className: "preset", title }));
    }
    for (const l of all) {
        const button = makeButton(l, () => toggleLayer(l), { title: `layer ${l}` });
        button.dataset.n = l;
        chips.append(button);
    }
    $("#choose-layers").hidden = n < 2;
    const kept = memory.get("layers").split(",").filter(Boolean).map(Number).filter((l) => l < n);
    chooseLayers(data.refresh && kept.length ? kept : n <= 4 ? all : few);
}

function chooseSteps(log) {
    state.logSteps = log;
    turnOn("#choose-steps button", (button) => (button.dataset.log === "1") === log);
    redraw((panel) => panel.steps);
}

function chooseTheme(theme) {
    state.theme = theme;
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    redraw();
    drawText();
}

function switchTheme() {
    const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    chooseTheme(dark ? "light" : "dark");
    memory.set("theme", state.theme);
}

// ---------------------------------------------------------------- start

async function loadPlotly() {
    const packed = Uint8Array.from(atob($("#plotly").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    document.head.append(make("script", { textContent: await new Response(stream).text() }));
}

function makeChoices() {
    chooseTheme(memory.get("theme"));
    makeText();
    $$(".card").forEach(makeLegend);
    makeLayerChoice();
    chooseSteps(state.logSteps);
    for (const button of $$("#choose-steps button"))
        button.onclick = () => chooseSteps(button.dataset.log === "1");
    $("#theme").onclick = switchTheme;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
}

// while a run goes on: not under the eyes of someone who reads a token's gates
function reloadNowAndThen() {
    setInterval(() => {
        if (!view.pinned && document.visibilityState === "visible") location.reload();
    }, 1000 * data.refresh);
}

async function start() {
    data.panels.forEach((panel, i) => Object.assign(panel, { plot: $(`#plot-${i}`), off: new Set() }));
    makeChoices();
    if (data.refresh) reloadNowAndThen();
    try {
        await loadPlotly();
    } catch (error) {
        const why = `The figures cannot be drawn (${error.message}): use a browser of 2023 or later.`;
        Object.assign($("#trouble"), { textContent: why, hidden: false });
        return;
    }
    watchPanels();
    addEventListener("beforeprint", () => drawAll());
    report.ready = true;
}

// for the tests and for pictures.py
const report = { ready: false, data, state, drawAll, chooseLayers, chooseSteps, chooseTheme, pictureOfText };
window.report = report;
start();
