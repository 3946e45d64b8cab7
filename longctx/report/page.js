"use strict";
(() => {
  const tip = document.getElementById("tip");
  const units = {
    percent: (v) => `${(100 * v).toPrecision(3)} %`,
    bytes: (v) => scaled(v, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]),
    seconds: (v) => `${digits(v)} s`,
    number: (v) => (Math.abs(v) >= 1e5 ? scaled(v, 1000, ["", "k", "M", "G", "T"]) : digits(v)),
  };
  const digits = (v) => String(Number(v.toPrecision(5)));
  function scaled(v, base, names) {
    let n = 0;
    while (Math.abs(v) >= base && n < names.length - 1) { v /= base; n += 1; }
    return `${digits(Number(v.toPrecision(4)))} ${names[n]}`;
  }
  function scale(text) {
    const [low, high, start, stop, log] = text.split(",").map(Number);
    const to = log ? Math.log10 : (v) => v;
    return (place) => {
      const v = to(low) + ((place - start) / (stop - start)) * (to(high) - to(low));
      return log ? 10 ** v : v;
    };
  }
  function pointsOf(path) {
    path.points ??= path.getAttribute("d").slice(1).split(" ").map((p) => p.split(",").map(Number));
    return path.points;
  }
  function nearest(points, x) {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle; else high = middle;
    }
    return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
  }
  function row(left, right, colour) {
    const line = document.createElement("div"), name = document.createElement("span");
    const value = document.createElement("b");
    name.textContent = left; value.textContent = right;
    if (colour) { line.className = colour; name.className = "key"; }
    line.append(name, value);
    return line;
  }
  function show(svg, event) {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const x = ((event.clientX - box.left) / box.width) * view.width;
    const toX = scale(svg.dataset.x), toY = scale(svg.dataset.y), unit = units[svg.dataset.unit];
    let best = null;
    const rows = [];
    for (const path of svg.querySelectorAll("path[data-name]")) {
      const point = nearest(pointsOf(path), x);
      if (best === null || Math.abs(point[0] - x) < Math.abs(best - x)) best = point[0];
      const colour = [...path.classList].filter((name) => name.startsWith("run") || name === "again");
      rows.push([path, point, colour.join(" ")]);
    }
    if (best === null) return;
    const cross = svg.querySelector(".cross");
    cross.setAttribute("x1", best); cross.setAttribute("x2", best);
    cross.style.visibility = "visible";
    const told = (v) => units.number(svg.dataset.whole === "1" ? Math.round(v) : Number(v.toPrecision(3)));
    const head = row(svg.dataset.xTitle, told(toX(best)));
    tip.replaceChildren(head, ...rows.map(([path, point, colour]) => {
      const far = Math.abs(point[0] - best) > 3 ? ` at ${told(toX(point[0]))}` : "";
      return row(path.dataset.name + far, unit(toY(point[1])), colour);
    }));
    tip.hidden = false;
    const right = event.clientX + 18 + tip.offsetWidth > innerWidth;
    tip.style.left = `${Math.max(4, right ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 6))}px`;
  }
  for (const svg of document.querySelectorAll("svg.chart")) {
    svg.addEventListener("pointermove", (event) => show(svg, event));
    svg.addEventListener("pointerleave", () => {
      tip.hidden = true;
      svg.querySelector(".cross").style.visibility = "hidden";
    });
  }
  const button = document.getElementById("theme"), root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  button.hidden = false;
  button.addEventListener("click", () => {
    const now = root.dataset.theme ?? (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });
})();
