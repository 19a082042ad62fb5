"use strict";
// The events, the view that all pictures share, and how numbers are written. What a trace says reaches the page as text nodes only.

const D = JSON.parse(document.getElementById("data").textContent);
const E = D.events, N = E.t.length;

const CLASSES = ["port I/O", "MMIO", "other", "page faults", "interrupts", "MSRs", "CPUID", "control registers", "waiting", "other",
  "at work", "interrupts the guest"];
const MONITOR = 0, KVM = 1, WORKER = 2;
const CLASS_HALT = 8;
const PLACES = [{ name: "To the monitor", classes: [0, 1, 2] }, { name: "Inside KVM", classes: [3, 4, 5, 6, 7, 8, 9] },
  { name: "Devices' workers", classes: [10, 11] }];

// When each event began and ended, in order of time.
const began = new Float64Array(N), ended = new Float64Array(N);
const ran = Float64Array.from(E.guest);
const classOf = new Uint8Array(N), placeOf = new Uint8Array(N);
for (let i = 0, t = 0; i < N; i++) {
  t += E.t[i];
  began[i] = t;
  ended[i] = t + E.took[i];
  const reason = D.reasons[E.reason[i]];
  classOf[i] = reason.class;
  placeOf[i] = reason.place;
}
const START = Math.min(0, N ? began[0] : 0), END = Math.max(D.end, START + 1e3);
/** Hardware's reason in the terms that are shown, this host's first. */
function hardwareWords({ vtx, svm }) {
  const names = [vtx && `VT-x ${vtx}`, svm && `AMD-V ${svm}`];
  return (D.run.amd ? names.reverse() : names).filter(Boolean).join(" = ");
}
const text = (column, i) => D.strings[E[column][i]];

// A lane for each vCPU, then for each worker: its events, by number.
const LANES = D.tracks.map((track, number) => ({ ...track, number }))
  .filter((track) => track.counts[0] + track.counts[1] > 0)
  .sort((a, b) => b.vcpu - a.vcpu || a.name.localeCompare(b.name, "en", { numeric: true }));
{
  const lists = D.tracks.map(() => []);
  for (let i = 0; i < N; i++) lists[E.track[i]].push(i);
  for (const lane of LANES) lane.events = Int32Array.from(lists[lane.number]);
}

/** The first place in `list` whose event begins at `t` or later. */
function firstFrom(list, t) {
  let low = 0, high = list.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (began[list[middle]] < t) low = middle + 1; else high = middle;
  }
  return low;
}

/** Nanoseconds in three digits or so. */
function duration(ns) {
  const n = Math.abs(ns);
  if (n < 1e3) return `${Math.round(ns)} ns`;
  const [value, unit] = n < 1e6 ? [ns / 1e3, "\u00b5s"] : n < 1e9 ? [ns / 1e6, "ms"] : [ns / 1e9, "s"];
  const size = Math.abs(value);
  return `${value.toFixed(size < 10 ? 2 : size < 100 ? 1 : 0)} ${unit}`;
}

/** A moment, as exactly as `step` nanoseconds need it. */
function moment(ns, step = 1e3) {
  const n = Math.max(Math.abs(ns), step);
  const [unit, name] = n < 1e3 ? [1, "ns"] : n < 1e6 ? [1e3, "\u00b5s"] : n < 1e9 ? [1e6, "ms"] : [1e9, "s"];
  const digits = Math.min(9, Math.max(0, Math.ceil(Math.log10(unit / step) - 1e-9)));
  return `${(ns / unit).toFixed(digits)} ${name}`;
}
const count = (n) => n.toLocaleString("en");
const percent = (part, all) => { const share = all > 0 ? 100 * part / all : 0; return `${share > 0 && share < 10 ? share.toFixed(1) : share.toFixed(0)}%`; };
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

/** An element: attributes, then children; strings among these become text. */
function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "path", "line", "circle"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false && child !== ""));
  return node;
}
const byId = (id) => document.getElementById(id);
const fill = (node, ...children) => node.replaceChildren(...children.filter(Boolean));

// Colours, as the theme has them now.
let colours = {};
function readColours() {
  const probe = el("i", { style: "display:none" });
  document.body.append(probe);
  const read = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
  colours = { class: CLASSES.map((_, i) => read(`c${i}`)) };
  for (const name of ["ground", "card", "line", "faint", "ink", "dim", "accent", "guest"]) colours[name] = read(name);
  probe.remove();
}

// What the lanes show, and what is picked out. Whoever draws, asks to be called.
const view = { from: START, to: END };
let focus = null;
let selected = -1;
const drawers = [];
let pending = false;
function redraw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => { pending = false; for (const draw of drawers) draw(); });
}
function show(from, to) {
  const span = Math.min(Math.max(to - from, 200), END - START);
  from = Math.min(Math.max((from + to - span) / 2, START), END - span);
  view.from = from;
  view.to = from + span;
  redraw();
}
function zoom(factor, at = (view.from + view.to) / 2) {
  show(at - (at - view.from) * factor, at + (view.to - at) * factor);
}
function move(part) {
  const by = (view.to - view.from) * part;
  const from = Math.min(Math.max(view.from + by, START), END - (view.to - view.from));
  show(from, from + view.to - view.from);
}

/** The function that an event came from. */
const functionOf = (i) => {
  const place = text("place", i);
  return !place || place.startsWith("0x") ? "(no symbol)" : place.replace(/\+0x[0-9a-f]+$/, "");
};
const TESTS = {
  class: (i, value) => classOf[i] === value,
  reason: (i, value) => E.reason[i] === value,
  symbol: (i, value) => placeOf[i] !== WORKER && functionOf(i) === value,
  device: (i, value) => placeOf[i] === MONITOR && text("device", i) === value,
};
/** Picks out what is like that, or no longer. */
function pick(kind, value) {
  focus = focus && focus.kind === kind && focus.value === value ? null : { kind, value, fits: null };
  if (focus) {
    focus.fits = new Uint8Array(N);
    for (let i = 0; i < N; i++) focus.fits[i] = TESTS[kind](i, value) ? 1 : 0;
  }
  for (const button of document.querySelectorAll("[data-pick]")) {
    button.setAttribute("aria-pressed", String(Boolean(focus) && button.dataset.pick === `${kind}:${value}`));
  }
  redraw();
}
const pickButton = (kind, value, className, ...children) =>
  el("button", { type: "button", class: className, "data-pick": `${kind}:${value}`, "aria-pressed": "false", onclick: () => pick(kind, value) }, ...children);

/** A canvas as sharp as the screen, and what to draw on it in CSS pixels. */
function sharp(canvas, height) {
  const width = canvas.parentElement.clientWidth, ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width];
}

/** Round moments between `from` and `to`, some `wanted` of them. */
function rounds(from, to, wanted) {
  const raw = (to - from) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw) || raw;
  const all = [];
  for (let t = Math.ceil(from / step) * step; t <= to && all.length < 100; t += step) all.push(t);
  return [all, step];
}
const FONT = '13px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
