// The tables, the list of what is in view, the theme; and the first drawing of everything.

/** A table that its heads sort. `columns`: head, how to make the cell, what to sort by, class. */
function sortable(node, columns, rows, by) {
  let order = by, down = true;
  const draw = () => {
    const key = columns[order].key, sign = down ? -1 : 1;
    const sorted = [...rows].sort((a, b) => sign * (typeof key(a) === "string" ? key(a).localeCompare(key(b)) : key(a) - key(b)));
    const heads = columns.map(({ head, key, kind, under }, at) => el("th", { scope: "col", class: kind, "aria-sort": at === order ? (down ? "descending" : "ascending") : null },
      key ? el("button", { type: "button", tabindex: "0", onclick: () => { down = order === at ? !down : typeof key(rows[0]) !== "string"; order = at; draw(); } }, head) : head, under ? under() : ""));
    const body = sorted.map((row) => el("tr", {}, ...columns.map(({ cell, kind }) => el("td", { class: kind }, ...[cell(row)].flat()))));
    fill(node, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...body)));
    if (focus) for (const one of node.querySelectorAll(`[data-pick="${CSS.escape(`${focus.kind}:${focus.value}`)}"]`)) one.setAttribute("aria-pressed", "true");
  };
  if (rows.length) draw(); else fill(node, el("p", { class: "lead" }, "None."));
}

const took = (row) => row.took[0] + row.took[1];
const number = (row) => row.counts[0] + row.counts[1];

/** A bar of two parts: the monitor's and KVM's, against the longest. */
function gauge(parts, most) {
  return el("div", { class: "gauge-room" }, el("div", { class: "gauge", style: `width:${Math.max(100 * (parts[0] + parts[1]) / most, 1)}%` },
    ...parts.map((part, at) => part > 0 && el("i", { style: `flex:${part} 0 0;background:var(--${at ? "c3" : "c0"})` }))));
}

// A histogram has three steps a decade, from 100 ns.
const HISTOGRAM = 300, along = (ns) => Math.min(Math.max(Math.log10(Math.max(ns, 1) / 100) * 3 / D.run.steps, 0), 1) * HISTOGRAM;
function histogram(row, colour) {
  const most = Math.max(...row.histogram, 1), step = HISTOGRAM / D.run.steps;
  const bars = row.histogram.map((n, at) => n > 0 && el("rect", { x: at * step + 0.5, width: step - 1, y: 30 - Math.max(28 * n / most, 1.5), height: Math.max(28 * n / most, 1.5), style: `fill:var(--${colour})` }));
  return el("svg", { class: "histogram", viewBox: `0 0 ${HISTOGRAM} 34`, preserveAspectRatio: "none", role: "img", "aria-label": `median ${duration(row.p50)}, 99th percentile ${duration(row.p99)}` },
    el("path", { d: `M0 30.5H${HISTOGRAM}`, style: "stroke:var(--line)" }), ...bars.filter(Boolean),
    el("path", { d: `M${along(row.p50)} 1V33`, style: "stroke:var(--ink);stroke-width:1.5" }), el("circle", { cx: along(row.p99), cy: 31, r: 3, style: "fill:var(--ink)" }));
}
const scale = () => el("span", { class: "scale" }, ...[1e3, 1e5, 1e7, 1e9].map((ns) => el("span", { style: `left:${100 * along(ns) / HISTOGRAM}%` }, ns >= 1e9 ? "1s" : ns >= 1e6 ? `${ns / 1e6}ms` : `${ns / 1e3}\u00b5s`)));

{
  const all = [MONITOR, KVM].map((place) => D.by_reason.filter((row) => D.reasons[row.reason].place === place).reduce((sum, row) => sum + took(row), 0));
  const where = (row) => ["monitor", "KVM", "worker"][D.reasons[row.reason].place];
  sortable(byId("reasons"), [
    { head: "Reason", key: (row) => row.name, kind: "wide", cell: (row) => pickButton("reason", row.reason, "pick", el("i", { class: "swatch", style: `background:var(--c${D.reasons[row.reason].class})` }), row.name) },
    { head: "Answered in", key: where, cell: where },
    { head: "Count", key: number, kind: "num", cell: (row) => count(number(row)) },
    { head: "Time", key: took, kind: "num", cell: (row) => duration(took(row)) },
    { head: "Share", key: (row) => took(row) / (all[D.reasons[row.reason].place] || Infinity), kind: "num", cell: (row) => D.reasons[row.reason].place === WORKER ? "" : percent(took(row), all[D.reasons[row.reason].place]) },
    { head: "Median", key: (row) => row.p50, kind: "num", cell: (row) => duration(row.p50) },
    { head: "99%", key: (row) => row.p99, kind: "num", cell: (row) => duration(row.p99) },
    { head: "Hardware", key: (row) => hardwareWords(D.reasons[row.reason]), cell: (row) => hardwareWords(D.reasons[row.reason]) },
    { head: "", cell: (row) => histogram(row, `c${D.reasons[row.reason].class}`), under: scale },
  ], D.by_reason, 3);

  const table = (node, kind, rows, name) => {
    const most = Math.max(...rows.map(took), 1);
    const kvm = kind === "symbol" && D.run.has_kernel;
    sortable(byId(node), [
      { head: name, key: (row) => row.name, kind: "wide", cell: (row) => pickButton(kind, row.name, "pick", code(row.name)) },
      { head: kvm ? "To monitor" : "Count", key: (row) => row.counts[0], kind: "num", cell: (row) => count(row.counts[0]) },
      ...(kvm ? [{ head: "In KVM", key: (row) => row.counts[1], kind: "num", cell: (row) => count(row.counts[1]) }] : []),
      { head: "Time", key: took, kind: "num", cell: (row) => duration(took(row)) },
      { head: "Median", key: (row) => row.p50, kind: "num", cell: (row) => duration(row.p50) },
      { head: "", cell: (row) => gauge(row.took, most) },
    ], rows, kvm ? 3 : 2);
  };
  table("symbols", "symbol", D.by_symbol, "Function");
  table("devices", "device", D.by_device, "Device");
}

