"use strict";
const read = (id) => { const at = document.getElementById(id); return at ? JSON.parse(at.textContent) : null; };
const specs = read("specs");
const themes = read("themes");
const root = document.documentElement;

// --- theme and charts: ?theme=dark or #dark, else what the reader's system prefers; the button switches ---
let drawing = 0;

function theme() {
  return root.dataset.theme;
}

async function draw() {
  const mine = ++drawing;
  for (const panel of document.querySelectorAll(".panel")) {
    const config = { ...themes[theme()], font: getComputedStyle(document.body).fontFamily };
    const actions = { export: { svg: true, png: true }, source: false, compiled: false, editor: false };
    const options = { mode: "vega-lite", config, actions, renderer: "svg", tooltip: { theme: theme() } };
    try {
      await window.vegaEmbed(panel, specs[panel.dataset.chart], options);
    } catch (error) {
      panel.textContent = "this chart could not be drawn: " + error.message;
      console.error(error);
    }
    if (mine !== drawing) return;
  }
  root.dataset.drawn = "yes";
}

function set(name) {
  root.dataset.theme = name;
  draw();
}

const asked = new URLSearchParams(location.search).get("theme") || (location.hash === "#dark" ? "dark" : "");
const prefers = matchMedia("(prefers-color-scheme: dark)");
prefers.addEventListener("change", () => set(prefers.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => set(theme() === "dark" ? "light" : "dark"));
set(asked === "dark" || asked === "light" ? asked : prefers.matches ? "dark" : "light");

// --- tables: a click on a column's head sorts by it, a second one the other way round; the box filters ---
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[i].dataset.key;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what has no value comes last
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    body.append(...rows);
  }));
  const box = table.closest("section").querySelector(".filter");
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/);
    for (const row of body.rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}

// --- samples: what a model wrote is put in place as text, never as markup ---
const data = read("samples-data");
if (data) {
  const at = (id) => document.getElementById(id);
  const PAGE = 6;
  let page = 0;
  const all = "all";
  const fill = (select, values) => select.replaceChildren(...[all, ...values].map((v) => new Option(v, v)));
  const distinct = (name) => [...new Set(data.rows.map((row) => row[name]))];
  fill(at("s-set"), distinct("set"));
  fill(at("s-round"), distinct("round").sort((a, b) => a - b).map(String));
  fill(at("s-verdict"), ["correct", "not correct"]);
  fill(at("s-reason"), distinct("reason").sort());

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  function chosen() {
    const [set, round, verdict, reason] = ["set", "round", "verdict", "reason"].map((n) => at("s-" + n).value);
    const text = at("s-text").value.toLowerCase();
    return data.rows.filter((row) =>
      (set === all || row.set === set) && (round === all || String(row.round) === round) &&
      (verdict === all || row.ok === (verdict === "correct")) && (reason === all || row.reason === reason) &&
      (!text || [data.prompts[row.prompt], row.text, row.answer, row.gold].some((s) => s.toLowerCase().includes(text))));
  }

  function card(row) {
    const made = element("div", row.ok ? "card right" : "card");
    const head = element("div", "head");
    head.append(element("b", "", (row.ok ? "✓ " : "✗ ") + row.reason));
    head.append(element("span", "", "round " + row.round + ", " + row.set + (row.sample ? ", sample " + row.sample : "")));
    if (row.tokens !== null) head.append(element("span", "", row.tokens + " tokens"));
    if (row.entropy !== null) head.append(element("span", "", "entropy " + row.entropy + " nats in all"));
    made.append(head, element("div", "label", "prompt"), element("pre", "", data.prompts[row.prompt]));
    const cut = row.length > data.longest ? " (the first " + data.longest + " of " + row.length + " characters)" : "";
    made.append(element("div", "label", "completion" + cut), element("pre", "", row.text));
    made.append(element("div", "foot", "answer read: " + (row.answer || "none") + " · gold: " + row.gold));
    return made;
  }

  function show() {
    const rows = chosen();
    const last = Math.max(0, Math.ceil(rows.length / PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    at("s-cards").replaceChildren(...rows.slice(page * PAGE, (page + 1) * PAGE).map(card));
    const to = Math.min(rows.length, (page + 1) * PAGE);
    at("s-at").textContent = rows.length ? `${page * PAGE + 1}–${to} of ${rows.length}` : "no sample fits";
    at("s-prev").disabled = page === 0;
    at("s-next").disabled = page === last;
    const [set, round] = [at("s-set").value, at("s-round").value];
    const parts = data.shown.filter((s) => (set === all || s.set === set) && (round === all || String(s.round) === round));
    const sum = (name) => parts.reduce((total, part) => total + part[name], 0);
    at("s-shown").textContent = `this page holds ${sum("shown")} of ${sum("of")} samples of this choice, evenly over problems`;
  }

  for (const id of ["s-set", "s-round", "s-verdict", "s-reason", "s-text"]) {
    at(id).addEventListener("input", () => { page = 0; show(); });
  }
  at("s-prev").addEventListener("click", () => { page -= 1; show(); });
  at("s-next").addEventListener("click", () => { page += 1; show(); });
  show();
}
