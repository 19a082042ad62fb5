// The story of one event, step by step; its number stands in the address, so that it can be linked to: #exit=12.

const panel = byId("story");

/** Tells event `i`; brings it into view if it is not, or `close` to it. */
function go(i, near = false) {
  selected = i;
  if (near || began[i] < view.from || ended[i] > view.to) {
    const span = Math.min(view.to - view.from, near ? Math.max((END - START) / 60, E.took[i] * 8) : Infinity);
    const middle = began[i] + E.took[i] / 2;
    show(middle - span / 2, middle + span / 2);
  }
  const hash = `#exit=${i + 1}`;
  if (location.hash !== hash) history.replaceState(null, "", hash);
  tell(i);
  redraw();
}

function close() {
  if (panel.hidden) return;
  panel.hidden = true;
  selected = -1;
  document.body.classList.remove("open");
  history.replaceState(null, "", "#");
  redraw();
}

/** The nearest event after `i`, or before it, that is on the same track (if asked) and `fits`. */
function beside(i, by, fits) {
  for (let at = i + by; at >= 0 && at < N; at += by) if (fits(at)) return at;
  return -1;
}

function pathStep(colour, name, ...children) {
  return el("li", { style: `--at:var(--${colour})` }, el("h3", {}, name), ...children);
}
const p = (...children) => el("p", {}, ...children);
const code = (words) => el("code", {}, words);

// By event: where its registers stand.
const REGISTERS = new Map(D.registers.events.map((event, at) => [event, D.registers.values[at]]));

/** The registers at exit `i`, or at the last one before it from the same instruction. */
function registers(i) {
  if (placeOf[i] !== MONITOR) return "";
  const alike = (at) => REGISTERS.has(at) && E.rip[at] === E.rip[i] && E.track[at] === E.track[i];
  const at = alike(i) ? i : E.rip[i] ? beside(i, -1, alike) : -1;
  if (at < 0) return "";
  const before = at === i ? null : p("Not recorded for this exit. At the last one from here that they are known of, ", el("a", { href: `#exit=${at + 1}` }, `event ${count(at + 1)}`), ":");
  const rows = REGISTERS.get(at).map((value, number) => {
    const name = D.registers.names[number], wide = number >= 16;
    return el("div", { class: wide ? "wide" : null }, el("dt", {}, name), el("dd", { class: /^0+$/.test(value) ? "none" : null }, value.padStart(wide ? 1 : 16, "0")));
  });
  return pathStep("c7", "Registers", before, el("dl", { class: "registers" }, ...rows));
}

function hardware(i) {
  const reason = D.reasons[E.reason[i]], detail = text("detail", i);
  const row = (name, words, here) => words && [el("dt", {}, name), el("dd", { class: here ? "here" : null }, words, here && D.run.vendor ? el("em", {}, "  this host") : "")];
  return pathStep(`c${reason.class}`, "Hardware leaves the guest",
    el("dl", { class: "hard" }, ...[row("VT-x", reason.vtx, !D.run.amd), row("AMD-V", reason.svm, D.run.amd), row("with", detail, false)].filter(Boolean).flat()),
    !reason.vtx && !reason.svm && placeOf[i] === MONITOR ? p("No exit reason of hardware stands behind this one.") : "", reason.what ? p(reason.what) : "");
}

function guestStep(i) {
  const before = E.guest[i], place = text("place", i), rip = text("rip", i), instruction = text("code", i);
  const ran = before > 0 ? `${duration(before)} in ${D.run.has_kernel || placeOf[i] === KVM ? "the guest" : "the guest, or in KVM for it,"} before it.` : "How long the guest ran before is not known.";
  return pathStep("guest", "The guest", place ? p(el("span", { class: "big" }, code(place))) : p("Where it was is not known."),
    instruction ? p(code(instruction)) : "", rip && rip !== place ? p("at ", code(rip)) : "", p(ran));
}

/** The last step: what comes after, and how soon. */
function after(i) {
  const next = beside(i, 1, (at) => E.track[at] === E.track[i]);
  if (next < 0) return pathStep("dim", "The end", p(placeOf[i] === MONITOR ? "No exit of this vCPU follows: the run ended here, or the recording did." : "Nothing of this track follows in what is told one by one."));
  const ran = E.guest[next] > 0 ? `After ${duration(E.guest[next])} there ` : "";
  return pathStep("guest", "Next entry", p(`${duration(E.took[i])} after the exit ${placeOf[i] === MONITOR ? "the thread calls KVM_RUN again" : "KVM enters the guest again"}. `,
    ran ? `${ran}comes ` : "Then comes ", el("a", { href: `#exit=${next + 1}` }, summary(next)), "."));
}

function summary(i) {
  return placeOf[i] === KVM ? `${D.reasons[E.reason[i]].name} in KVM` : text("answer", i) || D.reasons[E.reason[i]].name;
}

