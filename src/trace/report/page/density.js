// Exits over time: to the monitor upwards, inside KVM downwards, stacked by class; and the brush that chooses what the lanes show.

{
  const groups = PLACES.map((place) => {
    const of = (wanted) => D.density.reduce((sum, bin) => sum + bin[wanted], 0);
    const chips = place.classes.filter((wanted) => of(wanted) > 0).map((wanted) =>
      pickButton("class", wanted, "chip", el("i", { class: "swatch", style: `background:var(--c${wanted})` }), CLASSES[wanted], " ", el("b", {}, count(of(wanted)))));
    return chips.length ? el("div", { class: "group" }, el("span", {}, place.name), ...chips) : null;
  });
  fill(byId("legend"), ...groups);

  const canvas = byId("density");
  const GUTTER = 112, AXIS = 20;
  const both = D.run.has_kernel ? [true, true] : [true, false];
  const half = 84, height = (both[1] ? 2 : 1) * half + AXIS + 8;
  const most = [MONITOR, KVM].map((place) => Math.max(1, ...D.density.map((bin) => PLACES[place].classes.reduce((sum, one) => sum + bin[one], 0))));
  const x = (t, width) => GUTTER + (t - START) / (END - START) * (width - GUTTER - 8);
  const when = (px, width) => START + (px - GUTTER) / (width - GUTTER - 8) * (END - START);

  const draw = () => {
    const [c, width] = sharp(canvas, height);
    c.font = FONT;
    const base = half + 4, step = END / D.density.length;
    const [marks, every] = rounds(START, END, Math.max(2, Math.floor(width / 150)));
    c.fillStyle = colours.faint;
    for (const t of marks) c.fillRect(x(t, width), 4, 1, height - AXIS - 4);
    D.density.forEach((bin, at) => {
      const left = x(at * step, width), right = x((at + 1) * step, width);
      for (const place of [MONITOR, KVM]) {
        let y = base + (place === KVM ? 1 : 0);
        for (const wanted of PLACES[place].classes) {
          if (!bin[wanted]) continue;
          // The root: a burst of hundreds and a lone exit can both be seen.
          const sum = PLACES[place].classes.reduce((all, one) => all + bin[one], 0);
          const size = Math.sqrt(sum / most[place]) * (half - 4) * bin[wanted] / sum;
          c.globalAlpha = !focus || (focus.kind === "class" && focus.value === wanted) || (focus.kind === "reason" && D.reasons[focus.value].class === wanted) || ["symbol", "device"].includes(focus.kind) ? 1 : 0.15;
          c.fillStyle = colours.class[wanted];
          const tall = Math.max(size, 1);
          c.fillRect(left, place === MONITOR ? y - tall : y, Math.max(right - left + 0.3, 1), tall);
          y += place === MONITOR ? -tall : tall;
        }
      }
    });
    c.globalAlpha = 1;
    c.fillStyle = colours.line;
    c.fillRect(GUTTER, base, width - GUTTER - 8, 1);
    c.fillStyle = colours.dim;
    c.textAlign = "right";
    c.textBaseline = "middle";
    c.fillText("monitor", GUTTER - 10, base - half / 2 - 9);
    c.fillText(`up to ${count(most[0])}`, GUTTER - 10, base - half / 2 + 8);
    if (both[1]) {
      c.fillText("in KVM", GUTTER - 10, base + half / 2 - 9);
      c.fillText(`up to ${count(most[1])}`, GUTTER - 10, base + half / 2 + 8);
    }
    c.textBaseline = "alphabetic";
    for (const t of marks) {
      const label = moment(t, every), at = x(t, width), wide = c.measureText(label).width;
      c.textAlign = "left";
      c.fillText(label, Math.min(Math.max(at - wide / 2, GUTTER), width - wide - 2), height - 5);
    }
    // The brush.
    const [left, right] = [x(view.from, width), x(view.to, width)];
    if (view.to - view.from < (END - START) * 0.9999) {
      c.fillStyle = colours.card;
      c.globalAlpha = 0.6;
      c.fillRect(GUTTER, 0, left - GUTTER, height - AXIS);
      c.fillRect(right, 0, width - right, height - AXIS);
      c.globalAlpha = 1;
    }
    c.strokeStyle = colours.accent;
    c.lineWidth = 1.5;
    c.strokeRect(left, 1, Math.max(right - left, 2), height - AXIS - 1);
    c.fillStyle = colours.accent;
    for (const edge of [left, right]) c.fillRect(edge - 2.5, base - 14, 5, 28);
    if (selected >= 0) {
      c.fillStyle = colours.ink;
      c.fillRect(x(began[selected], width) - 0.75, 0, 1.5, height - AXIS);
    }
  };
  drawers.push(draw);
  canvas.setAttribute("aria-label", `Exits over time, in steps of ${duration(END / D.density.length)}; at most ${plural(most[0], "exit")} to the monitor and ${count(most[1])} in KVM in a step. Arrows move the brush, plus and minus change it.`);

  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    const width = canvas.clientWidth, px = event.offsetX, at = when(px, width);
    const whole = view.to - view.from >= (END - START) * 0.9999;
    const edges = [x(view.from, width), x(view.to, width)].map((edge) => Math.abs(edge - px));
    canvas.setPointerCapture(event.pointerId);
    if (!whole && edges[0] < 7) drag = { fixed: view.to };
    else if (!whole && edges[1] < 7) drag = { fixed: view.from };
    else if (!whole && at > view.from && at < view.to) drag = { held: at - view.from };
    else drag = { fixed: at, px };
    event.preventDefault();
    canvas.focus({ preventScroll: true });
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const at = Math.min(Math.max(when(event.offsetX, canvas.clientWidth), START), END);
    if (drag.held !== undefined) {
      const span = view.to - view.from, from = Math.min(Math.max(at - drag.held, START), END - span);
      show(from, from + span);
    } else if (drag.px === undefined || Math.abs(event.offsetX - drag.px) > 3) {
      drag.px = undefined;
      show(Math.min(drag.fixed, at), Math.max(drag.fixed, at));
    }
  });
  const drop = () => { drag = null; };
  canvas.addEventListener("pointerup", drop);
  canvas.addEventListener("pointercancel", drop);
  canvas.addEventListener("dblclick", () => show(START, END));
}
