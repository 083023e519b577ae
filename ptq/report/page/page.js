"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const points = data.points, keys = data.keys;
  const done = points.filter((p) => p.values.status === "done");
  const root = document.documentElement;
  const number = (v) => typeof v === "number" && isFinite(v);
  const make = (tag, text, name) => {
    const node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = String(text);
    if (name) node.className = name;
    return node;
  };
  // Plotly reads a little HTML in its texts: names are shown as they are.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const optionsOf = (p) => keys.map((k) => (p.options[k] ? `${k}=${p.options[k]}` : "")).filter(Boolean).join(" ");
  const short = (text, most = 60) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  const label = (p) => `${p.values.point}: ${short(optionsOf(p))}`;
  const wrapped = (text) => plain(text).replace(/(.{1,70})(\s|$)/g, "$1<br>").replace(/<br>$/, "");

  // What is chosen lives in the address, so that a view can be kept and sent: #sort=-kl_mean&filter=done&theme=dark
  const chosen = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  const keep = (name, value) => {
    if (value) chosen.set(name, value); else chosen.delete(name);
    history.replaceState(null, "", chosen.toString() ? `#${chosen}` : location.pathname + location.search);
  };

  // --- light and dark
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const theme = () => chosen.get("theme") || (dark.matches ? "dark" : "light");
  const paint = () => { root.dataset.theme = theme(); };
  paint();
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const series = () => theme() === "dark"
    ? ["#7fb0ff", "#f2a65a", "#6fcf97", "#e58bb7", "#b6a0ff", "#6cc9de", "#d9c56b", "#ff8a80", "#a8b3c0", "#8fd14f"]
    : ["#1f5fbf", "#c25e00", "#1d7a46", "#b0307a", "#6b4fc4", "#0b7285", "#8a6d00", "#b3261e", "#5b6672", "#4d7c0f"];

  // --- the table
  const FIGURES = [
    ["quantized_perplexity", "perplexity", 4], ["difference", "difference", 4], ["difference_low", "low", 4], ["difference_high", "high", 4],
    ["kl_mean", "KL", 5], ["kl_p99", "KL 99%", 4], ["top1_agreement", "top-1", 4], ["bits_per_weight", "bits a weight", 2],
    ["model_bits", "bits, whole model", 2], ["seconds", "s", 1],
  ];
  const suffix = (key) => {
    const parts = key.split(".");
    for (let n = 1; n <= parts.length; n++) {
      const end = parts.slice(-n).join(".");
      if (keys.filter((k) => k === end || k.endsWith(`.${end}`)).length === 1) return end;
    }
    return key;
  };
  const columns = [
    { name: "point", title: "point", value: (p) => p.values.point, figure: true },
    { name: "status", title: "status", value: (p) => p.values.status },
    ...keys.map((k) => ({ name: k, title: suffix(k), full: k, value: (p) => natural(p.options[k]), text: (p) => p.options[k] ?? "", option: true })),
    ...FIGURES.map(([name, title, digits]) => ({
      name, title, figure: true, value: (p) => p.values[name], text: (p) => (number(p.values[name]) ? p.values[name].toFixed(digits) : ""),
    })),
  ];
  function natural(value) {
    if (value === undefined || value === null || value === "") return value;
    const n = Number(value);
    return isNaN(n) ? String(value) : n;
  }
  const head = document.querySelector("#table thead"), body = document.querySelector("#table tbody");
  const filter = document.getElementById("filter"), open = new Set();
  const usual = done.length ? "quantized_perplexity" : "point";
  function details(p) {
    const row = make("tr", null, "detail"), cell = make("td"), list = make("dl");
    cell.colSpan = columns.length;
    const add = (name, value) => { if (value !== undefined && value !== null && value !== "") list.append(make("dt", name), make("dd", value)); };
    add("command", p.command);
    add("folder", p.values.folder);
    add("line", p.values.line);
    Object.entries(p.fingerprints).forEach(([name, value]) => add(name.replaceAll("_", " "), value));
    add("versions", Object.entries(p.versions).map(([name, value]) => `${name} ${value}`).join(", "));
    cell.append(list);
    row.append(cell);
    return row;
  }
  function ordered() {
    const by = chosen.get("sort") || usual;
    const name = by.replace(/^-/, ""), column = columns.find((c) => c.name === name) || columns[0], sign = by.startsWith("-") ? -1 : 1;
    const empty = (v) => v === undefined || v === null || v === "";
    return [...points].sort((a, b) => {
      const x = column.value(a), y = column.value(b);
      if (empty(x) || empty(y)) return empty(x) - empty(y) || a.values.point - b.values.point;
      const order = number(x) && number(y) ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
      return sign * order || a.values.point - b.values.point;
    });
  }
  function showTable() {
    const by = chosen.get("sort") || usual, name = by.replace(/^-/, "");
    [...head.querySelectorAll("th")].forEach((th) => {
      if (th.dataset.name === name) th.setAttribute("aria-sort", by.startsWith("-") ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (p) => {
      const text = `${p.values.point} ${p.values.status} ${optionsOf(p)} ${p.values.line || ""}`.toLowerCase();
      return words.every((w) => text.includes(w));
    };
    const rows = ordered().filter(matches);
    body.replaceChildren(...rows.flatMap((p) => {
      const row = make("tr");
      row.dataset.point = p.values.point;
      columns.forEach((c) => {
        const cell = make("td", null, c.figure ? "figure" : c.option ? "option" : "");
        if (c.name === "point") {
          const button = make("button", p.values.point);
          button.type = "button";
          button.setAttribute("aria-expanded", open.has(p));
          button.setAttribute("aria-label", `Details of point ${p.values.point}`);
          button.addEventListener("click", () => {
            if (!open.delete(p)) open.add(p);
            showTable();
            body.querySelector(`tr[data-point="${p.values.point}"] button`).focus();
          });
          cell.append(button);
        } else if (c.name === "status") cell.append(make("span", p.values.status, `tag ${p.values.status}`));
        else cell.textContent = c.text ? c.text(p) : c.value(p);
        row.append(cell);
      });
      return open.has(p) ? [row, details(p)] : [row];
    }));
    document.getElementById("shown").textContent = rows.length === points.length ? `${points.length} points` : `${rows.length} of ${points.length} points`;
  }
  const line = make("tr");
  columns.forEach((c) => {
    const th = make("th", null, c.figure ? "figure" : ""), button = make("button", c.title);
    th.scope = "col";
    th.dataset.name = c.name;
    if (c.full) th.title = c.full;
    button.type = "button";
    button.addEventListener("click", () => {
      const now = chosen.get("sort") || usual;
      keep("sort", now === c.name ? `-${c.name}` : c.name);
      showTable();
    });
    th.append(button);
    line.append(th);
  });
  head.append(line);
  filter.value = chosen.get("filter") || "";
  filter.addEventListener("input", () => { keep("filter", filter.value); showTable(); });
  showTable();
  root.dataset.usable = Math.round(performance.now());

  // --- figures
  const layout = (more) => {
    const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true };
    const { xaxis, yaxis, ...rest } = more;
    [xaxis, yaxis].forEach((a) => { if (a && a.title) a.title.standoff = 10; });
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("ink"), size: 12, family: "system-ui, sans-serif" },
      margin: { l: 8, r: 12, t: 10, b: 8 }, colorway: series(), hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") }, align: "left" },
      legend: { orientation: "h", y: -0.3, font: { size: 11 } }, xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  };
  const hover = (p) => `<b>${p.values.point}</b> ${wrapped(optionsOf(p))}`;
  // Of points with different models there is no one baseline to draw.
  const common = (list, of) => (list.every((p) => of(p) === of(list[0])) ? of(list[0]) : undefined);
  const nothing = (words) => ({ nothing: words });
  function front(name, title) {
    return () => {
      const all = done.filter((p) => number(p.values[name]) && number(p.values.model_bits));
      if (!all.length) return nothing("No figures of this kind.");
      const sorted = [...all].sort((a, b) => a.values.model_bits - b.values.model_bits || a.values[name] - b.values[name]);
      const best = [];
      sorted.forEach((p) => { if (!best.length || p.values[name] < best.at(-1).values[name]) best.push(p); });
      const base = common(done, (p) => p.metrics.baseline_perplexity);
      const shapes = name === "quantized_perplexity" && number(base) ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: base, y1: base, line: { color: colour("quiet"), width: 1, dash: "dot" } }] : [];
      const at = (list) => ({ x: list.map((p) => p.values.model_bits), y: list.map((p) => p.values[name]) });
      return {
        traces: [
          { ...at(best), type: "scatter", mode: "lines", line: { color: series()[0], width: 1.5, shape: "hv" }, hoverinfo: "skip", showlegend: false },
          { ...at(all), type: "scatter", mode: "markers", showlegend: false, text: all.map(hover), hovertemplate: `%{text}<br>${title} %{y:.5g}, %{x:.3f} bits<extra></extra>`,
            marker: { size: 9, color: all.map((p) => (best.includes(p) ? series()[0] : colour("quiet"))), opacity: 0.85, line: { color: colour("card"), width: 1 } } },
        ],
        layout: layout({ xaxis: { title: { text: "bits, whole model" } }, yaxis: { title: { text: title } }, shapes }),
      };
    };
  }
  const MOST_LINES = 8;
  function option(key) {
    return () => {
      const groups = new Map();
      done.filter((p) => number(p.values.difference) && p.options[key]).forEach((p) => {
        const rest = keys.filter((k) => k !== key && p.options[k]).map((k) => `${suffix(k)}=${p.options[k]}`).join(" ");
        if (!groups.has(rest)) groups.set(rest, []);
        groups.get(rest).push(p);
      });
      // Where options go side by side (--zip), no two points differ in one alone: then all are one line.
      const all = [...groups.values()].flat();
      const several = [...groups].some(([, list]) => list.length > 1) ? [...groups].filter(([, list]) => list.length > 1) : [["", all]].filter(() => all.length > 1);
      if (!several.length) return nothing("Fewer than two values are done.");
      const least = (list) => Math.min(...list.map((p) => p.values.difference));
      const shown = several.sort((a, b) => least(a[1]) - least(b[1])).slice(0, MOST_LINES);
      const numeric = shown.every(([, list]) => list.every((p) => number(natural(p.options[key]))));
      const traces = shown.flatMap(([rest, list], i) => {
        const c = series()[i % series().length];
        if (numeric) list.sort((a, b) => natural(a.options[key]) - natural(b.options[key]));
        const x = list.map((p) => (numeric ? natural(p.options[key]) : plain(short(p.options[key], 40))));
        const ends = list.every((p) => number(p.values.difference_low) && number(p.values.difference_high));
        const band = ends && numeric ? [{ x: [...x, ...[...x].reverse()], y: [...list.map((p) => p.values.difference_high), ...list.map((p) => p.values.difference_low).reverse()],
          type: "scatter", mode: "lines", fill: "toself", fillcolor: c, opacity: 0.13, line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: String(i) }] : [];
        const bars = ends && !numeric ? { error_y: { type: "data", symmetric: false, array: list.map((p) => p.values.difference_high - p.values.difference), arrayminus: list.map((p) => p.values.difference - p.values.difference_low), thickness: 1 } } : {};
        return [...band, { x, y: list.map((p) => p.values.difference), type: "scatter", mode: numeric ? "lines+markers" : "markers", name: plain(short(rest || suffix(key), 46)), legendgroup: String(i),
          line: { color: c, width: 2 }, marker: { color: c, size: 7 }, showlegend: shown.length > 1, text: list.map(hover),
          customdata: list.map((p) => [p.values.difference_low, p.values.difference_high]), hovertemplate: "%{text}<br>difference %{y:.5g} [%{customdata[0]:.5g}, %{customdata[1]:.5g}]<extra></extra>", ...bars }];
      });
      const more = several.length > shown.length ? `best ${shown.length} of ${several.length} lines` : "";
      return { traces, layout: layout({ xaxis: { title: { text: plain(key) }, type: numeric ? "linear" : "category" }, yaxis: { title: { text: "difference of perplexity" } },
        annotations: more ? [{ text: more, showarrow: false, xref: "paper", yref: "paper", x: 1, y: 1.02, xanchor: "right", yanchor: "bottom", font: { size: 11, color: colour("quiet") } }] : [], margin: { l: 8, r: 12, t: more ? 26 : 10, b: 8 } }) };
    };
  }
  const pick = (name) => done.find((p) => String(p.values.point) === (document.querySelector(`[data-for="${name}"]`) || {}).value);
  function errors() {
    const p = pick("errors");
    if (!p || !p.errors.length) return nothing("This point has no errors of Linears.");
    const names = [...new Set(p.errors.map((e) => e[1]))], blocks = [...new Set(p.errors.map((e) => e[0]))].sort((a, b) => a - b);
    const z = names.map(() => blocks.map(() => null));
    p.errors.forEach(([block, name, error]) => { z[names.indexOf(name)][blocks.indexOf(block)] = error; });
    return {
      traces: [{ type: "heatmap", z, x: blocks, y: names.map(plain), colorscale: theme() === "dark" ? "Viridis" : [[0, "#f3f6fb"], [0.5, "#6f9fd8"], [1, "#123a75"]], xgap: 1, ygap: 1,
        colorbar: { thickness: 10, outlinewidth: 0, tickfont: { size: 11 } }, hovertemplate: "block %{x}, %{y}<br>error %{z:.4g}<extra></extra>" }],
      layout: layout({ xaxis: { title: { text: "block" }, dtick: blocks.length > 16 ? undefined : 1 }, yaxis: { autorange: "reversed" } }),
    };
  }
  function percentiles() {
    const list = done.filter((p) => p.kl.length && number(p.values.kl_mean)).sort((a, b) => a.values.kl_mean - b.values.kl_mean).slice(0, 10);
    if (!list.length) return nothing("No percentiles of KL were recorded.");
    const x = Object.values(data.klShares).map((s) => `${s}%`);
    return {
      traces: list.map((p, i) => ({ x, y: p.kl.map((v) => (number(v) && v > 0 ? v : null)), type: "scatter", mode: "lines+markers", name: plain(short(label(p), 46)), line: { color: series()[i], width: 1.8 }, marker: { size: 6 },
        hovertemplate: `${hover(p)}<br>%{x} of tokens below %{y:.4g}<extra></extra>` })),
      layout: layout({ xaxis: { type: "category" }, yaxis: { type: "log", dtick: 1, title: { text: "KL, nats" } }, showlegend: list.length > 1 }),
    };
  }
  function ranges() {
    const p = pick("ranges");
    if (!p || !p.channels.length) return nothing("No ranges of this point were kept: no transform changed a link.");
    const links = p.channels.slice(0, 3), rows = links.length, gap = 0.14, height = (1 - gap * (rows - 1)) / rows;
    const axes = {}, annotations = [];
    const traces = links.flatMap((link, i) => ["before", "after"].map((when, j) => {
      const n = 2 * i + j, id = n ? String(n + 1) : "", top = 1 - i * (height + gap);
      axes[`xaxis${id}`] = { ...layout({}).xaxis, domain: j ? [0.55, 1] : [0, 0.45], anchor: `y${id}`, showticklabels: i === rows - 1 };
      axes[`yaxis${id}`] = { ...layout({}).yaxis, domain: [top - height, top], anchor: `x${id}` };
      annotations.push({ text: `${when} · ${plain(short(link.name, 34))}`, xref: "paper", yref: "paper", x: j ? 0.55 : 0, y: top, xanchor: "left", yanchor: "bottom", showarrow: false, font: { size: 11, color: colour("quiet") } });
      const { low, high } = link[when], x = low.map((_, k) => k * link.step);
      return { x: [...x, ...[...x].reverse()], y: [...high, ...[...low].reverse()], type: "scatter", mode: "lines", fill: "toself", line: { width: 0.8, color: series()[j] }, fillcolor: series()[j], opacity: 0.75,
        xaxis: `x${id}`, yaxis: `y${id}`, showlegend: false, hovertemplate: "channel %{x}: %{y:.4g}<extra></extra>" };
    }));
    return { traces, layout: { ...layout({ annotations, margin: { l: 8, r: 12, t: 26, b: 8 } }), ...axes } };
  }
  function bytes() {
    const list = ordered().filter((p) => done.includes(p) && number(p.values.bytes));
    if (!list.length) return nothing("No sizes were recorded.");
    const before = common(list, (p) => p.size.before_bytes);
    return {
      traces: [{ type: "bar", x: list.map((p) => String(p.values.point)), y: list.map((p) => p.values.bytes / 1e6), text: list.map(hover), textposition: "none", marker: { color: series()[0] }, hovertemplate: "%{text}<br>%{y:.2f} MB<extra></extra>" }],
      layout: layout({ xaxis: { type: "category", title: { text: "point" } }, yaxis: { title: { text: "MB" }, rangemode: "tozero" },
        shapes: number(before) ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: before / 1e6, y1: before / 1e6, line: { color: colour("quiet"), dash: "dot", width: 1 } }] : [],
        annotations: number(before) ? [{ text: `baseline ${(before / 1e6).toFixed(1)} MB`, xref: "paper", x: 1, xanchor: "right", y: before / 1e6, yanchor: "bottom", showarrow: false, font: { size: 11, color: colour("quiet") } }] : [] }),
    };
  }
  function seconds() {
    const list = ordered().filter((p) => done.includes(p)), phases = [...new Set(list.flatMap((p) => Object.keys(p.seconds)))];
    if (!phases.length) return nothing("No times were recorded.");
    return {
      traces: phases.map((phase, i) => ({ type: "bar", name: plain(phase), x: list.map((p) => String(p.values.point)), y: list.map((p) => p.seconds[phase] ?? 0), marker: { color: series()[i % series().length] }, hovertemplate: `point %{x}, ${plain(phase)} %{y:.2f} s<extra></extra>` })),
      layout: layout({ barmode: "stack", xaxis: { type: "category", title: { text: "point" } }, yaxis: { title: { text: "s" } } }),
    };
  }
  const figures = { perplexity: front("quantized_perplexity", "perplexity"), kl: front("kl_mean", "KL, nats"), errors, percentiles, ranges, bytes, seconds };
  const lines = document.getElementById("lines");
  if (lines) {
    keys.forEach((key, i) => {
      const figure = make("figure"), plot = make("div", null, "plot");
      plot.dataset.figure = `option-${i}`;
      figures[`option-${i}`] = option(key);
      figure.append(make("figcaption", key), plot);
      lines.append(figure);
    });
  }
  document.querySelectorAll(".chooser").forEach((select) => {
    const able = select.dataset.for === "ranges" ? done.filter((p) => p.channels.length) : done.filter((p) => p.errors.length);
    const order = ordered().filter((p) => able.includes(p));
    select.append(...order.map((p) => { const o = make("option", label(p)); o.value = p.values.point; return o; }));
    select.closest(".controls").hidden = order.length === 0;
    select.addEventListener("change", () => draw(document.querySelector(`[data-figure="${select.dataset.for}"]`)));
  });
  function draw(node) {
    const found = figures[node.dataset.figure]();
    node.dataset.drawn = "1";
    if (found.nothing) {
      Plotly.purge(node);
      node.replaceChildren(make("p", found.nothing, "none"));
      node.style.height = "auto";
      return Promise.resolve();
    }
    node.querySelector(".none")?.remove();
    node.style.height = "";
    return Plotly.react(node, found.traces, found.layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
  const plots = [...document.querySelectorAll(".plot")];
  // A figure is drawn when it is about to be seen: a long sweep can be used at once.
  const seen = new IntersectionObserver((entries) => entries.forEach((e) => { if (e.isIntersecting && !e.target.dataset.drawn) draw(e.target); }), { rootMargin: "400px" });
  const rest = () => {
    const next = plots.find((node) => !node.dataset.drawn);
    if (next) draw(next).then(() => setTimeout(rest, 0)); else root.dataset.ready = "1";
  };
  // The plotting library stands after this script: the table can be used while it is read.
  document.addEventListener("DOMContentLoaded", () => { plots.forEach((node) => seen.observe(node)); setTimeout(rest, 30); });
  window.addEventListener("beforeprint", () => plots.forEach((node) => { if (!node.dataset.drawn) draw(node); }));
  const repaint = () => { paint(); plots.filter((node) => node.dataset.drawn).forEach(draw); };
  dark.addEventListener("change", repaint);
  document.getElementById("theme").addEventListener("click", () => { keep("theme", theme() === "dark" ? "light" : "dark"); repaint(); });
})();
