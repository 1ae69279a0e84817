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

  /* Findings by severity, and by what stands in them: code, layer, words. */
  function findingTools(list) {
    const tools = list.querySelector(".tools");
    if (!tools) return;
    const cards = [...list.querySelectorAll(".finding")];
    const toggles = [...tools.querySelectorAll("[data-severity]")];
    const [filter, count] = [tools.querySelector("input"), tools.querySelector(".count")];
    const show = () => {
      const wanted = filter.value.trim().toLowerCase();
      const off = toggles.filter((one) => one.getAttribute("aria-pressed") === "false").map((one) => one.dataset.severity);
      let shown = 0;
      for (const card of cards) {
        const codes = [card, ...card.querySelectorAll("[data-code]")].map((one) => one.dataset.code).join(" ");
        const fits = `${card.textContent} ${codes}`.toLowerCase().includes(wanted) && !off.some((one) => card.classList.contains(one));
        card.classList.toggle("filtered", !fits);
        shown += fits;
      }
      count.textContent = shown < cards.length ? `${shown} of ${cards.length} findings` : "";
    };
    filter.addEventListener("input", show);
    toggles.forEach((one) => one.addEventListener("click", () => {
      one.setAttribute("aria-pressed", String(one.getAttribute("aria-pressed") === "false"));
      show();
    }));
    tools.querySelectorAll("[data-fold]").forEach((button) => button.addEventListener("click", () => {
      cards.forEach((card) => { card.open = button.dataset.fold === "open"; });
    }));
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

  /* A line and a box with values over a drawing, at a place in its own pixels. */
  function pointer(drawing) {
    const cursor = make("div", "cursor");
    const tip = make("div", "tip");
    return {
      hide() { cursor.remove(); tip.remove(); },
      show(x, top, bottom, heading, lines) {
        const box = drawing.querySelector("svg").getBoundingClientRect();
        const frame = drawing.getBoundingClientRect();
        const scale = box.width / drawing.querySelector("svg").viewBox.baseVal.width;
        tip.replaceChildren(make("div", "", heading));
        for (const [label, color, value] of lines) {
          const line = make("div");
          const swatch = make("span", "swatch");
          swatch.style.color = color;
          line.append(swatch, make("b", "", value), ` ${label}`);
          tip.append(line);
        }
        const left = box.left - frame.left + x * scale;
        cursor.style.left = `${left}px`;
        tip.style.top = cursor.style.top = `${box.top - frame.top + top * scale}px`;
        cursor.style.height = `${(bottom - top) * scale}px`;
        drawing.append(cursor, tip);
        const right = left + 14 + tip.offsetWidth > frame.width;
        tip.style.left = `${Math.max(0, right ? left - 14 - tip.offsetWidth : left + 14)}px`;
      },
    };
  }

  function hoverValues(drawing) {
    const data = JSON.parse(drawing.dataset.hover);
    const svg = drawing.querySelector("svg");
    const { hide, show } = pointer(drawing);
    drawing.addEventListener("pointerleave", hide);
    drawing.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / (box.width / data.width);
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
      return show(best, data.top, data.bottom, lines[0].near[2], lines.map(({ curve, near }) => [curve.label, curve.color, near[3]]));
    });
  }

  const told = (y) => (y === 0 ? "0" : y >= 0.01 && y < 1e4 ? String(+y.toPrecision(3)) : y.toExponential(1));

  /* The row and the value under the pointer of a heat map. */
  function heatValues(figure) {
    const data = JSON.parse(figure.dataset.cells);
    const most = Math.max(...data.rows.map((row) => row.length));
    for (const drawing of figure.querySelectorAll("[data-box]")) {
      const [full, left, top, width, height] = JSON.parse(drawing.dataset.box);
      const { hide, show } = pointer(drawing);
      drawing.addEventListener("pointerleave", hide);
      drawing.addEventListener("pointermove", (event) => {
        const box = drawing.querySelector("svg").getBoundingClientRect();
        const scale = box.width / full;
        const column = Math.floor((((event.clientX - box.left) / scale - left) / width) * most);
        const row = Math.floor((((event.clientY - box.top) / scale - top) / height) * data.rows.length);
        if (row < 0 || row >= data.rows.length || column < 0 || column >= most) return hide();
        const value = data.rows[row][column];
        const line = [value === undefined ? `only ${data.rows[row].length} values` : `value ${column}`, "transparent", value === undefined ? "" : value === null ? "not finite" : told(value)];
        return show(left + ((column + 0.5) / most) * width, top, top + height, data.names[row], [line]);
      });
    }
  }

  /* A name of at most 14 characters, cut in its middle, as `elide` does. */
  const elided = (name) => (name.length > 14 ? `${name.slice(0, 5)}…${name.slice(-8)}` : name);

  /* The network by depth: values at the pointer or at the key's place, and zoom, for both widths of the drawing at once. */
  function depthTools(figure) {
    const data = JSON.parse(figure.dataset.depth);
    const count = data.names.length;
    const drawings = [...figure.querySelectorAll(".drawing")];
    const here = figure.querySelector(".here");
    let from = 0, to = count; // places shown: from ≤ place < to
    let at = -1;
    const pointers = new Map(drawings.map((drawing) => [drawing, pointer(drawing)]));
    const edges = (drawing) => {
      const [first, last] = [drawing.querySelector(".lane"), [...drawing.querySelectorAll(".lane")].pop()];
      const number = (lane, name) => lane[name].baseVal.value;
      return { left: number(first, "x"), width: number(first, "width"), top: number(first, "y"), bottom: number(last, "y") + number(last, "height") };
    };
    const placeAt = (drawing, clientX) => {
      const svg = drawing.querySelector("svg");
      const box = svg.getBoundingClientRect();
      const { left, width } = edges(drawing);
      const share = ((clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / width;
      return Math.min(to - 1, Math.max(from, from + Math.floor(share * (to - from))));
    };
    const tell = (place) => {
      at = place;
      const lines = data.lanes.map(([label, color, values]) => [label, color, values[place]]);
      const heading = data.names[place];
      for (const drawing of drawings) {
        const { left, width, top, bottom } = edges(drawing);
        if (drawing.offsetParent) pointers.get(drawing).show(left + ((place - from + 0.5) / (to - from)) * width, top, bottom, heading, lines);
      }
      return `${heading}. ${lines.map(([label, , value]) => `${label} ${value}`).join("; ")}`;
    };
    const hide = () => pointers.forEach((one) => one.hide());
    const zoom = (first, last) => {
      const size = Math.min(count, Math.max(Math.min(4, count), Math.round(last - first)));
      from = Math.max(0, Math.min(count - size, Math.round(first)));
      to = from + size;
      hide();
      for (const drawing of drawings) {
        drawing.querySelectorAll(".lane").forEach((lane) => lane.setAttribute("viewBox", `${from - 0.5} 0 ${to - from} 1`));
        const ticks = drawing.querySelector(".ticks");
        const [left, width, y] = [ticks.dataset.left, ticks.dataset.width, ticks.dataset.y].map(Number);
        const room = 120; // pixels for a name
        const most = Math.max(2, Math.floor(width / room));
        const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((s) => (to - from) / s <= most) || 10000;
        const pointed = drawing.querySelector(".pointer");
        if (pointed) {
          const place = Number(pointed.dataset.place);
          pointed.style.display = place < from || place >= to ? "none" : "";
          pointed.firstChild.setAttribute("x", left + ((place - from + 0.5) / (to - from)) * width + Number(pointed.dataset.shift));
        }
        const marks = [];
        for (let place = Math.ceil(from / step) * step; place < to; place += step) {
          const x = ((place - from + 0.5) / (to - from)) * width;
          const anchor = x > width - room / 2 ? "end" : x < room / 2 ? "start" : "middle";
          marks.push(svg("text", { x: left + x, y, "text-anchor": anchor, "font-size": 11.5 }, elided(data.names[place])));
        }
        ticks.replaceChildren(...marks);
      }
      here.textContent = to - from < count ? `Shown: ${to - from} of ${count}, ${data.names[from]} … ${data.names[to - 1]}` : "";
    };
    const scale = (factor) => {
      const middle = at >= from && at < to ? at + 0.5 : (from + to) / 2;
      zoom(middle - ((to - from) * factor) / 2, middle + ((to - from) * factor) / 2);
    };
    const actions = { in: () => scale(0.5), out: () => scale(2), all: () => zoom(0, count) };
    figure.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", actions[button.dataset.zoom]));
    for (const drawing of drawings) {
      let start = null;
      let range = null;
      drawing.tabIndex = 0;
      drawing.setAttribute("role", "group");
      drawing.setAttribute("aria-label", "Values by place: arrow keys walk, plus and minus zoom, escape shows all");
      drawing.addEventListener("pointerdown", (event) => { if (event.button === 0) start = event.clientX; });
      drawing.addEventListener("pointermove", (event) => {
        tell(placeAt(drawing, event.clientX));
        if (start === null || Math.abs(event.clientX - start) < 6) return;
        event.preventDefault();
        if (range === null) { range = make("div", "range"); drawing.append(range); getSelection().removeAllRanges(); }
        const frame = drawing.getBoundingClientRect();
        range.style.left = `${Math.min(start, event.clientX) - frame.left}px`;
        range.style.width = `${Math.abs(event.clientX - start)}px`;
        range.style.top = "14px";
        range.style.bottom = "0";
      });
      const end = (event) => {
        if (range !== null && event.type === "pointerup") {
          const [a, b] = [placeAt(drawing, start), placeAt(drawing, event.clientX)];
          zoom(Math.min(a, b), Math.max(a, b) + 1);
        }
        if (range !== null) range.remove();
        start = range = null;
        if (event.type === "pointerleave") hide();
      };
      for (const kind of ["pointerup", "pointerleave", "pointercancel"]) drawing.addEventListener(kind, end);
      drawing.addEventListener("blur", hide);
      drawing.addEventListener("keydown", (event) => {
        if (event.ctrlKey || event.metaKey || event.altKey) return;
        const walk = { ArrowLeft: Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, count - 1), Home: 0, End: count - 1 }[event.key];
        if (walk !== undefined) {
          if (walk < from || walk >= to) zoom(walk < from ? walk : walk - (to - from) + 1, walk < from ? walk + to - from : walk + 1);
          here.textContent = tell(walk);
        } else if (event.key === "+" || event.key === "=") actions.in();
        else if (event.key === "-") actions.out();
        else if (event.key === "Escape") actions.all();
        else return;
        event.preventDefault();
      });
    }
  }

  addEventListener("DOMContentLoaded", () => {
    themeButton(document.getElementById("theme"));
    document.querySelectorAll("figure.table").forEach(tableTools);
    document.querySelectorAll("figure.table").forEach(rowDetails);
    document.querySelectorAll(".copy").forEach(copyButton);
    document.querySelectorAll("[data-hover]").forEach(hoverValues);
    document.querySelectorAll("[data-depth]").forEach(depthTools);
    document.querySelectorAll("[data-cells]").forEach(heatValues);
    document.querySelectorAll(".findings").forEach(findingTools);
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
})();
