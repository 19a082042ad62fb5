// The head: what was run, the totals, where each vCPU's time went; and what came when.

{
  const run = D.run;
  const name = run.kernel ? run.kernel.split("/").pop() : "a guest";
  document.title = `VM exits: ${name}`;
  fill(byId("title"), name);
  const facts = [
    ["kernel", run.kernel], ["command line", run.cmdline], ["recorded by", run.vmm && `vmm ${run.vmm}`],
    ["host", run.vendor && `${run.vendor}: its exit reasons are ${run.amd ? "AMD-V's (AMD APM vol. 2, appendix C)" : "VT-x's (Intel SDM vol. 3, appendix C)"}`],
    ["exits inside KVM", run.in_kernel], ["symbols", run.symbols || "none found (give --symbols FILE)"], ["length", duration(END)],
  ];
  fill(byId("facts"), ...facts.filter(([, value]) => value).map(([key, value]) =>
    el("div", {}, el("dt", {}, key), el("dd", { class: ["kernel", "command line", "symbols"].includes(key) ? "mono" : null }, value))));
  const notes = run.lost.map(([track, lost]) => `${track}: ${plural(lost, "event")} lost, because ${track === "KVM" ? "the kernel's buffer" : "its ring"} was full: gaps in the lanes may hide exits.`);
  if (run.stopped) notes.push(`The rest of the run was not recorded: ${run.stopped}.`);
  const all = D.totals[0] + D.totals[1] + D.totals[2];
  if (!all) notes.push("There is no event in this trace, or none that was asked for.");
  if (all > N) notes.push(`The first ${count(N)} of ${count(all)} events, up to ${moment(N ? began[N - 1] : 0, 1e6)}, are told one by one: in the lanes, the list and the stories. Tables, totals and the picture over time count all of them. A page of what came later: --after MS.`);
  if (run.filtered) notes.push("This page shows the events that were asked for, not all. The shares of time below count all.");
  if (!run.has_kernel && all) notes.push(`Exits that KVM answers by itself are not in this trace (${run.in_kernel || "the file does not say why"}): their time counts as the guest's.`);
  fill(byId("notes"), ...notes.map((note) => el("p", { class: "note" }, note)));

  const total = (n, label, colour) => el("div", { class: "total" }, el("b", {}, count(n)), el("span", {}, el("i", { style: `background:var(--${colour})` }), label));
  fill(byId("totals"), total(D.totals[0], "exits to the monitor", "c0"),
    run.has_kernel && total(D.totals[1], "exits inside KVM", "c3"), D.totals[2] > 0 && total(D.totals[2], "turns of workers", "c10"));

  const guest = run.has_kernel ? "guest" : "guest or KVM";
  const shares = LANES.filter((lane) => lane.vcpu).flatMap((lane) => {
    const parts = [[guest, lane.guest, "guest"], ["KVM", lane.kvm, "c3"], ["halted", lane.halted, "c8"], ["monitor", lane.monitor, "c0"]];
    const known = parts.reduce((sum, part) => sum + part[1], 0), span = Math.max(lane.to - lane.from, known, 1);
    parts.push(["neither: system calls, the recorder", span - known, "line"]);
    const counters = run.counters[lane.name] || [];
    const shown = parts.filter(([, ns, colour]) => ns > 0 && (colour !== "line" || ns > span * 0.01));
    return [
      el("div", { class: "share" }, el("b", {}, lane.name), el("div", { class: "stack", role: "img", "aria-label": shown.map(([what, ns]) => `${what} ${percent(ns, span)}`).join(", ") },
        ...shown.map(([what, ns, colour]) => el("i", { style: `width:${100 * ns / span}%;background:var(--${colour})`, title: `${what}: ${duration(ns)}` })))),
      el("div", { class: "keys" }, ...shown.map(([what, ns, colour]) => el("span", {}, el("i", { class: "swatch", style: `background:var(--${colour})` }), `${what} `, el("b", {}, percent(ns, span)), ` ${duration(ns)}`))),
      counters.length > 0 && el("div", { class: "keys" }, el("span", { title: "Counters that KVM keeps for each vCPU, read at the end: an independent count" }, "KVM's own count: ",
        ...counters.flatMap(([what, n], at) => [at ? ", " : "", `${what} `, el("b", {}, count(n))]),
        run.has_kernel && !run.filtered ? `; recorded here ${count(lane.counts[0] + lane.counts[1])}` : "")),
    ];
  });
  fill(byId("shares"), ...shares);
}

