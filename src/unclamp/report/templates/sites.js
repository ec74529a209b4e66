"use strict";
// The table of all sites and a site's panel. The data lie in the page; nothing is fetched.
(() => {
  const data = JSON.parse(document.getElementById("sites-data").textContent);
  const el = (id) => document.getElementById(id);
  const ROW = 28, AHEAD = 12;
  const box = el("sites"), head = box.querySelector("thead"), body = box.querySelector("tbody");
  const input = el("filter"), panel = el("panel");
  const state = { sort: null, down: true, role: "all", clamped: false, shown: [], at: -1, open: null };

  // How a value is written ------------------------------------------------------------------
  const exponent = (v) => v.toExponential(1).replace("e+", "e"); // 1.9e29
  const figures = (v) => (v === 0 ? "0" : v >= 1e5 || v < 1e-3 ? exponent(v) : String(Number(v.toPrecision(3))));
  const write = {
    name: (v) => v, text: (v) => v, scaling: (v) => v,
    count: (v) => v.toLocaleString("en-US"), step: (v) => v.toLocaleString("en-US"),
    share: (v) => figures(100 * v) + " %", ratio: (v) => (v >= 1e5 || (v > 0 && v < 1e-3) ? exponent(v) : v.toFixed(2)) + "x",
    decibel: (v) => v.toFixed(1), price: (v) => (v < 0 ? "-" : "") + figures(Math.abs(v)),
  };
  const things = (n, noun, more = noun + "s") => `${write.count(n)} ${n === 1 ? noun : more}`;
  const missing = (v) => v === null || v === undefined;
  const title = (site) => `${site.fqn || "(the model itself)"} ${site.role}`;
  const short = (name, width) => {
    if (name.length <= width) return name;
    const tail = Math.floor(((width - 1) * 2) / 3);
    return name.slice(0, width - 1 - tail) + "…" + name.slice(-tail);
  };
  const node = (tag, attributes = {}, text = "") => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    return made;
  };

  // Filter and order ------------------------------------------------------------------------
  const rows = data.sites.map((site) => ({
    site, text: `${title(site)} ${site.scaling} ${site.format}${site.only_counted ? " only counted" : ""}`.toLowerCase(),
  }));
  const test = (word) => {
    if (!/[*?]/.test(word)) return (text) => text.includes(word);
    const escaped = word.replace(/[.+^${}()|[\]\\]/g, "\\$&");
    const glob = new RegExp(escaped.replaceAll("*", "\\S*").replaceAll("?", "\\S"));
    return (text) => glob.test(text);
  };
  const compare = (key, down) => (a, b) => {
    const x = a.site[key], y = b.site[key];
    if (missing(x) || missing(y)) return missing(x) - missing(y); // what is missing goes last
    const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
    return down ? -order : order;
  };
  const update = () => {
    const began = performance.now();
    const tests = input.value.toLowerCase().split(/\s+/).filter(Boolean).map(test);
    const chosen = state.at >= 0 ? state.shown[state.at] : null;
    state.shown = rows.filter(({ site, text }) =>
      (state.role === "all" || site.role === state.role) &&
      (!state.clamped || (site.clamped_casts > 0 && !site.only_counted)) && tests.every((matches) => matches(text)));
    if (state.sort) state.shown.sort(compare(state.sort, state.down));
    state.at = state.shown.indexOf(chosen);
    el("count").textContent = `${write.count(state.shown.length)} of ${things(rows.length, "site")}`;
    box.querySelector("table").setAttribute("aria-rowcount", state.shown.length + 1);
    if (state.at < 0) box.scrollTop = 0;
    draw();
    box.dataset.updateMs = (performance.now() - began).toFixed(1);
  };

  // The table: only the rows in view exist ---------------------------------------------------
  const columns = data.columns.map(([key, label, kind, meaning]) => ({ key, label, kind, meaning }));
  const headings = columns.map(({ key, label, kind, meaning }) => {
    const th = node("th", { scope: "col", "aria-sort": "none", title: meaning });
    const button = node("button", { type: "button", "data-key": key, "aria-description": meaning }, label);
    button.addEventListener("click", () => {
      const falls = !["name", "text", "scaling"].includes(kind);
      state.down = state.sort === key ? !state.down : falls;
      state.sort = key;
      headings.forEach((h, i) => {
        const sorted = columns[i].key === key;
        h.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
        h.firstChild.textContent = columns[i].label + (sorted ? (state.down ? " ▼" : " ▲") : "");
      });
      update();
    });
    th.append(button);
    return th;
  });
  const headRow = node("tr", { "aria-rowindex": 1 });
  headRow.append(...headings);
  head.append(headRow);

  const cell = (site, { key, kind }) => {
    const value = site[key];
    const td = node("td", {}, missing(value) ? "-" : write[kind](value));
    if (kind === "name") {
      td.textContent = short(value || "(the model itself)", window.innerWidth < 600 ? 19 : 44);
      td.title = value;
    }
    if (kind === "scaling") {
      td.textContent = `${value} ${site.format}`;
      if (site.granularity && site.granularity !== "tensor") td.textContent += ` ${site.granularity}`;
      if (site.only_counted) {
        td.append(" ", node("span", { class: "note", title: "nothing is computed from these casts" }, "only counted"));
      }
      if (site.switched.length) {
        const steps = site.switched.map((s) => s.toLocaleString("en-US"));
        const more = steps.length > 2 ? `, ${steps.length - 2} more` : "";
        td.append(" ", node("span", { class: "note", title: steps.join(", ") },
          `switched at step ${steps.slice(0, 2).join(", ")}${more}`));
      }
    }
    return td;
  };
  const space = (height) => {
    const tr = node("tr", { "aria-hidden": "true" });
    tr.append(node("td", { class: "space", colspan: columns.length, style: `height:${height}px` }));
    return tr;
  };
  const draw = () => {
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - AHEAD);
    const last = Math.min(state.shown.length, first + Math.ceil(box.clientHeight / ROW) + 2 * AHEAD);
    const made = [];
    if (first > 0) made.push(space(first * ROW));
    for (let i = first; i < last; i++) {
      const tr = node("tr", { class: "site", id: `row-${i}`, "aria-rowindex": i + 2, "aria-selected": i === state.at });
      tr.dataset.at = i;
      tr.append(...columns.map((column) => cell(state.shown[i].site, column)));
      made.push(tr);
    }
    if (last < state.shown.length) made.push(space((state.shown.length - last) * ROW));
    body.replaceChildren(...made);
    if (state.at >= first && state.at < last) box.setAttribute("aria-activedescendant", `row-${state.at}`);
    else box.removeAttribute("aria-activedescendant");
  };
  let waiting = false;
  box.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  });
  window.addEventListener("resize", draw);
  body.addEventListener("click", (event) => {
    const tr = event.target.closest("tr.site");
    if (!tr) return;
    state.at = Number(tr.dataset.at);
    draw();
    open(state.shown[state.at].site);
  });

  // Keyboard -----------------------------------------------------------------------------------
  const move = (by) => {
    if (!state.shown.length) return;
    const from = state.at < 0 && by < 0 ? state.shown.length : state.at;
    state.at = Math.min(state.shown.length - 1, Math.max(0, from + by));
    const top = state.at * ROW, room = box.clientHeight - head.offsetHeight;
    if (top < box.scrollTop) box.scrollTop = top;
    if (top + ROW > box.scrollTop + room) box.scrollTop = top + ROW - room;
    draw();
  };
  const clear = () => {
    const filtered = input.value || state.role !== "all" || state.clamped;
    input.value = "";
    setRole("all");
    setClamped(false);
    if (!filtered) close();
    update();
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inside = box.contains(document.activeElement), typing = document.activeElement === input;
    if (event.key === "/" && !typing) { event.preventDefault(); input.focus(); input.select(); }
    else if (event.key === "Escape") { event.preventDefault(); clear(); }
    else if (!inside && !typing) return;
    else if (event.key === "ArrowDown") { event.preventDefault(); move(1); }
    else if (event.key === "ArrowUp") { event.preventDefault(); move(-1); }
    else if (event.key === "PageDown") { event.preventDefault(); move(10); }
    else if (event.key === "PageUp") { event.preventDefault(); move(-10); }
    else if (event.key === "Enter" && document.activeElement.tagName !== "BUTTON") {
      if (state.at < 0) move(1);
      if (state.at >= 0) open(state.shown[state.at].site);
    }
  });
  input.addEventListener("input", update);
  const roles = [...document.querySelectorAll("#controls [data-role]")];
  const setRole = (role) => {
    state.role = role;
    roles.forEach((b) => b.setAttribute("aria-pressed", b.dataset.role === role));
  };
  const setClamped = (only) => {
    state.clamped = only;
    el("clamped").setAttribute("aria-pressed", only);
  };
  roles.forEach((b) => b.addEventListener("click", () => { setRole(b.dataset.role); update(); }));
  el("clamped").addEventListener("click", () => { setClamped(!state.clamped); update(); });

  // The panel ----------------------------------------------------------------------------------
  const FONT = { family: "system-ui, sans-serif", size: 12 };
  const CLEAR = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
  const config = { displaylogo: false, responsive: true };
  const close = () => {
    panel.hidden = true;
    state.open = null;
    for (const id of ["panel-range", "panel-exponents"]) Plotly.purge(el(id));
  };
  el("panel-close").addEventListener("click", () => { close(); box.focus(); });

  const open = (site) => {
    close();
    state.open = site.site;
    panel.hidden = false;
    el("panel-title").textContent = title(site);
    const found = data.panels[site.site];
    el("panel-text").textContent = found ? summary(site) :
      `${summary(site)} Its windows are not in this page, which holds those of the worst sites. ` +
      `For them: unclamp report ${data.path} --site '${title(site)}'`;
    if (found) { drawRange(found); drawExponents(found); }
    panel.scrollIntoView({ block: "nearest" });
  };
  const summary = (site) => {
    const window = data.window > 1 ? ` A point is ${data.window} steps.` : "";
    const worst = missing(site.worst_step) ? "" : `, worst at step ${write.step(site.worst_step)}`;
    const unknown = site.undecided_casts ? ` Of ${things(site.undecided_casts, "more cast")} nobody knows whether they clamped.` : "";
    const would = site.only_counted ? " would have been" : "";
    return `${site.scaling} ${site.format}${site.only_counted ? ", only counted" : ""}: ${missing(site.saturated) ? "" : things(site.saturated, "element")}${would} clamped in ` +
      `${write.count(site.clamped_casts)} of ${things(site.rows - site.undecided_casts, "recorded cast")}${worst}.${unknown}${window}`;
  };
  const line = (name, y, axis, style, more = {}) => ({
    x: data.steps, y, name, yaxis: axis, mode: "lines+markers", connectgaps: false,
    line: { width: 1.5, ...style }, marker: { size: data.steps.length > 120 ? 2 : 4 }, ...more,
  });
  const drawRange = (found) => {
    const positive = (values) => values.map((v) => (v > 0 ? v : null)); // a log axis has no 0
    const traces = [
      line("largest representable", found.top, "y", { color: "#6b7280", dash: "dash", shape: "hv" }, { mode: "lines" }),
      line("smallest subnormal", found.bottom, "y", { color: "#9ca3af", dash: "dot", shape: "hv" }, { mode: "lines" }),
      line("amax", positive(found.amax), "y", { color: "#3b82f6" }),
      line("clamped", positive(found.clamp), "y2", { color: "#ef4444" }),
      line("underflow", positive(found.under), "y2", { color: "#d97706" }),
    ];
    const third = [];
    if (found.sqnr.some((v) => v !== null)) {
      third.push(line("SQNR mean", found.sqnr, "y3", { color: "#059669" }, { connectgaps: true }));
      if (data.window > 1) third.push(line("SQNR min", found.sqnr_min, "y3", { color: "#6ee7b7" }, { connectgaps: true }));
    }
    const recast = found.recast.some((v) => v > 0);
    if (recast) third.push({ x: data.steps, y: found.recast, name: "re-cast", yaxis: "y4", type: "bar", marker: { color: "#c4b5fd" } });
    const deep = third.length > 0;
    const layout = {
      height: deep ? 560 : 430, font: FONT, hovermode: "x unified", ...CLEAR,
      margin: { l: 70, r: recast ? 60 : 16, t: 10, b: 40 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      xaxis: { title: { text: "step" }, anchor: deep ? "y3" : "y2" },
      yaxis: { type: "log", exponentformat: "power", dtick: 2, domain: [deep ? 0.5 : 0.4, 1], title: { text: "size, log" } },
      yaxis2: { domain: deep ? [0.25, 0.45] : [0, 0.34], type: "log", exponentformat: "power", dtick: 2, title: { text: "share, log" } },
      yaxis3: { domain: [0, 0.2], title: { text: "dB" }, visible: deep },
      yaxis4: { overlaying: "y3", side: "right", rangemode: "tozero", showgrid: false, title: { text: "re-cast" }, visible: recast },
    };
    Plotly.newPlot("panel-range", [...traces, ...third], layout, config).then(unclampTheme.apply);
  };
  const drawExponents = (found) => {
    const h = found.histogram, into = el("panel-exponents");
    if (!h) { into.textContent = "No cast of this site was inspected, so there is no histogram: Recorder(inspect=...)."; return; }
    into.textContent = "";
    const share = (counts) => {
      const all = counts.reduce((a, b) => a + b, 0);
      return counts.map((c) => (c > 0 ? c / all : null));
    };
    const x = h.exponent.map((e) => e + 0.5);
    const text = h.exponent.map((e) => `2^${e} to 2^${e + 1}`);
    const bars = (name, y, color) => ({ x, y, text, name, type: "bar", width: 1, opacity: 0.65, marker: { color },
      hovertemplate: "%{text}: %{y:.3g} of the elements<extra>" + name + "</extra>", textposition: "none" });
    const low = h.bottom > 0 ? Math.log2(h.bottom) : null, high = h.top > 0 ? Math.log2(h.top) : null;
    const edges = [[low, "smallest subnormal", "right"], [high, "largest value", "left"]].filter(([at]) => at !== null);
    const shapes = edges.map(([at]) => ({ type: "line", yref: "paper", y0: 0, y1: 1, x0: at, x1: at, line: { color: "#6b7280", dash: "dash", width: 1 } }));
    if (edges.length === 2) shapes.push({ type: "rect", yref: "paper", y0: 0, y1: 1, x0: low, x1: high, layer: "below", line: { width: 0 }, fillcolor: "rgba(16,185,129,0.08)" });
    const notes = edges.map(([at, label, side]) => ({ x: at, yref: "paper", y: 1, text: label, showarrow: false, xanchor: side, yanchor: "top", font: { size: 11 } }));
    Plotly.newPlot("panel-exponents", [
      bars(`step ${h.step.toLocaleString("en-US")}`, share(h.latest), "#3b82f6"),
      bars(`sum of ${h.looks} inspected steps since ${h.since.toLocaleString("en-US")}`, share(h.total), "#9ca3af"),
    ], {
      height: 300, font: FONT, barmode: "overlay", bargap: 0, ...CLEAR, shapes, annotations: notes,
      margin: { l: 70, r: 16, t: 10, b: 45 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      xaxis: { title: { text: "exponent: floor(log2 |x|)" } },
      yaxis: { type: "log", exponentformat: "power", dtick: 2, title: { text: "share of elements, log" } },
    }, config).then(unclampTheme.apply);
  };

  const heat = el("heat-run");
  if (heat && heat.on) heat.on("plotly_click", ({ points }) => {
    const name = points[0].y;
    const row = rows.find(({ site }) => [name, "model." + name].includes(title(site)));
    if (row) open(row.site);
  });
  update();
})();