function steps(i) {
  const reason = D.reasons[E.reason[i]], answer = text("answer", i), device = text("device", i);
  if (placeOf[i] === WORKER) {
    const worker = LANES.find((lane) => lane.number === E.track[i]).name;
    return [pathStep(`c${reason.class}`, "Why", p(reason.what)), pathStep("c10", "The worker's thread", p(el("span", { class: "big" }, code(worker)), ` ${answer}.`),
      reason.name === "interrupt" ? "" : p(`It took ${duration(E.took[i])}, while the vCPUs ran on.`))];
  }
  if (placeOf[i] === KVM) {
    return [guestStep(i), hardware(i), pathStep(`c${reason.class}`, "Answered inside KVM", reason.kvm ? p(reason.kvm) : "",
      p(`${duration(E.took[i])} from the exit to the entry. It never left the kernel: the monitor's thread stayed in KVM_RUN and knows nothing of it.`)), after(i)];
  }
  const port = reason.class === 0, io = port || reason.class === 1, read = reason.name === "in" || reason.name === "mmio read";
  const way = ["KVM_RUN returns", "kvm::exit", "vcpu::dispatch", ...(io ? [port ? "bus: ports" : "bus: addresses", device] : [])];
  const chain = way.flatMap((one, at) => at ? [" \u2192 ", code(one)] : [code(one)]);
  const done = device === "nobody" ? "Nobody answers at this address: a read gives all ones, a write is lost, as on a PC's bus."
    : read ? "The value lies in the shared kvm_run page; KVM puts it into the guest's register on the next entry." : io ? "The write is done; the guest's instruction is complete." : "";
  return [guestStep(i), registers(i), hardware(i),
    pathStep("c9", "KVM", p("It has no answer of its own: ", code("KVM_RUN"), " returns to the monitor with ", code(reason.exit), ".")),
    pathStep("c0", "The monitor", p(...chain), io ? "" : p(answer)),
    io ? pathStep(`c${reason.class}`, device === "nobody" ? "No device" : "The device", p(el("span", { class: "big" }, code(answer))), p(done)) : "",
    after(i)].filter(Boolean);
}

function tell(i) {
  const lane = LANES.find((one) => one.number === E.track[i]), reason = D.reasons[E.reason[i]];
  const link = (label, at) => el("button", { type: "button", disabled: at < 0, onclick: () => go(at) }, label);
  const own = (at) => E.track[at] === E.track[i], reaches = (at) => placeOf[at] === MONITOR;
  const alike = (at) => E.reason[at] === E.reason[i];
  const next = beside(i, 1, own), before = E.guest[i], then = next >= 0 ? E.guest[next] : 0;
  const all = Math.max(before + E.took[i] + then, 1);
  // What is short beside the rest is still to be seen.
  const part = (ns, colour, title) => ns > 0 && el("i", { style: `flex:${Math.max(ns / all, 0.03)} 0 0;background:var(--${colour})`, title });
  const kind = placeOf[i] === WORKER ? "Worker's turn" : placeOf[i] === KVM ? "Exit inside KVM" : "Exit to the monitor";
  fill(panel,
    el("button", { type: "button", class: "close", onclick: close, "aria-label": "Close (Escape)" }, "\u2715"),
    el("p", { class: "eyebrow" }, `${kind}, event ${count(i + 1)} of ${count(D.totals[0] + D.totals[1] + D.totals[2])}`),
    el("h2", { id: "story-title" }, summary(i)),
    el("p", { class: "when" }, `${lane.name} at ${moment(began[i])}; ${reason.name}; took ${duration(E.took[i])}`),
    placeOf[i] !== WORKER && el("div", { class: "strip", role: "img", "aria-label": `guest ${duration(before)}, handled ${duration(E.took[i])}, guest ${duration(then)}` },
      part(before, "guest", `in the guest: ${duration(before)}`), part(E.took[i], `c${reason.class}`, `handled: ${duration(E.took[i])}`), part(then, "guest", `in the guest: ${duration(then)}`)),
    placeOf[i] !== WORKER && el("div", { class: "strip-text" }, el("span", {}, `guest ${before > 0 ? duration(before) : "?"}`), el("span", {}, `handled ${duration(E.took[i])}`), el("span", {}, then > 0 ? `guest ${duration(then)}` : "")),
    el("nav", { "aria-label": "Other events" }, link("\u2190 previous here", beside(i, -1, own)), link("next here \u2192", next),
      link("\u2190 to the monitor", beside(i, -1, reaches)), link("to the monitor \u2192", beside(i, 1, reaches)),
      link("\u2190 same reason", beside(i, -1, alike)), link("same reason \u2192", beside(i, 1, alike))),
    el("button", { type: "button", onclick: () => show(began[i] - all * 1.5, ended[i] + all * 1.5) }, "Show it close"),
    el("ol", { class: "path" }, ...steps(i)));
  panel.scrollTop = 0;
  if (panel.hidden) {
    panel.hidden = false;
    document.body.classList.add("open");
  }
}

/** The event that the address names. */
function followAddress() {
  const named = /^#exit=(\d+)$/.exec(location.hash);
  if (!named) return;
  const i = Number(named[1]) - 1;
  if (i >= 0 && i < N) go(i, selected < 0);
}
addEventListener("hashchange", followAddress);
