"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const page = read("page"), rows = read("rows");
  const $ = (id) => document.getElementById(id);
  const STEP = 24, PRINTED = 600, CELL = 44, MADE = 64, GAP = 4, AHEAD = 800, COLOURED = 0.5, ALIKE = 0.7;

  // --- pictures: a sheet is decoded when the first card that needs it comes into view ---
  const sheets = [];
  const sheet = (i) => sheets[i] || (sheets[i] = new Promise((done) => {
    const image = new Image();
    // As a bitmap it is decoded once, not anew for every picture drawn from it.
    image.onload = () => createImageBitmap(image).then(done, () => done(image));
    image.onerror = () => done(null);
    image.src = $("sheet-" + i).textContent;
  }));
  const draw = async (context, place, x, y, side) => {
    const [i, left, top, width, height] = place;
    const image = await sheet(i);
    if (!image) return;
    const scale = side / Math.max(width, height);
    context.imageSmoothingEnabled = scale < 2.5;
    const w = width * scale, h = height * scale;
    context.drawImage(image, left, top, width, height, x + (side - w) / 2, y + (side - h) / 2, w, h);
  };
  // All pictures of a canvas. Read and put back, they are pixels: what is drawn is printed as whole sheets, for minutes.
  const paint = async (context, places) => {
    await Promise.all(places.map((place) => draw(context, ...place)));
    const { width, height } = context.canvas;
    context.putImageData(context.getImageData(0, 0, width, height), 0, 0);
  };

  // --- small helpers; text is only ever set as text ---
  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const SVG = "http://www.w3.org/2000/svg";
  const shape = (name, attributes, text) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const fixed = (x, digits) => Number(x.toFixed(digits)) === 0 ? (0).toFixed(digits) : x.toFixed(digits).replace("-", "−");
  const signed = (x, digits = 4) => (Number(x.toFixed(digits)) < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
  const short = (text, n) => (text.length > n ? text.slice(0, n - 1) + "…" : text);
  const canvas = (side, label) => {
    const ratio = Math.max(1, Math.min(2, window.devicePixelRatio || 1));
    const element = make("canvas", { width: side * ratio, height: side * ratio, role: "img", "aria-label": label });
    element.style.width = element.style.height = side + "px";
    const context = element.getContext("2d", { willReadFrequently: true });
    context.scale(ratio, ratio);
    return [element, context];
  };

  // --- one card ---
  const bars = (row) => {
    const found = row.b, height = 16, top = 15;
    const figure = make("figure"), q = found.q < 0.001 ? "q < 0.001" : "q " + found.q.toFixed(3);
    figure.append(make("figcaption", {}, found.speaks ? `Treats classes differently (${q})` : `No class stands out (${q})`));
    const svg = shape("svg", { class: "wide", viewBox: `0 0 250 ${top + height * found.entries.length}`, role: "img",
      "aria-label": found.entries.map((e) => `${e[0]}: loss ${signed(e[5] || 0, 3)}, class-CAR ${signed(e[2] || 0, 2)} from ${signed(e[3], 2)} to ${signed(e[4], 2)}`).join("; ") });
    // Two scales: the loss in nats, and class-CAR with its interval.
    const scale = (values, left, width) => {
      const low = Math.min(0, ...values), high = Math.max(0, ...values), unit = width / (high - low || 1);
      return { zero: left - low * unit, unit };
    };
    const loss = scale(found.entries.map((e) => e[5] || 0), 74, 52);
    const car = scale(found.entries.flatMap((e) => [e[2], e[3], e[4]]), 180, 68);
    svg.append(shape("text", { x: 0, y: 9, class: "soft" }, "class"), shape("text", { x: 74, y: 9, class: "soft" }, "loss, nats"),
      shape("text", { x: 180, y: 9, class: "soft" }, "class-CAR"));
    found.entries.forEach(([label, n, value, a, b, rise, named], i) => {
      const y = top + i * height, middle = y + height / 2;
      const text = shape("text", { x: 0, y: y + 12, class: found.speaks && named ? "named" : "soft" }, short(label, 11));
      if (found.speaks && named) text.setAttribute("font-weight", "650");
      text.append(shape("title", {}, `${label}, ${n} images: loss ${signed(rise || 0, 3)}, class-CAR ${signed(value, 3)} [${signed(a, 3)}, ${signed(b, 3)}]`));
      const bar = (x, length, negative) => shape("rect", { class: negative ? "minus" : "plus", x: negative ? x - length : x, y: y + 4, width: Math.max(length, 0.6), height: height - 8, rx: 1 });
      svg.append(text, bar(loss.zero, Math.abs(rise || 0) * loss.unit, rise < 0),
        shape("text", { x: 130, y: y + 12, class: "soft" }, signed(rise || 0, 2)),
        bar(car.zero, Math.abs(value || 0) * car.unit, value < 0),
        shape("path", { class: "whisker", d: `M${car.zero + a * car.unit} ${middle}H${car.zero + b * car.unit}m0 -2.5v5M${car.zero + a * car.unit} ${middle - 2.5}v5` }));
    });
    const bottom = top + height * found.entries.length;
    for (const x of [loss.zero, car.zero]) svg.append(shape("line", { class: "axis", x1: x, x2: x, y1: top, y2: bottom }));
    figure.append(svg);
    return figure;
  };

  const card = (row) => {
    const layer = page.layers[row.l];
    const item = make("li", { class: "card" + (row.x ? " removed" : ""), id: `f-${row.n}`, tabindex: "-1" });
    const head = make("h3", {}, make("span", { class: "num" }, `#${row.i}`), make("span", { class: "where" }, layer[0]));
    for (const [on, text] of [[row.x, "removed"], [row.d, "never responds"], [row.s, "protected"]]) {
      if (on) head.append(make("span", { class: "tag " + (text === "removed" ? "removed" : row.d ? "dead" : "") }, text));
    }
    const pictures = make("div", { class: "pics" });
    item.append(head, pictures);
    if (row.p) {
      const side = 3 * CELL + 2 * GAP;
      const names = row.p.map(([image]) => page.images[image]);
      const [grid, context] = canvas(side, "Strongest patches: " + names.join(", "));
      grid.title = names.join("\n");
      paint(context, row.p.map(([, ...place], k) => [place, (k % 3) * (CELL + GAP), Math.floor(k / 3) * (CELL + GAP), CELL]));
      pictures.append(grid);
    } else {
      pictures.append(make("div", { class: "silent" }, row.d ? "the same response everywhere" : "no pictures"));
    }
    const aside = make("div", { class: "side" });
    if (row.q) {
      const [kernel, context] = canvas(64, "Kernel");
      paint(context, [[row.q, 0, 0, 64]]);
      aside.append(kernel, make("span", {}, "kernel"));
    }
    if (row.z) {
      const [image, context] = canvas(MADE, "Image made to excite the filter");
      paint(context, [[row.z, 0, 0, MADE]]);
      const times = row.u === undefined ? "made" : `made: ${fixed(row.u, 1)}×`;
      aside.append(image, make("span", { title: "response to it, as a multiple of the largest response to an image" }, times));
    }
    if (row.e && !row.d) {
      const names = row.e.slice(0, row.q && row.z ? 0 : row.q || row.z ? 2 : 4).map(([name]) => name);
      if (names.length) aside.append(make("span", { title: "classes with the largest mean response" }, "responds most to"), ...names.map((name) => make("span", {}, short(name, 24))));
    }
    pictures.append(aside);
    const list = make("dl");
    const fact = (name, ...value) => list.append(make("dt", {}, name), make("dd", {}, ...value));
    if (row.v !== undefined) fact("CAR", `${signed(row.v)}, rank ${row.r} of ${layer[2]}` + (row.t ? ` (${row.t} filters leave together)` : ""));
    if (row.h !== undefined) fact("colour", fixed(row.h, 2));
    if (row.a !== undefined) fact("stripes", `${Math.round(row.a)}°`);
    if (row.c !== undefined) fact("contribution", `${(100 * row.c).toFixed(1)} %`);
    if (row.k >= 0) {
      const button = make("button", { type: "button", class: "link" }, String(row.k));
      button.addEventListener("click", () => { $("layer").value = row.l; $("cluster").value = row.k; $("show").value = $("find").value = ""; update(); });
      fact("cluster", button, ` (${sizes.get(row.l + ":" + row.k)} ${sizes.get(row.l + ":" + row.k) > 1 ? "filters" : "filter"})`);
    }
    if (row.w) {
      const near = row.w.flatMap(([index, r], k) => {
        const button = make("button", { type: "button", class: "link" }, `#${index}`);
        button.addEventListener("click", () => go(row.l, index));
        return [k ? ", " : "", make("span", { class: "pair" }, button, ` ${fixed(r, 2)}`)];
      });
      fact("twins", ...near);
    }
    item.append(list);
    if (row.b) item.append(bars(row));
    return item;
  };

  // --- sort, filter, draw as far as is looked at ---
  const sizes = new Map();
  rows.forEach((row, n) => {
    row.n = n;
    const key = row.l + ":" + row.k;
    sizes.set(key, (sizes.get(key) || 0) + 1);
  });
  const none = (x, empty) => (x === undefined ? empty : x);
  const orders = {
    "car-down": (a, b) => none(b.v, -Infinity) - none(a.v, -Infinity) || a.n - b.n,
    "car-up": (a, b) => none(a.v, Infinity) - none(b.v, Infinity) || a.n - b.n,
    order: (a, b) => a.n - b.n,
    cluster: (a, b) => a.l - b.l || (a.k < 0) - (b.k < 0) || a.k - b.k || none(b.c, 0) - none(a.c, 0),
    twin: (a, b) => none(b.w && b.w[0][1], -2) - none(a.w && a.w[0][1], -2) || a.n - b.n,
    colour: (a, b) => none(b.h, -9) - none(a.h, -9) || a.n - b.n,
    contribution: (a, b) => none(b.c, -1) - none(a.c, -1) || a.n - b.n,
  };
  const shown = {
    colour: (row) => row.h >= COLOURED,
    gray: (row) => row.h < COLOURED,
    twin: (row) => Boolean(row.w) && row.w[0][1] >= ALIKE,
    speaks: (row) => Boolean(row.b) && row.b.speaks,
    dead: (row) => Boolean(row.d),
    removed: (row) => Boolean(row.x),
    kept: (row) => !row.x,
  };
  let list = [], drawn = 0;
  const named = (row, text) => {
    if (`${page.layers[row.l][0]} #${row.i}`.toLowerCase().includes(text)) return true;
    const classes = row.b ? row.b.entries.filter((entry) => !row.b.speaks || entry[6]).map((entry) => entry[0]) : [];
    return [...(row.e || []).map((entry) => entry[0]), ...classes].some((name) => name.toLowerCase().includes(text));
  };
  const more = (upTo = drawn + STEP) => {
    const part = document.createDocumentFragment();
    for (; drawn < Math.min(upTo, list.length); drawn += 1) part.append(card(list[drawn]));
    $("cards").append(part);
    $("more").hidden = drawn >= list.length;
  };
  const update = () => {
    const layer = $("layer").value, cluster = $("cluster").value, show = $("show").value;
    const text = $("find").value.trim().toLowerCase();
    list = rows.filter((row) => (layer === "" || row.l === Number(layer)) && (cluster === "" || row.k === Number(cluster))
      && (!shown[show] || shown[show](row)) && (text === "" || named(row, text)));
    list.sort(orders[$("sort").value] || orders.order);
    drawn = 0;
    $("cards").replaceChildren();
    $("count").textContent = counted();
    more();
  };
  const counted = () => `${list.length} of ${rows.length} filters`;
  const go = (layer, index) => {
    const target = rows.find((row) => row.l === layer && row.i === index);
    if (!target) return;
    if (!list.includes(target)) {
      $("tools").reset();
      $("layer").value = layer;
      update();
    }
    more(Math.max(drawn, list.indexOf(target) + 1));
    for (const lit of document.querySelectorAll(".card.lit")) lit.classList.remove("lit");
    const element = $(`f-${target.n}`);
    element.classList.add("lit");
    element.scrollIntoView({ block: "center" });
    element.focus({ preventScroll: true });
  };

  for (const id of ["layer", "sort", "show"]) $(id).addEventListener("change", update);
  for (const id of ["cluster", "find"]) $(id).addEventListener("input", update);
  $("tools").addEventListener("submit", (event) => event.preventDefault());
  $("tools").addEventListener("reset", () => setTimeout(update));
  $("more").addEventListener("click", () => more());
  for (const button of document.querySelectorAll("[data-layer]")) {
    button.addEventListener("click", () => {
      $("tools").reset();
      $("layer").value = button.dataset.layer;
      update();
      $("filters").scrollIntoView();
    });
  }
  new IntersectionObserver((seen) => {
    // A tall window holds several steps, and the observer speaks only once.
    const near = () => drawn < list.length && $("more").offsetParent && $("more").getBoundingClientRect().top < window.innerHeight + AHEAD;
    if (seen.some((entry) => entry.isIntersecting)) while (near()) more();
  }, { rootMargin: AHEAD + "px" }).observe($("more"));
  window.addEventListener("beforeprint", () => {
    more(Math.min(list.length, PRINTED));
    if (list.length > PRINTED) $("count").textContent = `${counted()}; the first ${PRINTED} are printed`;
  });
  window.addEventListener("afterprint", () => { $("count").textContent = counted(); });
  update();
  document.documentElement.dataset.ready = "yes";
})();
