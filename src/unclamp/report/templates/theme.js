"use strict";
// Plots in the colours of the reader's scheme and the layout of the screen, and links into the
// glossary, which is closed until somebody asks.
const unclampTheme = (() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 600px)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const before = new WeakMap(); // what a plot had on a wide screen
  const ROLES = { input: "in", weight: "weight", grad_output: "grad" };
  // A site on a phone: its numbers, its last name and its role; pointing at it names it whole.
  const short = (site) => {
    const [fqn, role] = [site.slice(0, site.lastIndexOf(" ")), site.slice(site.lastIndexOf(" ") + 1)];
    const parts = fqn.split("."), last = parts.pop();
    return [...parts.filter((part) => /^\d+$/.test(part)), last.slice(-11)].join(".") + " " + (ROLES[role] || role);
  };

  const remember = (plot) => {
    if (!before.has(plot)) {
      const { legend, margin, height } = plot.layout;
      before.set(plot, JSON.parse(JSON.stringify({ legend, margin, height })));
    }
    return before.get(plot);
  };
  const colours = (plot) => {
    const change = { "font.color": css("--ink"), "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": css("--soft"), "modebar.activecolor": css("--ink") };
    for (const axis of Object.keys(plot._fullLayout).filter((key) => /^[xy]axis\d*$/.test(key))) {
      change[`${axis}.gridcolor`] = css("--grid");
      change[`${axis}.zerolinecolor`] = css("--zero");
      change[`${axis}.linecolor`] = css("--zero");
      if (axis.startsWith("y") && narrow.matches) change[`${axis}.automargin`] = true;
    }
    return change;
  };
  const placing = (plot) => {
    const { legend, margin, height } = remember(plot);
    if (!narrow.matches) return { legend, margin, height };
    const named = plot.data.filter((trace) => trace.showlegend !== false && trace.type !== "heatmap");
    const longest = Math.max(1, ...named.map((trace) => (trace.name || "").length));
    const below = named.length > 1 ? 19 * Math.ceil(named.length / (longest > 14 ? 1 : 3)) : 0;
    return {
      height: height + below, // rows of the legend, below the plot
      legend: { ...legend, orientation: "h", x: 0, y: 0, yanchor: "bottom", yref: "container", font: { size: 11 } },
      margin: { ...margin, l: Math.min(margin.l, 52), r: Math.min(margin.r, 10), b: margin.b + below },
    };
  };
  const heat = (plot) => {
    const scales = plot.layout.meta && plot.layout.meta.heat;
    if (!scales) return [{}, {}];
    const names = [...plot.data[0].y];
    const bar = narrow.matches
      ? { "colorbar.thickness": 8, "colorbar.xpad": 2, "colorbar.tickfont.size": 10, "colorbar.title.text": "" }
      : { "colorbar.thickness": 14, "colorbar.xpad": 10, "colorbar.tickfont.size": 12, "colorbar.title.text": scales.title };
    return [
      { colorscale: [dark.matches ? scales.dark : scales.light], ...bar },
      { "yaxis.tickmode": "array", "yaxis.tickvals": names, "yaxis.ticktext": narrow.matches ? names.map(short) : names },
    ];
  };
  const apply = (plot) => {
    const [traces, axis] = heat(plot);
    const layout = { ...colours(plot), ...placing(plot), ...axis };
    return Object.keys(traces).length ? Plotly.update(plot, traces, layout, [0]) : Plotly.relayout(plot, layout);
  };
  const all = () => document.querySelectorAll(".js-plotly-plot").forEach(apply);
  dark.addEventListener("change", all);
  narrow.addEventListener("change", all);
  all();

  // A link to a word opens the glossary that it is in.
  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const details = target && target.closest("details.glossary");
    if (!details) return;
    details.open = true;
    target.scrollIntoView({ block: "nearest" });
    if (target !== details) target.focus({ preventScroll: true });
  };
  window.addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => {
    // The same link again changes no hash.
    const link = event.target.closest('a[href^="#"]');
    if (link && link.getAttribute("href") === location.hash) reveal();
  });
  reveal();
  return { apply, css };
})();
