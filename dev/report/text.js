// The coloured text: a reader per run, tokens shaded by how many experts they have, by which, or by loss. A
// token tells its gates when pointed at. on[l][t] of a source: expert, gate, expert ... (token t, layer l)
"use strict";
const view = { source: "", shade: "count", layer: 0, pinned: null };
const shades = { count: "number of experts", expert: "which experts", loss: "loss" };
const BLUE = "#3d82e0", ORANGE = "#e8762d";
const MOST_COLUMNS = 12; // experts that a token's grid of gates shows; more are listed
const MOST_SIGNS = 32; // experts that stand above the text

const expertsOf = (pairs) => pairs.filter((_, i) => i % 2 === 0);
const gatesOf = (pairs) => pairs.filter((_, i) => i % 2 === 1);
const sourceOf = (text) => text.sources.find((source) => source.name === view.source);
const shownTexts = () => data.text.filter(sourceOf);

function expertColour(e, experts) {
    const turn = (e * 137.508) % 360; // the golden angle: neighbours differ
    return experts <= data.colours.length ? data.colours[e] : `hsl(${turn} 62% ${50 + 8 * (e % 3)}%)`;
}

function withAlpha(colour, alpha) {
    return `color-mix(in srgb, ${colour} ${(100 * alpha).toFixed(1)}%, transparent)`;
}

function quantile(values, q) {
    const sorted = values.filter((v) => v !== null && isFinite(v)).sort((a, b) => a - b);
    return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : 0;
}

// mean active experts of each token over the chosen layers
function countsOf(source) {
    const layers = [...state.layers].filter((l) => l < source.on.length);
    const count = (t) => layers.reduce((sum, l) => sum + source.on[l][t].length / 2, 0);
    return source.ids.map((_, t) => count(t) / Math.max(1, layers.length));
}

// ---------------------------------------------------------------- controls

function makeSelect(options, chosen, onchange) {
    const option = ([value, textContent]) => make("option", { value, textContent });
    const select = make("select", {}, ...options.map(option));
    select.value = chosen;
    select.onchange = () => {
        onchange(select.value);
        drawText();
    };
    return select;
}

function makeControl(name, ...elements) {
    return make("span", { className: "control" }, make("label", { textContent: name }), ...elements);
}

function shadeButtons() {
    const chips = make("span", { className: "chips", id: "shade" });
    for (const [key, name] of Object.entries(shades)) {
        const choose = () => {
            view.shade = key;
            drawText();
        };
        const button = makeButton(name, choose);
        button.dataset.shade = key;
        chips.append(button);
    }
    return chips;
}

function makeText() {
    const root = $("#coloured");
    if (!root) return;
    const names = [...new Set(data.text.flatMap((text) => text.sources.map((source) => source.name)))];
    const layers = Math.max(...data.text.map((text) => text.layers));
    view.source = names[0];
    view.layer = (layers - 1) >> 1;
    const source = makeSelect(names.map((name) => [name, name]), view.source, (name) => (view.source = name));
    const ofLayers = upTo(layers).map((l) => [l, `of layer ${l}`]);
    const layer = makeSelect(ofLayers, view.layer, (l) => (view.layer = +l));
    layer.id = "text-layer";
    const controls = make("div", { className: "text-controls" });
    if (names.length > 1) controls.append(makeControl("Text", source));
    controls.append(makeControl("Shade", shadeButtons(), layer));
    root.append(controls, make("div", { className: "readers" }));
    addEventListener("keydown", moveToken);
    document.addEventListener("click", (event) => event.target.closest(".tokens, #tip") || pin(null));
    addEventListener("scroll", followToken, { passive: true });
}

function moveToken(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, Escape: 0 }[event.key];
    if (step === undefined || !view.pinned) return;
    event.preventDefault();
    const next = $(`[data-t="${+view.pinned.dataset.t + step}"]`, view.pinned.parentNode);
    pin(step ? next || view.pinned : null);
}

// ---------------------------------------------------------------- readers

