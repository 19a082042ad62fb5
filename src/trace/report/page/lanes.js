// A lane for each vCPU in three storeys (guest, KVM, monitor) and for each worker in one; drawn anew for each view, event by event
// where they are wide enough, else summed up pixel by pixel.

{
  const canvas = byId("lanes"), tip = byId("tip");
  const GUTTER = 112, TOP = 24, ROW = 28, GAP = 3;
  const storeys = (lane) => lane.vcpu ? (D.run.has_kernel ? [MONITOR, KVM, -1] : [MONITOR, -1]) : [WORKER];
  const NAMES = { [MONITOR]: "monitor", [KVM]: "KVM", [-1]: D.run.has_kernel ? "guest" : "guest or KVM", [WORKER]: "worker" };
  const rows = [];
  let bottom = TOP;
  for (const lane of LANES) {
    lane.top = bottom;
    for (const storey of storeys(lane)) {
      rows.push({ lane, storey, y: bottom });
      bottom += ROW + GAP;
    }
    bottom += lane.vcpu ? 14 : 5;
  }
  const height = Math.max(bottom + 2, 80);
  let hovered = -1;
  // White cannot be read on these, in either theme.
  const PALE = [2, 6, 8, 11];
  const told = LANES.map((lane) => `${lane.name} (${lane.vcpu ? `${count(lane.counts[0])} to the monitor, ${count(lane.counts[1])} in KVM` : plural(lane.counts[0], "turn")})`);
  canvas.setAttribute("aria-label", `Lanes: ${told.join("; ") || "none"}. Plus and minus zoom, arrows move, n and p step through exits; the list below says the same in words.`);

  let wide = 0;
  const width = () => wide;
  const x = (t) => GUTTER + (t - view.from) / (view.to - view.from) * (width() - GUTTER);
  const when = (px) => view.from + (px - GUTTER) / (width() - GUTTER) * (view.to - view.from);
  const faded = (i) => focus !== null && !focus.fits[i];
  const MOMENT = 1.6;

  /** What was too narrow to be drawn by itself: time by pixel, with the class that has most of it. */
  function sums(wide) {
    const cover = new Float64Array(wide), best = new Float64Array(wide), colour = new Int8Array(wide).fill(-1);
    return {
      add(x0, x1, wanted) {
        const at = Math.floor(x0);
        if (at < 0 || at >= wide) return;
        const size = x1 - x0;
        cover[at] += size;
        if (size >= best[at] || colour[at] < 0) { best[at] = size; colour[at] = wanted; }
      },
      draw(c, y, least, paint) {
        for (let at = 0; at < wide; at++) {
          if (colour[at] < 0) continue;
          const tall = Math.max(Math.min(cover[at], 1), least) * ROW;
          paint(colour[at]);
          c.fillRect(at, y + ROW - tall, 1.2, tall);
        }
      },
    };
  }

  function drawRow(c, row, wide) {
    const { lane, storey, y } = row, list = lane.events;
    c.globalAlpha = 1;
    c.fillStyle = colours.faint;
    c.fillRect(GUTTER, y, wide - GUTTER, ROW);
    const first = Math.max(firstFrom(list, view.from) - 1, 0), last = firstFrom(list, view.to);
    const bright = sums(wide), dim = sums(wide);
    const guest = storey === -1, from = view.from, scale = (wide - GUTTER) / (view.to - from);
    // Up to the next event at least: its time in the guest may be in view.
    for (let at = first; at < Math.min(last + 1, list.length); at++) {
      const i = list[at];
      if (guest ? !ran[i] : placeOf[i] !== storey) continue;
      const x0 = Math.max(GUTTER + ((guest ? began[i] - ran[i] : began[i]) - from) * scale, GUTTER);
      const x1 = Math.min(GUTTER + ((guest ? began[i] : ended[i]) - from) * scale, wide);
      if (x1 < GUTTER || x0 > wide) continue;
      const wanted = guest ? 100 : classOf[i], out = !guest && faded(i);
      if (x1 - x0 < MOMENT) { (out ? dim : bright).add(x0, x1, wanted); continue; }
      c.globalAlpha = out ? 0.14 : 1;
      c.fillStyle = guest ? colours.guest : colours.class[wanted];
      c.fillRect(x0, y, x1 - x0, ROW);
      if (x1 - x0 > 46) label(c, guest ? duration(E.guest[i]) : wordsFor(i), x0, x1, y, guest ? colours.ink : PALE.includes(wanted) ? "#10131a" : null);
    }
    const paint = (wanted) => { c.fillStyle = wanted === 100 ? colours.guest : colours.class[wanted]; };
    c.globalAlpha = 0.14;
    dim.draw(c, y, 0.4, paint);
    c.globalAlpha = 1;
    bright.draw(c, y, guest ? 0.12 : 0.4, paint);
  }

  function wordsFor(i) {
    if (placeOf[i] === MONITOR || placeOf[i] === WORKER) return text("answer", i) || D.reasons[E.reason[i]].name;
    return D.reasons[E.reason[i]].name;
  }

  function label(c, words, x0, x1, y, colour) {
    c.save();
    c.beginPath();
    c.rect(x0 + 4, y, x1 - x0 - 8, ROW);
    c.clip();
    c.fillStyle = colour || colours.on;
    c.textAlign = "left";
    c.textBaseline = "middle";
    c.fillText(words, x0 + 6, y + ROW / 2 + 0.5);
    c.restore();
  }

  /** Up from the guest and down again, where there is room to see it. */
  function drawSteps(c, lane, wide) {
    const list = lane.events, first = Math.max(firstFrom(list, view.from) - 1, 0), last = firstFrom(list, view.to);
    if (!lane.vcpu || last - first > wide / 6) return;
    c.globalAlpha = 0.55;
    c.fillStyle = colours.ink;
    const low = rows.find((row) => row.lane === lane && row.storey === -1);
    for (let at = first; at < last; at++) {
      const i = list[at], up = rows.find((row) => row.lane === lane && row.storey === placeOf[i]);
      for (const px of [x(began[i]), x(ended[i])]) if (px >= GUTTER && px <= wide) c.fillRect(px - 0.5, up.y + ROW, 1, low.y - up.y - ROW);
    }
    c.globalAlpha = 1;
  }

  function drawMark(c, i, colour, line) {
    const row = rows.find((one) => one.lane.number === E.track[i] && one.storey === placeOf[i]);
    if (!row || ended[i] < view.from || began[i] > view.to) return;
    const x0 = Math.max(x(began[i]), GUTTER), x1 = Math.max(x(ended[i]), x0 + 3);
    c.strokeStyle = colour;
    c.lineWidth = line;
    c.strokeRect(x0 - 1.5, row.y - 1.5, Math.min(x1, width()) - x0 + 3, ROW + 3);
    return x0;
  }

  drawers.push(() => {
    const [c, now] = sharp(canvas, height);
    wide = now;
    c.font = FONT;
    colours.on = isDark() ? "#10131a" : "#ffffff";
    for (const row of rows) drawRow(c, row, wide);
    const [marks, step] = rounds(view.from, view.to, Math.max(2, Math.floor((wide - GUTTER) / 150)));
    for (const t of marks) {
      const px = x(t), words = moment(t, step), size = c.measureText(words).width;
      c.fillStyle = colours.line;
      c.globalAlpha = 0.6;
      c.fillRect(px, TOP - 6, 1, height - TOP);
      c.globalAlpha = 1;
      c.fillStyle = colours.dim;
      c.textAlign = "left";
      c.textBaseline = "alphabetic";
      c.fillText(words, Math.min(Math.max(px - size / 2, GUTTER), wide - size), 13);
    }
    for (const lane of LANES) drawSteps(c, lane, wide);
    c.textBaseline = "middle";
    c.textAlign = "right";
    for (const row of rows) {
      c.fillStyle = colours.dim;
      const name = row.lane.vcpu ? NAMES[row.storey] : row.lane.name;
      c.font = row.lane.vcpu ? FONT : `600 ${FONT}`;
      c.fillText(name, GUTTER - 10, row.y + ROW / 2, GUTTER - 12);
    }
    c.font = `600 ${FONT}`;
    c.textAlign = "left";
    c.fillStyle = colours.ink;
    for (const lane of LANES) if (lane.vcpu) c.fillText(lane.name, 0, lane.top + ROW / 2, 52);
    if (!LANES.length) { c.fillStyle = colours.dim; c.fillText("No events.", GUTTER, 50); }
    if (hovered >= 0) drawMark(c, hovered, colours.ink, 1.5);
    if (selected >= 0) {
      const px = drawMark(c, selected, colours.accent, 3);
      if (px !== undefined) { c.fillStyle = colours.accent; c.fillRect(px - 0.5, TOP - 6, 1, height - TOP); }
    }
    byId("window").value = `${moment(view.from, (view.to - view.from) / 1e3)} to ${moment(view.to, (view.to - view.from) / 1e3)} (${duration(view.to - view.from)})`;
  });

  /** The event under the pointer, or the nearest in that row. */
  function hit(px, py) {
    const row = rows.find((one) => py >= one.y - GAP && py < one.y + ROW);
    if (!row || px < GUTTER) return -1;
    const list = row.lane.events, t = when(px), near = 6 * (view.to - view.from) / (width() - GUTTER);
    const middle = firstFrom(list, t);
    if (row.storey === -1) {
      const i = list[middle];
      return i !== undefined && began[i] - E.guest[i] <= t ? i : -1;
    }
    let best = -1, distance = near;
    const look = (at) => {
      const i = list[at];
      if (placeOf[i] !== row.storey || faded(i)) return;
      const far = t < began[i] ? began[i] - t : t > ended[i] ? t - ended[i] : 0;
      if (far <= distance) { distance = far; best = i; }
    };
    for (let at = middle - 1; at >= 0 && at > middle - 400; at--) look(at);
    for (let at = middle; at < list.length && began[list[at]] <= t + near && at < middle + 400; at++) look(at);
    return best;
  }

  function hover(event) {
    const i = hit(event.offsetX, event.offsetY);
    if (i !== hovered) { hovered = i; redraw(); }
    tip.style.display = i < 0 ? "none" : "block";
    if (i < 0) return;
    const reason = D.reasons[E.reason[i]], place = [text("place", i), text("code", i)].filter(Boolean).join("  ");
    fill(tip, el("b", {}, `${LANES.find((lane) => lane.number === E.track[i]).name}: ${wordsFor(i)}`), place && el("span", { class: "mono" }, place),
      el("i", {}, ` ${moment(began[i])}, took ${duration(E.took[i])}${placeOf[i] === KVM ? " in KVM" : ""}; ${text("detail", i) || hardwareWords(reason) || reason.name}`));
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18}px`;
  }

  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    drag = { px: event.offsetX, from: view.from, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) return hover(event);
    const by = event.offsetX - drag.px;
    if (Math.abs(by) > 3) drag.moved = true;
    if (!drag.moved) return;
    canvas.classList.add("grabbed");
    tip.style.display = "none";
    const span = view.to - view.from, from = Math.min(Math.max(drag.from - by * span / (width() - GUTTER), START), END - span);
    show(from, from + span);
  });
  const drop = (event) => {
    if (drag && !drag.moved && event.type === "pointerup") {
      const i = hit(event.offsetX, event.offsetY);
      if (i >= 0) go(i);
    }
    drag = null;
    canvas.classList.remove("grabbed");
  };
  canvas.addEventListener("pointerup", drop);
  canvas.addEventListener("pointercancel", drop);
  canvas.addEventListener("pointerleave", () => { hovered = -1; tip.style.display = "none"; redraw(); });

  // The wheel zooms, but not for who is only scrolling past.
  let scrolled = 0;
  addEventListener("wheel", (event) => { if (event.target !== canvas) scrolled = event.timeStamp; }, { passive: true });
  canvas.addEventListener("wheel", (event) => {
    if (event.timeStamp - scrolled < 350) { scrolled = event.timeStamp; return; }
    const whole = view.to - view.from >= (END - START) * 0.9999;
    if (whole && event.deltaY > 0) { scrolled = event.timeStamp; return; }
    event.preventDefault();
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) move(event.deltaX / (width() - GUTTER));
    else zoom(Math.exp(Math.max(-80, Math.min(80, event.deltaY)) * 0.004), Math.max(when(event.offsetX), view.from));
  }, { passive: false });
  canvas.addEventListener("dblclick", (event) => zoom(0.25, when(event.offsetX)));

  const ACTIONS = {
    left: () => move(-0.2), right: () => move(0.2), in: () => zoom(0.5), out: () => zoom(2), all: () => show(START, END),
    next: () => step(1), previous: () => step(-1),
  };
  const KEYS = { ArrowLeft: "left", ArrowRight: "right", "+": "in", "=": "in", "-": "out", 0: "all", Home: "all", n: "next", p: "previous" };
  for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", () => ACTIONS[button.dataset.do]());
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Escape") return close();
    const action = KEYS[event.key], chart = event.target.tagName === "CANVAS";
    // Arrows scroll tables, and are the lanes' only there; letters are free everywhere.
    if (!action || (!chart && !"np+-=0".includes(event.key))) return;
    event.preventDefault();
    ACTIONS[action]();
  });
  /** From the event that is told, or from the middle of the view, to the next one that is picked out. */
  function step(by) {
    let i = selected;
    if (i < 0) {
      const middle = (view.from + view.to) / 2;
      for (i = 0; i < N && began[i] < middle; i++);
      i -= by > 0 ? 1 : 0;
    }
    do i += by; while (i >= 0 && i < N && faded(i));
    if (i >= 0 && i < N) go(i);
  }
}
