// Draws each <figure class="chart"> of the page as SVG from the JSON inside it. No libraries, nothing fetched.
// Colours are CSS classes of page.css, so a change of theme needs no drawing anew. Values show under the pointer.
"use strict";
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  document.body.append(tip);

  // ---- small things ----

  function add(parent, name, attributes = {}, text = null) {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) if (value != null) node.setAttribute(key, value);
    if (text != null) node.textContent = text;
    parent.append(node);
    return node;
  }

  function sheet(parent, width, height, label) {
    const svg = add(parent, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    svg.setAttribute("aria-label", label);
    return svg;
  }

  function show(value) {
    if (value == null) return "no value";
    const size = Math.abs(value);
    if (size >= 1e4) return value.toLocaleString("en", { maximumFractionDigits: 0 });
    return String(Number(value.toPrecision(4))).replace("-", "−");
  }

  const span = (row) => (row.low == null ? "" : ` [${show(row.low)}, ${show(row.high)}]`);
  const short = (text, n) => (text.length > n ? text.slice(0, n - 1) + "…" : text);
  const known = (values) => values.filter((v) => v != null);
  const bounds = (values) => known(values).reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);

  // ---- the pointer: `find(x, y)` in the drawing's own units gives {text, box} or null ----

  function hover(svg, find) {
    const ring = add(svg, "rect", { class: "focus" });
    svg.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const found = find(at.x, at.y);
      ring.style.visibility = tip.style.visibility = found ? "visible" : "hidden";
      if (!found) return;
      const [x, y, width, height] = found.box;
      for (const [key, value] of Object.entries({ x, y, width, height })) ring.setAttribute(key, value);
      tip.textContent = found.text;
      const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6);
      const below = event.clientY + 16 + tip.offsetHeight < innerHeight;
      tip.style.left = `${Math.max(left, 4)}px`;
      tip.style.top = `${below ? event.clientY + 16 : event.clientY - tip.offsetHeight - 10}px`;
    });
    svg.addEventListener("pointerleave", () => { ring.style.visibility = tip.style.visibility = "hidden"; });
  }

  const nearest = (points, describe) => (x, y) => {
    let best = null, least = 30 * 30;
    for (const p of points) {
      const far = (p.px - x) ** 2 + (p.py - y) ** 2;
      if (far < least) [best, least] = [p, far];
    }
    return best && { text: describe(best), box: [best.px - 5, best.py - 5, 10, 10] };
  };

  // ---- matrices ----

  function paint(svg, values, [low, high], x0, y0, w, h, diverging) {
    values.forEach((row, i) => row.forEach((value, j) => {
      const at = { x: x0 + j * w, y: y0 + i * h, width: w, height: h };
      if (value == null) { // crossed out: grey alone could be a small value
        const [x, y] = [at.x + w / 2, at.y + h / 2];
        add(svg, "rect", { ...at, class: "none" });
        add(svg, "path", { d: `M${x - 3} ${y - 3}l6 6m0-6l-6 6`, class: "zero" });
        return;
      }
      const part = diverging ? value / high : (value - low) / (high - low);
      const share = Math.min(Math.max(diverging ? Math.abs(part) : part, 0), 1);
      if (share > 0.002) add(svg, "rect", { ...at, class: part < 0 ? "neg" : "pos", "fill-opacity": share.toFixed(3) });
    }));
  }

  function colourBar(svg, x, y, height, [low, high], diverging, label) {
    const n = 40, step = height / n;
    for (let i = 0; i < n; i++) {
      const part = 1 - (i + 0.5) / n, value = diverging ? 2 * part - 1 : part;
      add(svg, "rect", { x, y: y + i * step, width: 10, height: step + 0.3, class: value < 0 ? "neg" : "pos",
        "fill-opacity": Math.abs(value).toFixed(3) });
    }
    add(svg, "rect", { x, y, width: 10, height, class: "frame" });
    for (const [value, at] of [[high, y + 8], [(low + high) / 2, y + height / 2 + 4], [low, y + height]])
      add(svg, "text", { x: x + 14, y: at, class: "tick" }, show(value));
    add(svg, "text", { transform: `translate(${x + 58} ${y + height / 2}) rotate(90)`, "text-anchor": "middle" }, label);
  }

  const every = (n, room) => [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => n / step <= room) || n;

  function heatmap(figure, d) {
    const n = d.values.length, m = d.values[0].length;
    const rows = d.rows || d.values.map((_, i) => String(i)), columns = d.columns || d.values[0].map((_, i) => String(i));
    const w = Math.min(Math.max(560 / m, 8), 34), h = Math.min(Math.max(420 / n, 11), 24);
    const upright = Math.max(...columns.map((c) => c.length)) * 6.5 > w && d.columns != null;
    const left = 26 + Math.min(Math.max(...rows.map((r) => r.length)), 22) * 6.2;
    const under = (upright ? Math.min(Math.max(...columns.map((c) => c.length)), 22) * 6.2 + 10 : 18) + (d.column_label ? 18 : 0);
    const top = 6, height = Math.max(n * h, 60), svg = sheet(figure, left + m * w + 90, top + height + under, d.title || "heatmap");
    paint(svg, d.values, d.limits, left, top, w, h, d.diverging);
    add(svg, "rect", { x: left, y: top, width: m * w, height: n * h, class: "frame" });
    for (const [i, j] of d.marks) add(svg, "rect", { x: left + j * w + 1, y: top + i * h + 1, width: w - 2, height: h - 2, class: "mark" });
    if (d.border.length) {
      const inside = add(svg, "svg", { x: left, y: top, width: m * w, height: n * h }); // what leaves the cells is cut off
      const way = d.border.map(([i, j]) => `${((j + 0.5) * w).toFixed(1)} ${((i + 0.5) * h).toFixed(1)}`);
      add(inside, "path", { d: `M${way.join("L")}`, class: "border" });
    }
    const down = d.rows ? 1 : every(n, n * h / 13), across = d.columns ? 1 : every(m, m * w / 22);
    rows.forEach((name, i) => i % down === 0 &&
      add(svg, "text", { x: left - 4, y: top + (i + 0.5) * h + 3.5, class: "tick", "text-anchor": "end" }, short(name, 22)));
    columns.forEach((name, j) => {
      if (j % across) return;
      const x = left + (j + 0.5) * w, y = top + n * h;
      if (upright) add(svg, "text", { transform: `translate(${x + 3.5} ${y + 5}) rotate(-90)`, class: "tick", "text-anchor": "end" }, short(name, 22));
      else add(svg, "text", { x, y: y + 12, class: "tick", "text-anchor": "middle" }, name);
    });
    add(svg, "text", { x: left + m * w / 2, y: top + n * h + under - 4, "text-anchor": "middle" }, d.column_label);
    add(svg, "text", { transform: `translate(11 ${top + n * h / 2}) rotate(-90)`, "text-anchor": "middle" }, d.row_label);
    colourBar(svg, left + m * w + 12, top, Math.min(height, 220), d.limits, d.diverging, d.value_label);
    hover(svg, (x, y) => {
      const j = Math.floor((x - left) / w), i = Math.floor((y - top) / h);
      if (i < 0 || j < 0 || i >= n || j >= m) return null;
      const where = `${d.row_label || "row"} ${rows[i]}, ${d.column_label || "column"} ${columns[j]}`;
      return { text: `${where}\n${d.value_label} ${show(d.values[i][j])}`.trim(), box: [left + j * w, top + i * h, w, h] };
    });
    return [["", ...columns], ...d.values.map((row, i) => [rows[i], ...row.map(show)])];
  }

  function patterns(figure, d) {
    const n = d.values[0].length, tokens = d.tokens || d.values[0].map((_, i) => String(i));
    const size = Math.min(Math.max(n * 9, 150), 300), cell = size / n, margin = d.tokens ? Math.min(Math.max(...tokens.map((t) => t.length)), 12) * 6 + 6 : 22;
    const grid = figure.appendChild(document.createElement("div"));
    grid.className = "grid";
    const step = every(n, size / (d.tokens ? 9 : 24));
    d.values.forEach((pattern, k) => {
      const svg = sheet(grid, margin + size + 4, 16 + size + margin, `${d.value_label} of ${d.names[k]}`);
      add(svg, "text", { x: margin + size / 2, y: 11, "text-anchor": "middle" }, d.names[k]);
      paint(svg, pattern, [0, 1], margin, 16, cell, cell, false);
      add(svg, "rect", { x: margin, y: 16, width: size, height: size, class: "frame" });
      for (let i = 0; i < n; i += step) {
        const at = (i + 0.5) * cell, word = short(tokens[i], 12);
        add(svg, "text", { x: margin - 3, y: 16 + at + 3.5, class: "tick", "text-anchor": "end" }, word);
        add(svg, "text", { transform: `translate(${margin + at + 3.5} ${16 + size + 4}) rotate(-90)`, class: "tick", "text-anchor": "end" }, word);
      }
      hover(svg, (x, y) => {
        const j = Math.floor((x - margin) / cell), i = Math.floor((y - 16) / cell);
        if (i < 0 || j < 0 || i >= n || j >= n) return null;
        const text = `${d.names[k]}: from ${i} ${d.tokens ? tokens[i] : ""} to ${j} ${d.tokens ? tokens[j] : ""}\n${d.value_label} ${show(pattern[i][j])}`;
        return { text, box: [margin + j * cell, 16 + i * cell, cell, cell] };
      });
    });
    return null; // as many numbers as these are read better from the JSON
  }

  // ---- directions in the plane, a small square of arrows for each panel ----

  function directions(figure, d) {
    const names = d.groups ? [...new Set(d.groups.flat())] : [], size = 150, half = size / 2, scale = half / d.limit;
    if (names.length > 1) {
      const svg = sheet(figure, W, lines(names) * 16 + 6, "legend");
      legend(svg, names, 9, (i, x, y) => add(svg, "path", { d: `M${x} ${y}h20`, stroke: colour(i), "stroke-width": 2, "stroke-dasharray": DASHES[i % 7] || null }));
    }
    const grid = figure.appendChild(document.createElement("div")), rows = [["", "", "x", "y"]];
    grid.className = "grid";
    d.panels.forEach((panel, k) => {
      const svg = sheet(grid, size + 4, size + 20, d.names[k]), points = [];
      add(svg, "text", { x: half + 2, y: 11, "text-anchor": "middle" }, d.names[k]);
      const mid = [half + 2, 16 + half];
      add(svg, "rect", { x: 2, y: 16, width: size, height: size, class: "frame" });
      add(svg, "path", { d: `M2 ${mid[1]}h${size}M${mid[0]} 16v${size}`, class: "rule" });
      panel.forEach(([x, y], i) => {
        const group = d.groups ? d.groups[k][i] : "", g = Math.max(names.indexOf(group), 0);
        const p = { px: mid[0] + x * scale, py: mid[1] - y * scale, x, y, name: d.labels ? d.labels[k][i] : String(i), group };
        add(svg, "path", { d: `M${mid[0]} ${mid[1]}L${p.px.toFixed(1)} ${p.py.toFixed(1)}`, stroke: colour(g), "stroke-width": 1.6, "stroke-dasharray": DASHES[g % 7] || null });
        add(svg, "path", { d: SHAPES[g % 7], transform: `translate(${p.px.toFixed(1)} ${p.py.toFixed(1)}) scale(0.8)`, fill: colour(g), stroke: g % 7 === 6 ? colour(g) : null });
        points.push(p);
        rows.push([d.names[k], `${p.name}${group ? ` (${group})` : ""}`, show(x), show(y)]);
      });
      hover(svg, nearest(points, (p) => `${p.name}${p.group ? ` (${p.group})` : ""}\n${show(p.x)}, ${show(p.y)}\nlength ${show(Math.hypot(p.x, p.y))}`));
    });
    return rows;
  }

  // ---- axes of numbers ----

  function axis(low, high, from, to, log) {
    if (!(low < high)) [low, high] = log ? [low / 2, low * 2] : [low - 0.5, low + 0.5];
    const f = log ? Math.log10 : (v) => v, [a, b] = [f(low), f(high)];
    const at = (v) => from + ((f(v) - a) / (b - a)) * (to - from);
    const marks = [];
    if (log) {
      const steps = b - a < 2 ? [1, 2, 5] : [1];
      for (let e = Math.floor(a); e <= b; e++) for (const s of steps) marks.push(s * 10 ** e);
    } else {
      const rough = (b - a) / 8, unit = 10 ** Math.floor(Math.log10(rough));
      const step = unit * [1, 2, 5, 10].find((s) => s * unit >= rough);
      for (let i = Math.ceil(a / step); i * step <= b + step * 1e-9; i++) marks.push(i * step);
    }
    return { at, marks: marks.filter((v) => f(v) >= a - 1e-9 && f(v) <= b + 1e-9) };
  }

  const W = 640, L = 62, R = W - 14;

  function frame(svg, x, y, top, foot, xLabel, yLabel) {
    for (const v of y ? y.marks : []) {
      add(svg, "path", { d: `M${L} ${y.at(v)}H${R}`, class: "rule" });
      add(svg, "text", { x: L - 5, y: y.at(v) + 3.5, class: "tick", "text-anchor": "end" }, show(v));
    }
    for (const v of x ? x.marks : []) {
      add(svg, "path", { d: `M${x.at(v)} ${top}V${foot}`, class: "rule" });
      add(svg, "text", { x: x.at(v), y: foot + 13, class: "tick", "text-anchor": "middle" }, show(v));
    }
    add(svg, "text", { x: (L + R) / 2, y: foot + 30, "text-anchor": "middle" }, xLabel);
    add(svg, "text", { transform: `translate(13 ${(top + foot) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel);
  }

  const colour = (i) => `var(--s${i % 7})`;
  const DASHES = ["", "6 3", "1.5 2.5", "6 2 1.5 2", "10 2", "8 2 1.5 2 1.5 2", "1.5 1.5"];
  const SHAPES = ["M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0", "M-3-3h6v6h-6z", "M0-4L4 3H-4z", "M0-4.5L4.5 0L0 4.5L-4.5 0z",
    "M0 4L4-3H-4z", "M-1.3-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z", "M-3.5-3.5L3.5 3.5M-3.5 3.5L3.5-3.5"];

  function legend(svg, names, y, symbol) {
    let x = L;
    names.forEach((name, i) => {
      const wide = 34 + name.length * 6.2;
      if (x + wide > R && x > L) [x, y] = [L, y + 16];
      symbol(i, x, y);
      add(svg, "text", { x: x + 24, y: y + 4 }, name);
      x += wide;
    });
  }

  // How many lines a legend takes, so that the drawing begins below it.
  function lines(names) {
    let x = L, n = 1;
    for (const name of names) {
      const wide = 34 + name.length * 6.2;
      if (x + wide > R && x > L) [x, n] = [L, n + 1];
      x += wide;
    }
    return n;
  }

  function lineChart(figure, d) {
    const names = d.series.length > 1 ? d.series.map((s) => s.name) : [];
    const top = 10 + (names.length ? lines(names) * 16 + 4 : 0), foot = top + 250, svg = sheet(figure, W, foot + 38, d.title || "lines");
    const pad = ([a, b], log) => (log ? [a, b] : [a - (b - a) * 0.04, b + (b - a) * 0.04]);
    const [xs, ys] = [d.x_scale === "log", d.y_scale === "log"];
    const xr = bounds([...d.series.flatMap((s) => s.x), ...d.at.map(([v]) => v)]);
    const low = d.series.flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])]).filter((v) => !ys || v > 0);
    const x = axis(...xr, L, R, xs), y = axis(...pad(bounds(low), ys), foot, top, ys);
    frame(svg, x, y, top, foot, d.x_label, d.y_label);
    const points = [];
    d.series.forEach((s, i) => {
      if (s.low) {
        const ok = s.x.map((v, k) => k).filter((k) => s.low[k] != null && s.high[k] != null && s.x[k] != null);
        const edge = (k, v) => `${x.at(s.x[k]).toFixed(1)} ${Math.min(Math.max(y.at(v), top), foot).toFixed(1)}`;
        const there = ok.map((k) => edge(k, s.high[k])), back = [...ok].reverse().map((k) => edge(k, s.low[k]));
        if (ok.length) add(svg, "path", { d: `M${[...there, ...back].join("L")}Z`, fill: colour(i), "fill-opacity": 0.18 });
      }
      let path = "", gap = true;
      s.y.forEach((value, k) => {
        if (value == null || s.x[k] == null) { gap = true; return; }
        const p = { px: x.at(s.x[k]), py: y.at(value), name: s.name, x: s.x[k], y: value, low: s.low && s.low[k], high: s.high && s.high[k], i };
        path += `${gap ? "M" : "L"}${p.px.toFixed(1)} ${p.py.toFixed(1)}`;
        gap = false;
        points.push(p);
      });
      add(svg, "path", { d: path || null, fill: "none", stroke: colour(i), "stroke-width": 1.7, "stroke-dasharray": DASHES[i % 7] || null });
      if (s.y.length <= 40) for (const p of points) if (p.i === i) add(svg, "circle", { cx: p.px, cy: p.py, r: 2.4, fill: colour(i) });
    });
    for (const [v, name] of d.at) {
      add(svg, "path", { d: `M${x.at(v)} ${top}V${foot}`, class: "aid" });
      const near = x.at(v) > W * 0.75;
      add(svg, "text", { x: x.at(v) + (near ? -4 : 4), y: top + 10, class: "tick", "text-anchor": near ? "end" : null }, name);
    }
    legend(svg, names, 10, (i, lx, ly) =>
      add(svg, "path", { d: `M${lx} ${ly}h20`, stroke: colour(i), "stroke-width": 2, "stroke-dasharray": DASHES[i % 7] || null }));
    hover(svg, nearest(points, (p) => `${p.name}\n${d.x_label || "x"} ${show(p.x)}\n${d.y_label || "y"} ${show(p.y)}${span(p)}`));
    return [["series", d.x_label || "x", d.y_label || "y", ...(d.series.some((s) => s.low) ? ["low", "high"] : [])],
      ...points.map((p) => [p.name, show(p.x), show(p.y), ...(p.low == null ? [] : [show(p.low), show(p.high)])])];
  }

  function bars(figure, d) {
    const n = d.values.length, groups = d.groups ? [...new Set(d.groups)] : [];
    const top = 8 + (groups.length ? lines(groups) * 16 + 4 : 0);
    const longest = Math.min(Math.max(...d.labels.map((t) => t.length)), 34) * 6.2;
    const [a, b] = bounds([0, ...d.values, ...(d.low || []), ...(d.high || [])]), room = (b - a || 1) * 0.05;
    const range = [a < 0 ? a - room : 0, b > 0 ? b + room : 0];
    const rows = d.values.map((value, i) => ({ value, label: d.labels[i], group: d.groups ? d.groups[i] : "",
      low: d.low && d.low[i], high: d.high && d.high[i], i }));
    const fill = (row) => colour(Math.max(groups.indexOf(row.group), 0));
    let svg, box;
    if (d.horizontal) {
      const left = longest + 12, h = 20, foot = top + n * h;
      svg = sheet(figure, W, foot + 38, d.title || "bars");
      const x = axis(...range, left, R, false);
      for (const v of x.marks) {
        add(svg, "path", { d: `M${x.at(v)} ${top}V${foot}`, class: "rule" });
        add(svg, "text", { x: x.at(v), y: foot + 13, class: "tick", "text-anchor": "middle" }, show(v));
      }
      add(svg, "text", { x: (left + R) / 2, y: foot + 30, "text-anchor": "middle" }, d.value_label);
      for (const row of rows) {
        const y = top + row.i * h, ends = [x.at(0), x.at(row.value || 0)].sort((p, q) => p - q);
        add(svg, "text", { x: left - 5, y: y + 14, class: "tick", "text-anchor": "end" }, short(row.label, 34));
        add(svg, "rect", { x: ends[0], y: y + 3, width: ends[1] - ends[0], height: h - 6, fill: fill(row) });
        if (row.low != null) add(svg, "path", { d: `M${x.at(row.low)} ${y + 6}v8m0-4H${x.at(row.high)}m0-4v8`, class: "whisker" });
      }
      add(svg, "path", { d: `M${x.at(0)} ${top}V${foot}`, class: "zero" });
      box = (px, py) => { const i = Math.floor((py - top) / h); return px > 0 && i >= 0 && i < n ? [i, [left, top + i * h, R - left, h]] : null; };
    } else {
      const w = Math.min((R - L) / n, 60), foot = top + 220, upright = longest > w;
      svg = sheet(figure, W, foot + (upright ? longest : 14) + 14, d.title || "bars");
      const y = axis(...range, foot, top, false);
      frame(svg, null, y, top, foot, "", d.value_label);
      for (const row of rows) {
        const x = L + row.i * w, ends = [y.at(0), y.at(row.value || 0)].sort((p, q) => p - q), mid = x + w / 2;
        const place = upright ? { transform: `translate(${mid + 3.5} ${foot + 5}) rotate(-90)`, "text-anchor": "end" } : { x: mid, y: foot + 13, "text-anchor": "middle" };
        add(svg, "text", { ...place, class: "tick" }, short(row.label, 34));
        add(svg, "rect", { x: x + w * 0.14, y: ends[0], width: w * 0.72, height: ends[1] - ends[0], fill: fill(row) });
        if (row.low != null) add(svg, "path", { d: `M${mid - 4} ${y.at(row.low)}h8m-4 0V${y.at(row.high)}m-4 0h8`, class: "whisker" });
      }
      add(svg, "path", { d: `M${L} ${y.at(0)}H${R}`, class: "zero" });
      box = (px, py) => { const i = Math.floor((px - L) / w); return py > 0 && i >= 0 && i < n ? [i, [L + i * w, top, w, foot - top]] : null; };
    }
    legend(svg, groups, 9, (i, x, y) => add(svg, "rect", { x: x + 4, y: y - 5, width: 12, height: 10, fill: colour(i) }));
    hover(svg, (px, py) => {
      const found = box(px, py), row = found && rows[found[0]];
      return row && { text: `${row.label}${row.group ? ` (${row.group})` : ""}\n${d.value_label} ${show(row.value)}${span(row)}`, box: found[1] };
    });
    return [["", d.value_label || "value", ...(d.low ? ["low", "high"] : []), ...(d.groups ? ["group"] : [])],
      ...rows.map((r) => [r.label, show(r.value), ...(d.low ? [show(r.low), show(r.high)] : []), ...(d.groups ? [r.group] : [])])];
  }

  function scatter(figure, d) {
    const groups = d.groups ? [...new Set(d.groups)] : [], top = 8 + (groups.length ? lines(groups) * 16 + 4 : 0);
    const foot = top + (d.diagonal ? 420 : 320), svg = sheet(figure, W, foot + 38, d.title || "scatter");
    const pad = ([a, b]) => [a - (b - a) * 0.05, b + (b - a) * 0.05];
    const both = d.diagonal ? pad(bounds([...d.x, ...d.y])) : null;
    const x = axis(...(both || pad(bounds(d.x))), L, R, false), y = axis(...(both || pad(bounds(d.y))), foot, top, false);
    frame(svg, x, y, top, foot, d.x_label, d.y_label);
    if (both) add(svg, "path", { d: `M${x.at(both[0])} ${y.at(both[0])}L${x.at(both[1])} ${y.at(both[1])}`, class: "aid" });
    const symbol = (g, px, py) => add(svg, "path", { d: SHAPES[g % 7], transform: `translate(${px.toFixed(1)} ${py.toFixed(1)})`,
      fill: colour(g), stroke: g % 7 === 6 ? colour(g) : null, "fill-opacity": 0.8 });
    const points = d.x.map((v, i) => ({ x: v, y: d.y[i], i, g: d.groups ? groups.indexOf(d.groups[i]) : 0 }))
      .filter((p) => p.x != null && p.y != null).map((p) => ({ ...p, px: x.at(p.x), py: y.at(p.y) }));
    if (d.joined) for (let g = 0; g < Math.max(groups.length, 1); g++) {
      const path = points.filter((p) => p.g === g).sort((a, b) => a.x - b.x).map((p) => `${p.px.toFixed(1)} ${p.py.toFixed(1)}`);
      if (path.length > 1) add(svg, "path", { d: `M${path.join("L")}`, fill: "none", stroke: colour(g), "stroke-opacity": 0.6 });
    }
    for (const p of points) symbol(p.g, p.px, p.py);
    for (const p of points) if (d.named.includes(p.i)) add(svg, "text", { x: p.px + 5, y: p.py - 4 }, d.labels[p.i]);
    legend(svg, groups, 9, (g, lx, ly) => symbol(g, lx + 10, ly));
    const name = (p) => [d.labels && d.labels[p.i], d.groups && `(${d.groups[p.i]})`].filter(Boolean).join(" ");
    hover(svg, nearest(points, (p) => `${name(p)}\n${d.x_label || "x"} ${show(p.x)}\n${d.y_label || "y"} ${show(p.y)}`.trim()));
    return [["", d.x_label || "x", d.y_label || "y"], ...points.map((p) => [name(p), show(p.x), show(p.y)])];
  }

  // ---- all figures of the page, and their numbers as tables for who cannot see or point ----

  function table(figure, rows) {
    const details = figure.appendChild(document.createElement("details"));
    details.appendChild(document.createElement("summary")).textContent = "Numbers";
    details.addEventListener("toggle", () => {
      const wide = details.appendChild(document.createElement("div"));
      wide.className = "wide";
      const body = wide.appendChild(document.createElement("table"));
      rows.forEach((row, i) => row.forEach((cell) => {
        if (body.rows.length === i) body.insertRow();
        body.rows[i].appendChild(document.createElement(i ? "td" : "th")).textContent = cell;
      }));
    }, { once: true });
  }

  const DRAW = { heatmap, patterns, directions, lines: lineChart, bars, scatter };
  for (const figure of document.querySelectorAll("figure.chart")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const numbers = DRAW[data.kind](figure, data);
    if (numbers) table(figure, numbers);
  }
})();