function drawText() {
    const root = $("#coloured .readers");
    if (!root) return;
    turnOn("#shade button", (button) => button.dataset.shade === view.shade);
    $("#text-layer").hidden = view.shade !== "expert";
    const scrolled = $$(".tokens", root).map((tokens) => tokens.scrollTop);
    pin(null);
    root.replaceChildren(...shownTexts().map((text) => readerOf(text, sourceOf(text))));
    $$(".tokens", root).forEach((tokens, i) => (tokens.scrollTop = scrolled[i] || 0));
}

function readerOf(text, source) {
    const shade = view.shade === "expert" ? shadeByExpert(text, source) : shadeByNumber(source);
    const spans = source.text.map((piece, t) => tokenOf(piece, t, shade.of(t)));
    const tokens = make("div", { className: "tokens" }, ...spans);
    const router = text.name.includes(text.router) ? "" : ` (${text.router})`;
    const cut = text.cut && source.ids.length >= text.most ? `, the first ${source.ids.length} tokens` : "";
    const tokenAt = (event) => event.target.closest("[data-t]");
    tokens.onpointerover = (event) => event.pointerType === "mouse" && !view.pinned && point(tokenAt(event));
    tokens.onpointerleave = () => view.pinned || hideTip();
    tokens.onclick = (event) => pin(tokenAt(event) === view.pinned ? null : tokenAt(event));
    const heading = make("h4", { textContent: text.name + router + cut });
    const scale = make("div", { className: "scale" }, ...shade.scale);
    return make("div", { className: "reader" }, heading, scale, tokens);
}

function tokenOf(piece, t, background) {
    const visible = (part) => (part === "\n" ? make("em", { textContent: "⏎\n" }) : part);
    const token = make("span", {}, ...piece.split(/(\n)/).filter(Boolean).map(visible));
    token.dataset.t = t;
    if (background) token.style.background = background;
    else token.className = "none";
    return token;
}

// -> {of: the background of token t or "", scale: what explains it}
function shadeByNumber(source) {
    const loss = view.shade === "loss", colour = loss ? ORANGE : BLUE;
    const numbers = loss ? source.loss : countsOf(source);
    const low = loss ? 0 : Math.min(...numbers);
    const high = Math.max(loss ? quantile(numbers, 0.98) : Math.max(...numbers), 1e-6);
    const place = (x) => Math.max(0, Math.min(1, (x - low) / Math.max(high - low, 1e-9)));
    const of = (t) => {
        const nothing = numbers[t] === null || (!loss && numbers[t] === 0);
        return nothing ? "" : withAlpha(colour, 0.06 + 0.74 * place(numbers[t]));
    };
    const style = `background:linear-gradient(90deg, ${withAlpha(colour, 0.06)}, ${withAlpha(colour, 0.8)})`;
    const ramp = make("span", { className: "ramp", style });
    return { of, scale: [low.toFixed(2), ramp, `${high.toFixed(2)} ${loss ? "nats" : "experts per layer"}`] };
}

function shadeByExpert(text, source) {
    const on = source.on[Math.min(view.layer, source.on.length - 1)];
    const paint = (e, alpha) => withAlpha(expertColour(e, text.experts), alpha);
    const of = (t) => {
        const bands = expertsOf(on[t]).map((e) => paint(e, 0.55)), n = bands.length;
        const stripes = bands.map((band, i) => `${band} ${(100 * i) / n}% ${(100 * (i + 1)) / n}%`);
        return n < 2 ? bands.join() : `linear-gradient(${stripes.join()})`;
    };
    const signs = upTo(text.experts <= MOST_SIGNS ? text.experts : 0);
    const sign = (e) => make("b", {}, make("i", { style: `background:${paint(e, 0.7)}` }), `${e}`);
    const sizes = new Set(on.map((pairs) => pairs.length / 2));
    const hints = [Math.max(...sizes) > 1 && "stripes: several", sizes.has(0) && "underlined: none"];
    return { of, scale: [...signs.map(sign), hints.filter(Boolean).join("; ")] };
}

// ---------------------------------------------------------------- a token's gates

function pin(token) {
    view.pinned = null;
    point(token);
    if (!token) return;
    view.pinned = token;
    $("#tip").classList.add("fixed");
}

function hideTip() {
    for (const token of $$(".tokens .here")) token.classList.remove("here");
    $("#tip").hidden = true;
    $("#tip").classList.remove("fixed");
}