// Guest memory as it was first touched. What the record does not know is "?".
if (D.touches) {
  const { faults, took, pages, ranges, more_ranges, by, more_by } = D.touches, MOST = 200;
  const moreRanges = more_ranges + Math.max(ranges.length - MOST, 0), moreBy = more_by + Math.max(by.length - MOST, 0);
  const known = (value, tell) => value === null ? "?" : tell(value), amount = (value) => value === null ? -1 : value;
  const column = (head, of, tell = count) => ({ head, key: (row) => amount(of(row)), kind: "num", cell: (row) => known(of(row), tell) });
  const hex = (address) => `0x${address.toString(16)}`;
  byId("touches").hidden = false;
  byId("touches-lead").textContent = (faults === null ? "Page faults in KVM are not in this trace." : `${plural(pages, "page")}; ${plural(faults, "page fault")} in KVM, which took ${duration(took)}.`)
    + (moreRanges + moreBy ? ` Left out are ${plural(moreRanges, "range")} of fewer pages, and ${count(moreBy)} who touched fewer.` : "");
  sortable(byId("places"), [
    { head: "Guest addresses", key: (row) => row.from, kind: "wide", cell: (row) => code(`${hex(row.from)}-${hex(row.to)}`) },
    column("Pages", (row) => row.pages), column("Written", (row) => row.written), column("Ahead", (row) => row.ahead), column("Faults", (row) => row.faults), column("Time", (row) => row.took, duration),
    { head: "First touched by, most of all", key: (row) => row.by || "?", kind: "wide", cell: (row) => row.by === null ? "?" : [code(row.by), `: ${count(row.by_pages)}`] },
  ], ranges.slice(0, MOST), faults === null ? 2 : 1);
  sortable(byId("touchers"), [
    { head: "First touched by", key: (row) => row.name, kind: "wide", cell: (row) => code(row.name) },
    column("Pages", (row) => row.pages), column("Faults", (row) => row.faults), column("Time", (row) => row.took, duration),
  ], by.slice(0, MOST), 1);
}

// What is in view, as text: the lanes for who does not see them, and for copying.
{
  const MOST = 100;
  let wanted = "", timer = 0;
  const every = Int32Array.from({ length: N }, (_, i) => i);
  const draw = () => {
    const state = [view.from, view.to, focus && focus.kind, focus && focus.value, selected].join();
    if (state === wanted) return;
    wanted = state;
    const first = firstFrom(every, view.from), last = firstFrom(every, view.to + 1);
    const rows = [];
    let all = 0;
    // From the one that is told, if it is there: else from the left.
    const start = selected >= first && selected < last ? Math.max(first, selected - 8) : first;
    for (let i = first; i < last; i++) {
      if (focus && !focus.fits[i]) continue;
      all += 1;
      if (i < start || rows.length >= MOST) continue;
      const reason = D.reasons[E.reason[i]], lane = LANES.find((one) => one.number === E.track[i]);
      rows.push(el("tr", { class: i === selected ? "chosen" : null }, el("td", { class: "num" }, el("a", { href: `#exit=${i + 1}` }, count(i + 1))), el("td", { class: "num" }, moment(began[i])), el("td", {}, lane.name),
        el("td", {}, el("i", { class: "swatch", style: `background:var(--c${reason.class})` }), reason.name), el("td", { class: "wide" }, code(text("place", i)), " ", el("code", {}, text("code", i))),
        el("td", { class: "wide" }, text("answer", i) || text("detail", i)), el("td", { class: "num" }, duration(E.took[i]))));
    }
    byId("list-lead").textContent = `${plural(all, "event")} between ${moment(view.from)} and ${moment(view.to)}${focus ? " of what is picked out" : ""}${all > rows.length ? `; ${count(rows.length)} of them here` : ""}. Events are numbered as vmm trace report lists them.`;
    const heads = ["Event", "Time", "Track", "Reason", "Guest", "Answer", "Took"].map((head) => el("th", { scope: "col", class: ["Event", "Time", "Took"].includes(head) ? "num" : null }, head));
    fill(byId("list"), el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows)));
  };
  drawers.push(() => { clearTimeout(timer); timer = setTimeout(draw, 80); });
  draw();
}

// The theme: the system's, unless the button says otherwise. Paper is light.
const systemDark = matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  return (document.documentElement.dataset.theme || (systemDark.matches ? "dark" : "light")) === "dark";
}
{
  const root = document.documentElement, themes = [undefined, "light", "dark"];
  const set = (theme) => {
    if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
    byId("theme").textContent = `Theme: ${theme || "system"}`;
    readColours();
    for (const draw of drawers) draw();
  };
  byId("theme").addEventListener("click", () => set(themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length]));
  systemDark.addEventListener("change", () => set(root.dataset.theme));
  let before;
  addEventListener("beforeprint", () => { before = root.dataset.theme; set("light"); });
  addEventListener("afterprint", () => set(before));
  new ResizeObserver(redraw).observe(byId("lanes").parentElement);
  followAddress();
  set(undefined);
}
