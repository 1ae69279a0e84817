"use strict";
/* Theme, table tools, copying, values under the pointer. The page is whole without it. */
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const themes = ["auto", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("gramian-theme"); } catch { return null; } };
  const asked = new URLSearchParams(location.hash.slice(1)).get("theme");
  let theme = themes.find((t) => t === (asked || stored())) || "auto";
  const applyTheme = () => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
  };
  applyTheme(); // before the first paint

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text; // never innerHTML: names are text
    return element;
  };

  function themeButton(button) {
    const show = () => {
      button.textContent = theme[0].toUpperCase() + theme.slice(1);
      button.setAttribute("aria-label", `Colors: ${theme === "auto" ? "automatic" : theme}`);
    };
    show();
    button.addEventListener("click", () => {
      theme = themes[(themes.indexOf(theme) + 1) % themes.length];
      try { localStorage.setItem("gramian-theme", theme); } catch { /* a sandboxed frame has no storage */ }
      applyTheme();
      show();
    });
  }

  function tableTools(figure) {
    const body = figure.querySelector("tbody");
    const first = [...body.rows].filter((row) => !row.classList.contains("beyond")).length;
    const headers = [...figure.querySelectorAll("th")];
    const closeDetails = () => {
      body.querySelectorAll("tr.detail").forEach((row) => row.remove());
      body.querySelectorAll("tr.open").forEach((row) => row.classList.remove("open"));
    };
    const sortBy = (header, column) => {
      closeDetails();
      const descending = header.getAttribute("aria-sort") === "ascending"
        || (header.getAttribute("aria-sort") === "none" && header.classList.contains("number"));
      headers.forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const words = new Intl.Collator("en", { numeric: true });
      const rows = [...body.rows].map((row) => {
        const cell = row.cells[column];
        const key = cell.dataset.key;
        const value = key === undefined ? null : key === "" ? NaN : Number(key.replace("inf", "Infinity"));
        return { row, value, text: cell.textContent };
      });
      rows.sort((a, b) => {
        if (a.value === null || b.value === null) return (descending ? -1 : 1) * words.compare(a.text, b.text);
        // Unknown numbers stay last in either order.
        if (Number.isNaN(a.value) || Number.isNaN(b.value)) return Number.isNaN(a.value) - Number.isNaN(b.value);
        return a.value === b.value ? 0 : (descending ? -1 : 1) * (a.value < b.value ? -1 : 1);
      });
      rows.forEach(({ row }, place) => row.classList.toggle("beyond", place >= first));
      body.append(...rows.map(({ row }) => row));
    };
    headers.forEach((header, column) => {
      // Not a <button>: Chromium does not repeat a header with one on every printed page.
      const button = header.querySelector("span");
      button.tabIndex = 0;
      button.setAttribute("role", "button");
      button.addEventListener("click", () => sortBy(header, column));
      button.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        sortBy(header, column);
      });
    });
    const more = figure.querySelector(".more");
    let opened = !more;
    if (more) more.addEventListener("click", () => { opened = true; figure.classList.add("all"); });
    const filter = figure.querySelector(".tools input");
    if (!filter) return;
    const count = figure.querySelector(".count");
    const total = body.rows.length;
    filter.addEventListener("input", () => {
      closeDetails();
      const wanted = filter.value.trim().toLowerCase();
      figure.classList.toggle("all", wanted !== "" || opened);
      let shown = 0;
      for (const row of body.rows) {
        const fits = row.textContent.toLowerCase().includes(wanted);
        row.classList.toggle("filtered", !fits);
        shown += fits;
      }
      count.textContent = wanted ? `${shown.toLocaleString("en")} of ${total.toLocaleString("en")} rows` : `${total.toLocaleString("en")} rows`;
    });
  }

  const namespace = document.createRange().createContextualFragment(`<${"svg"}></svg>`).firstChild.namespaceURI; // fixed text
  const svg = (tag, attributes, text) => {
    const element = document.createElementNS(namespace, tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  /* A row's curve on a logarithmic axis, drawn when it is asked for: 500 of them drawn at once would be slow. */
  function spectrum(detail) {
    const [width, height, left, right, top, bottom] = [520, 230, 58, 14, 22, 36];
    const points = detail.points.filter(([, y]) => y > 0);
    const sheet = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${detail.y} by ${detail.x}` });
    if (points.length < 2) return null;
    const logs = points.map(([, y]) => Math.log10(y));
    if (detail.reference) logs.push(Math.log10(detail.reference[0]));
    let high = Math.max(...logs), low = Math.max(Math.min(...logs), high - 8);
    if (high - low < 0.2) { high += 0.1; low -= 0.1; }
    const last = points[points.length - 1][0];
    const px = (x) => left + ((x - 1) / Math.max(1, last - 1)) * (width - left - right);
    const py = (y) => top + ((high - Math.max(Math.log10(y), low)) / (high - low)) * (height - top - bottom);
    for (let i = 0; i <= 4; i += 1) {
      const y = 10 ** (low + ((high - low) * i) / 4);
      sheet.append(svg("line", { x1: left, x2: width - right, y1: py(y), y2: py(y), class: "grid" }));
      sheet.append(svg("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, y >= 0.01 && y < 1e4 ? String(+y.toPrecision(2)) : y.toExponential(0)));
      const x = Math.round(1 + ((last - 1) * i) / 4);
      sheet.append(svg("text", { x: px(x), y: height - bottom + 17, "text-anchor": i === 4 ? "end" : "middle" }, String(x)));
    }
    sheet.append(svg("text", { x: left, y: 12 }, detail.y), svg("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, detail.x));
    if (detail.reference && Math.log10(detail.reference[0]) >= low) {
      const y = py(detail.reference[0]);
      sheet.append(svg("line", { x1: left, x2: width - right, y1: y, y2: y, class: "reference" }));
      sheet.append(svg("text", { x: width - right, y: y - 5, "text-anchor": "end" }, detail.reference[1]));
    }
    sheet.append(svg("polyline", { points: points.map(([x, y]) => `${px(x)},${py(y)}`).join(" "), class: "curve" }));
    return sheet;
  }

  function rowDetails(figure) {
    if (!figure.dataset.details) return;
    let details = null; // parsed at the first click
    const rows = [...figure.querySelectorAll("tbody tr")];
    const toggle = (row, place) => {
      if (row.nextElementSibling && row.nextElementSibling.classList.contains("detail")) {
        row.nextElementSibling.remove();
        row.classList.remove("open");
        return;
      }
      details = details || JSON.parse(figure.dataset.details);
      const detail = details[place];
      const box = make("div", "panel");
      const list = make("dl");
      for (const [label, value] of detail.facts) list.append(make("dt", "", label), make("dd", "", value));
      const side = make("div");
      side.append(make("h4", "", detail.title));
      const drawn = spectrum(detail);
      if (drawn) side.append(drawn);
      box.append(side, list);
      const cell = make("td", "holder");
      cell.colSpan = row.cells.length;
      cell.append(box);
      const extra = make("tr", "detail");
      extra.append(cell);
      row.after(extra);
      row.classList.add("open");
    };
    rows.forEach((row, place) => {
      row.classList.add("opens");
      row.tabIndex = 0;
      row.addEventListener("click", () => { if (!String(getSelection())) toggle(row, place); });
      row.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(row, place); });
    });
  }

  function copyButton(button) {
    const code = button.parentElement.querySelector("code");
    const tell = (word) => { button.textContent = word; setTimeout(() => { button.textContent = "Copy"; }, 1500); };
    const select = () => { getSelection().selectAllChildren(code); tell(document.execCommand("copy") ? "Copied" : "Selected"); };
    button.addEventListener("click", () => {
      if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(() => tell("Copied"), select);
      else select();
    });
  }

  function hoverValues(drawing) {
    const data = JSON.parse(drawing.dataset.hover);
    const svg = drawing.querySelector("svg");
    const cursor = make("div", "cursor");
    const tip = make("div", "tip");
    const hide = () => { cursor.remove(); tip.remove(); };
    drawing.addEventListener("pointerleave", hide);
    drawing.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const scale = box.width / data.width;
      const x = (event.clientX - box.left) / scale;
      let best = null;
      for (const curve of data.curves) for (const point of curve.points) {
        if (best === null || Math.abs(point[0] - x) < Math.abs(best - x)) best = point[0];
      }
      if (best === null || Math.abs(best - x) > 40) return hide();
      const lines = data.curves.map((curve) => {
        let near = null;
        for (const point of curve.points) if (near === null || Math.abs(point[0] - best) < Math.abs(near[0] - best)) near = point;
        return near && Math.abs(near[0] - best) < 3 ? { curve, near } : null;
      }).filter(Boolean);
      tip.replaceChildren(make("div", "", lines[0].near[2]));
      for (const { curve, near } of lines) {
        const line = make("div");
        const swatch = make("span", "swatch");
        swatch.style.color = curve.color;
        line.append(swatch, make("b", "", near[3]), ` ${curve.label}`);
        tip.append(line);
      }
      const frame = drawing.getBoundingClientRect();
      const left = box.left - frame.left + best * scale;
      cursor.style.left = `${left}px`;
      cursor.style.top = `${box.top - frame.top + data.top * scale}px`;
      cursor.style.height = `${(data.bottom - data.top) * scale}px`;
      drawing.append(cursor, tip);
      const right = left + 14 + tip.offsetWidth > frame.width;
      tip.style.left = `${Math.max(0, right ? left - 14 - tip.offsetWidth : left + 14)}px`;
      tip.style.top = `${box.top - frame.top + data.top * scale}px`;
    });
  }

  addEventListener("DOMContentLoaded", () => {
    themeButton(document.getElementById("theme"));
    document.querySelectorAll("figure.table").forEach(tableTools);
    document.querySelectorAll("figure.table").forEach(rowDetails);
    document.querySelectorAll(".copy").forEach(copyButton);
    document.querySelectorAll("[data-hover]").forEach(hoverValues);
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
})();