// of every run that has the same token at the same place
function point(token) {
    hideTip();
    if (!token) return;
    const t = +token.dataset.t, readers = $$("#coloured .tokens"), texts = shownTexts();
    const own = texts[readers.indexOf(token.parentNode)] || texts[0];
    const { ids, text: pieces } = sourceOf(own);
    const quoted = JSON.stringify(pieces[t]).slice(1, -1).replaceAll('\\"', '"');
    const place = `token ${t}, id ${ids[t]}`;
    const parts = [make("h5", { textContent: quoted }), make("p", { textContent: place })];
    for (const [i, text] of texts.entries()) {
        const source = sourceOf(text);
        if (text !== own && source.ids[t] !== ids[t]) continue;
        if (readers[i]) readers[i].children[t].classList.add("here");
        const loss = source.loss[t];
        const told = loss === null ? "no loss: nothing before it" : `loss ${loss.toFixed(3)}`;
        const gates = gatesTable(text, source.on.map((layer) => layer[t]));
        parts.push(make("h6", { textContent: `${text.name}: ${told}` }), gates);
    }
    $("#tip").replaceChildren(...parts);
    placeTip($("#tip"), token.getBoundingClientRect());
}

function followToken() {
    if (!view.pinned) return hideTip();
    const box = view.pinned.getBoundingClientRect();
    if (box.bottom < 0 || box.top > innerHeight) pin(null);
    else placeTip($("#tip"), box);
}

function placeTip(tip, box) {
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect(), below = box.bottom + height + 12 < innerHeight;
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 12))}px`;
    tip.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - height - 6)}px`;
}

function gateText(gate) {
    return gate === null ? "NaN" : gate.toPrecision(2).replace(/^0\./, ".");
}

// layers[l]: the token's pairs; rows are layers, columns experts
function gatesTable(text, layers) {
    if (text.experts > MOST_COLUMNS) return gatesList(layers);
    const most = Math.max(1e-9, ...layers.flatMap(gatesOf));
    const header = ["layer", ...upTo(text.experts)].map((textContent) => make("th", { textContent }));
    const rows = layers.map((pairs, l) => {
        const cells = upTo(text.experts).map((e) => make("td", {}, gateCell(text, e, pairs, most)));
        return make("tr", {}, make("th", { textContent: l }), ...cells);
    });
    return make("table", {}, make("tr", {}, ...header), ...rows);
}

function gateCell(text, e, pairs, most) {
    const at = expertsOf(pairs).indexOf(e), gate = gatesOf(pairs)[at];
    if (at < 0) return make("i", { textContent: "·" });
    const colour = withAlpha(expertColour(e, text.experts), 0.25 + (0.55 * (gate || 0)) / most);
    return make("i", { textContent: gateText(gate), style: `color:var(--ink);background:${colour}` });
}

function gatesList(layers) {
    const rows = layers.map((pairs, l) => {
        const gates = gatesOf(pairs), listed = expertsOf(pairs).map((e, i) => `${e} (${gateText(gates[i])})`);
        return make("div", { textContent: `layer ${l}: ${listed.join(", ") || "none"}` });
    });
    return make("div", {}, ...rows);
}

// ---------------------------------------------------------------- the README's picture

// the first run's tokens by number and by experts, side by side; of the busiest layer where none is named
function pictureOfText(name, layer) {
    const [text] = data.text;
    if (!text) return;
    const source = text.sources.find((s) => s.name === name) || text.sources[0];
    const pairs = source.on.map((tokens) => tokens.reduce((sum, token) => sum + token.length, 0));
    view.source = source.name;
    view.layer = layer === null ? pairs.indexOf(Math.max(...pairs)) : layer;
    const readers = ["count", "expert"].map((shade) => {
        view.shade = shade;
        const reader = readerOf(text, source), count = `experts per layer, mean of ${text.layers} layers`;
        $("h4", reader).textContent = shade === "count" ? count : `experts of layer ${view.layer}`;
        return reader;
    });
    $("#coloured .readers").replaceChildren(...readers);
    $(".text-controls").hidden = true;
}
