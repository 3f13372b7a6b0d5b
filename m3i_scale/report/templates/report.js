// Draws the charts of the tab that is shown, and answers its tabs, buttons and sliders.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const several = data.runs.length > 1;
  const state = { smoothing: 0, log: false, runs: new Set(), kinds: new Set(), groups: new Map() }; // sets: hidden ones
  const colours = {
    light: ["#2563c9", "#d97706", "#0a7a3c", "#d6249f", "#5b21b6", "#989200", "#0aa0c0", "#b0121f", "#1f2937", "#a07f7a"],
    dark: ["#5aa2ff", "#ff9d2e", "#35c47a", "#ff8ad8", "#a878ff", "#e8e04a", "#3fdcf0", "#ff4d4d", "#e6eaf0", "#a58a78"],
  };
  const dashes = ["solid", "dash", "dot", "longdash", "dashdot", "longdashdot"];
  const markColours = { stage: 0, resumed: 2, rewound: 4, warning: 1, lost: 7, failed: 7 };

  const palette = () => (dark.matches ? colours.dark : colours.light);
  const colour = (place) => palette()[place % palette().length];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Hover texts of plotly.js are a kind of HTML.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const groupsOf = (chart) => [...new Set(chart.series.map((one) => one.group))];
  const hiddenGroups = (chart) => {
    if (!state.groups.has(chart.id)) state.groups.set(chart.id, new Set());
    return state.groups.get(chart.id);
  };

  // Exponential moving average, without the bias of its first points; its width counts in steps, so that curves of
  // uneven points are smoothed evenly.
  function smoothed(x, y) {
    const spacing = (x[x.length - 1] - x[0]) / Math.max(1, x.length - 1) || 1;
    let mean = 0, weight = 0, before = x[0] - spacing;
    return y.map((value, place) => {
      if (value === null) return null;
      const kept = Math.pow(state.smoothing, (x[place] - before) / spacing);
      before = x[place];
      mean = mean * kept + value * (1 - kept);
      weight = weight * kept + 1 - kept;
      return Number((mean / weight).toPrecision(6)); // a constant stays one
    });
  }

  function tracesOf(chart) {
    const groups = groupsOf(chart), hidden = hiddenGroups(chart), stacked = chart.stacked && !several, traces = [];
    const byRun = several && !chart.stacked; // what the colour stands for; dashes stand for the other
    for (const one of chart.series) {
      if (state.runs.has(one.run) || hidden.has(one.group)) continue;
      const place = groups.indexOf(one.group);
      const name = plain([several ? data.runs[one.run] : "", chart.series.length > data.runs.length ? one.name : ""]
        .filter(Boolean).join(" · ") || chart.title);
      const points = one.x.length < 2 ? "lines+markers" : "lines";
      const line = {
        color: colour(byRun ? one.run : place),
        width: 1.8,
        dash: one.dashed ? "dot" : several ? dashes[(byRun ? place : one.run) % dashes.length] : "solid",
      };
      const trace = { x: one.x, y: one.y, name, mode: points, line, type: "scatter", hovertemplate: chart.percent ? "%{y:.4~p}" : "%{y:.5~g}" };
      if (stacked) {
        Object.assign(trace, { stackgroup: "all", mode: "none", fillcolor: line.color, hovertemplate: chart.percent ? "%{y:.1%}" : "%{y:.4~g}" });
      } else if (state.smoothing > 0) {
        traces.push({ ...trace, line: { ...line, width: 1 }, opacity: 0.28, hoverinfo: "skip", hovertemplate: null });
        trace.y = smoothed(one.x, one.y);
      }
      traces.push(trace);
    }
    for (const kind of Object.keys(data.kinds)) {
      const marks = data.marks.filter((mark) => mark.kind === kind && !state.runs.has(mark.run));
      if (!marks.length || state.kinds.has(kind)) continue;
      traces.push({
        x: marks.flatMap((mark) => [mark.step, mark.step, null]),
        y: marks.flatMap(() => [0, 1, null]),
        text: marks.flatMap((mark) => {
          const words = plain((several ? data.runs[mark.run] + ": " : "") + mark.short);
          return [words, words, ""];
        }),
        name: data.kinds[kind], yaxis: "y2", type: "scatter", mode: "lines", connectgaps: false,
        line: { color: colour(markColours[kind]), width: 1.2, dash: "dot" }, hovertemplate: "%{text}",
      });
    }
    return traces;
  }

  // plotly.js gives a curve that is constant an axis from 1 below to 1 above it.
  function rangeOfConstant(chart) {
    const values = chart.series.filter((one) => !state.runs.has(one.run)).flatMap((one) => one.y).filter((y) => y !== null);
    const value = values[0];
    if (!values.length || state.log || values.some((other) => Math.abs(other - value) > 1e-6 * Math.abs(value))) return {};
    const margin = Math.abs(value) / 10 || (chart.percent ? 0.01 : 1);
    const range = [value - margin, value + margin];
    return { range: chart.percent ? [Math.max(0, range[0]), range[1]] : range };
  }

  function layoutOf(chart) {
    const grid = css("--line"), text = css("--soft");
    const axis = { gridcolor: grid, linecolor: grid, zeroline: false, tickfont: { color: text }, automargin: true };
    return {
      margin: { l: 8, r: 10, t: 10, b: 8 }, autosize: true, showlegend: false, hovermode: "x unified", hoverdistance: -1,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      font: { family: "system-ui, sans-serif", size: 12, color: css("--text") },
      hoverlabel: { bgcolor: css("--card"), bordercolor: grid, font: { color: css("--text"), size: 12 }, namelength: 40 },
      uirevision: String(state.log),
      xaxis: { ...axis, title: { text: "step", font: { color: text } }, separatethousands: true },
      yaxis: {
        ...axis, title: { text: chart.unit, font: { color: text } },
        type: state.log && !chart.stacked ? "log" : "linear", exponentformat: "power", minexponent: 5, separatethousands: true,
        ...(chart.percent ? { tickformat: ".3~p" } : {}), ...(!chart.stacked || several ? rangeOfConstant(chart) : chart.percent ? { range: [0, 1] } : { rangemode: "tozero" }),
      },
      yaxis2: { overlaying: "y", range: [0, 1], fixedrange: true, visible: false },
    };
  }

  // Named one by one: of all that there are, some send the chart to a server.
  const modeBarButtons = [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]];
  const config = { responsive: true, displaylogo: false, modeBarButtons, showTips: false };
  if (matchMedia("(max-width: 600px), (pointer: coarse)").matches) config.displayModeBar = false; // it would lie over curves
  const visibleCharts = () => {
    const panel = document.querySelector("[role=tabpanel]:not([hidden])");
    return data.charts.filter((chart) => panel && panel.id === "panel-" + chart.tab);
  };

  let drawing = 0;
  async function draw() {
    const turn = ++drawing;
    document.body.dataset.drawn = "false";
    for (const chart of visibleCharts()) {
      await new Promise((next) => setTimeout(next)); // clicks are answered in between
      if (turn !== drawing) return;
      await Plotly.react(document.getElementById("plot-" + chart.id), tracesOf(chart), layoutOf(chart), config);
      paintKeys(chart);
    }
    if (turn !== drawing) return;
    document.body.dataset.drawn = "true";
  }

  function toggle(button, set, member) {
    button.addEventListener("click", () => {
      if (!set.delete(member)) set.add(member);
      button.setAttribute("aria-pressed", String(!set.has(member)));
      draw();
    });
  }
  const repaint = []; // keys take the colours of the scheme
  function paint(button, place) {
    const set = () => button.style.setProperty("--key", colour(place));
    set();
    repaint.push(set);
  }
  function paintKeys(chart) {
    const place = document.getElementById("keys-" + chart.id), groups = groupsOf(chart);
    if (place.childElementCount || groups.length < 2) return;
    groups.forEach((group, number) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "key";
      button.textContent = group;
      button.setAttribute("aria-pressed", "true");
      if (several && !chart.stacked) button.classList.add("dash-" + dashes[number % dashes.length]);
      else paint(button, number);
      toggle(button, hiddenGroups(chart), group);
      place.append(button);
    });
  }

  for (const button of document.querySelectorAll("[data-run]")) {
    paint(button, Number(button.dataset.run));
    toggle(button, state.runs, Number(button.dataset.run));
  }
  for (const button of document.querySelectorAll("[data-mark]")) {
    paint(button, markColours[button.dataset.mark]);
    toggle(button, state.kinds, button.dataset.mark);
  }
  const log = document.getElementById("log-scale"), smoothing = document.getElementById("smoothing");
  log.addEventListener("click", () => {
    state.log = !state.log;
    log.setAttribute("aria-pressed", String(state.log));
    draw();
  });
  smoothing.addEventListener("input", () => {
    state.smoothing = Number(smoothing.value);
    document.getElementById("smoothing-value").textContent = state.smoothing.toFixed(2);
    draw();
  });

  const tabs = [...document.querySelectorAll("[role=tab]")];
  function show(tab) {
    for (const other of tabs) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", String(chosen));
      other.tabIndex = chosen ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
    }
    document.getElementById("toolbar").hidden = !visibleCharts().length;
    tab.scrollIntoView({ block: "nearest", inline: "nearest" });
    draw();
  }
  tabs.forEach((tab, place) => {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const next = tabs[(moves[event.key] + tabs.length) % tabs.length];
      next.focus();
      show(next);
    });
  });

  for (const slider of document.querySelectorAll("[data-pictures]")) {
    slider.addEventListener("input", () => {
      const place = document.getElementById(slider.dataset.pictures);
      for (const image of place.querySelectorAll("[data-place]")) image.hidden = image.dataset.place !== slider.value;
      const words = slider.dataset.steps.split("|")[Number(slider.value)];
      slider.setAttribute("aria-valuetext", words);
      slider.nextElementSibling.textContent = words;
    });
  }

  for (const button of document.querySelectorAll(".enlarge")) {
    button.addEventListener("click", () => {
      const large = button.closest("figure").classList.toggle("large");
      button.setAttribute("aria-expanded", String(large));
      button.textContent = large ? "Smaller" : "Larger";
    });
  }

  dark.addEventListener("change", () => {
    repaint.forEach((set) => set());
    draw();
  });
  show(tabs[0]);
})();
