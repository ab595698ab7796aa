// The values under the pointer, read from the drawn paths: in reports and on the page.
"use strict";
(() => {
  const show = (number) => {
    if (number === 0) return "0";
    const size = Math.abs(number);
    return size < 1e-3 ? number.toExponential(2) : size < 1e4 ? String(+number.toPrecision(4)) : Math.round(number).toLocaleString("en");
  };
  const range = (text) => text.split(" ").map(Number);
  const clear = () => document.querySelectorAll(".rule, .tip").forEach((part) => part.remove());

  document.addEventListener("pointermove", (event) => {
    const plot = event.target.closest?.(".plot");
    clear();
    if (!plot) return;
    const box = plot.getBoundingClientRect();
    const pointer = ((event.clientX - box.left) / box.width) * 1000;
    const [left, right] = range(plot.dataset.x), [low, high] = range(plot.dataset.y);
    const value = (part) => (plot.dataset.log === "1" ? low * (high / low) ** part : low + (high - low) * part);
    const curves = [...plot.querySelectorAll("[data-name]")].map((path) => ({
      path, points: [...path.getAttribute("d").matchAll(/[ML]([-\d.]+) ([-\d.]+)/g)].map((match) => [+match[1], +match[2]]),
    })).filter((curve) => curve.points.length);
    if (!curves.length) return;
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - pointer) < Math.abs(a[0] - pointer) ? b : a));
    const place = nearest(curves.map((curve) => nearest(curve.points)))[0];
    const rule = document.createElement("div"), tip = document.createElement("div"), head = document.createElement("div");
    rule.className = "rule";
    rule.style.left = `${place / 10}%`;
    tip.className = "tip";
    head.textContent = `${plot.dataset.by} ${show(left + ((right - left) * place) / 1000)}`;
    tip.append(head);
    for (const { path, points } of curves) {
      const point = nearest(points);
      if (Math.abs(point[0] - place) > 30) continue;
      const row = document.createElement("div");
      row.className = path.getAttribute("class").split(" ").find((name) => /^c\d$/.test(name));
      row.textContent = `${path.dataset.name}: ${show(value(1 - point[1] / 1000))}`;
      tip.append(row);
    }
    tip.style[place < 500 ? "left" : "right"] = `calc(${place < 500 ? place / 10 : 100 - place / 10}% + 8px)`;
    plot.append(rule, tip);
    const edge = tip.getBoundingClientRect();
    tip.style.transform = `translateX(${Math.min(0, innerWidth - 8 - edge.right) + Math.max(0, 8 - edge.left)}px)`;
  });
  document.addEventListener("pointerleave", clear);
})();