// What came when.
{
  const at = (t) => 100 * Math.min(Math.max((t - START) / (END - START), 0), 1);
  const [marks, step] = rounds(START, END, 8);
  const lines = () => marks.map((t) => el("i", { class: "grid", style: `left:${at(t)}%` }));
  const KINDS = { monitor: 0, guest: 1, kernel: 2, programs: 3, firmware: 4, disk: 5 };
  const phases = D.phases.map((phase, i) => {
    const to = i + 1 < D.phases.length ? D.phases[i + 1].from : END;
    const kind = KINDS[phase.name];
    const wide = at(to) - at(phase.from);
    const label = `${phase.name} ${duration(to - phase.from)}`;
    return el("div", { class: `phase p${kind}`, style: `left:${at(phase.from)}%;width:calc(${wide}% - 2px)${wide < 3 ? ";padding:0" : ""}`, title: `${label}, from ${moment(phase.from)}: ${phase.how}` }, wide < 5 ? "" : label);
  });
  const rows = D.uses.flatMap((use) => {
    const mark = use.name.startsWith("mark "), last = use.name === "last exit", vcpu = /^vcpu\d+$/.test(use.name);
    const colour = vcpu ? "var(--guest)" : mark ? "var(--c2)" : last ? "var(--ink)" : use.name === "nobody" ? "var(--dim)" : "var(--c0)";
    const x = at(use.first), width = at(use.last) - x;
    let path = "";
    let before = -1;
    for (const t of use.at) {
      const slot = Math.round(at(t) * 20);
      if (slot !== before) path += `M${slot} 3V13`;
      before = slot;
    }
    const exits = `${plural(use.before[0], "exit")}${D.run.has_kernel ? ` and ${count(use.before[1])} in KVM` : ""}`;
    const say = [el("b", {}, moment(use.first, END > 1e8 ? 1e5 : 1e3)), " ", el("code", {}, use.sentence), ` after ${exits}`, use.count > 1 ? `; used ${plural(use.count, "time")}` : ""];
    // Over the bar, from its beginning or up to it.
    const side = x > 50 ? `right:calc(${100 - x}% - 8px);max-width:${x}%` : `left:${x}%;max-width:${100 - x}%`;
    return [
      el("div", { class: "name", title: use.name }, use.name),
      el("div", { class: "row" }, ...lines(), el("i", { class: "life", style: `left:${x}%;width:${width}%;background:color-mix(in srgb, ${colour} 45%, var(--card))` }),
        use.at.length > 1 && el("svg", { class: "ticks", viewBox: "0 0 2000 16", preserveAspectRatio: "none", "aria-hidden": "true" },
          el("path", { d: path, style: `stroke:${colour}`, "stroke-width": "1.2", "vector-effect": "non-scaling-stroke", fill: "none" })),
        el("button", { class: "first", type: "button", style: `left:${x}%;background:${colour}`, title: "Its story", "aria-label": `Story of the first use of ${use.name}`, onclick: () => go(use.number - 1, true) }),
        el("span", { class: "say", style: side }, ...say)),
    ];
  });
  const keys = D.phases.map((phase, i) => el("span", { title: phase.how }, el("i", { class: `swatch p${KINDS[phase.name]}` }), `${phase.name} `,
    el("b", {}, duration((i + 1 < D.phases.length ? D.phases[i + 1].from : END) - phase.from)), `: ${phase.how}`));
  const axis = marks.map((t) => el("span", { style: `left:${at(t)}%` }, moment(t, step)));
  // The monitor's own steps are too short to be seen among a guest's seconds: they have a picture, and an axis, of their own.
  const entered = D.phases.length > 1 ? D.phases[1].from : 0;
  const steps = D.before.filter((step) => step.from < (entered || END));
  const done = steps.reduce((last, step) => Math.max(last, step.from + step.took), 0);
  if (steps.length && entered > done) steps.push({ name: "threads", what: "the vCPUs' threads start, and vcpu0 enters the guest", from: done, took: entered - done });
  const whole = Math.max(done, entered, 1), [ticks, fine] = rounds(0, whole, 8);
  const along = (t) => 100 * Math.min(Math.max(t / whole, 0), 1);
  const bars = steps.flatMap(({ name, what, from, took }) => {
    const x = along(from), width = along(from + took) - x, right = x + width > 55;
    return [el("div", { class: "name" }, name), el("div", { class: "row step" }, ...ticks.map((t) => el("i", { class: "grid", style: `left:${along(t)}%` })),
      el("i", { class: "bar", style: `left:${x}%;width:max(3px, ${width}%)` }),
      el("span", { class: "say", style: right ? `right:calc(${100 - x}% + 8px);max-width:calc(${x}% - 14px)` : `left:calc(${x + width}% + 8px);max-width:calc(${100 - x - width}% - 8px)` }, el("b", {}, duration(took)), ` ${what}`))];
  });
  if (steps.length) {
    fill(byId("before"), el("h3", {}, `The monitor, up to the first entry: ${duration(whole)}`), el("div", { class: "fall" }, ...bars,
      el("div"), el("div", { class: "axis" }, ...ticks.map((t) => el("span", { style: `left:${along(t)}%` }, moment(t, fine))))));
  }
  fill(byId("waterfall"), el("div", { class: "fall" },
    el("div", { class: "name" }, D.phases.length ? "runs" : ""), el("div", { class: "row phases" }, ...phases), ...rows,
    el("div"), el("div", { class: "axis" }, ...axis)),
  el("div", { class: "keys phases" }, ...keys));
}
