// Interactive parts of the report's page: three views, the tables, the gallery, an enlarged image, the blind comparison.
// Plain functions over one data object; the hash of the address holds the gallery's state, so a view can be linked.
"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const VIEWS = ["report", "pictures", "blind"];
const PIXELS = 64; // images of at most this side are shown with square pixels

/** Return an element with attributes from properties, and texts or elements as children. */
function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => el("option", { value }, text)));
}

const task = (prompt) => data.prompts[prompt][2];
const nicely = (tag) => tag.replaceAll("_", " ") || "no task";
const promptText = (prompt) => data.prompts[prompt][1] || `(prompt ${data.prompts[prompt][0]}, text unknown)`;
const tasks = [...new Set(data.prompts.map((prompt) => prompt[2]))];
const slots = Math.max(1, ...data.seeds.map((seeds) => seeds.length));

// -- images and scores ------------------------------------------------------------------------------------------------

/** An untrained method has one set of images, shown beside every training seed of the others. */
const slotOf = (method, slot) => (data.seeds[method].length === 1 && data.seeds[method][0] === null ? 0 : slot);

let lastRow = { id: "", lines: [] }; // cache of the row read last, which is needed once per method

function lines(id) {
  const element = byId(id);
  if (element && lastRow.id !== id) lastRow = { id, lines: element.textContent.split("\n") };
  return element && lastRow.lines;
}

/** Return {source, original}, or {reason} without an image. */
function imageOf(method, prompt, slot, index) {
  const at = slotOf(method, slot);
  if (at >= data.seeds[method].length) return { reason: "this method has no such training run" };
  const layer = data.layers.findIndex(([seed, image]) => seed === at && image === index);
  if (layer < 0) return { reason: "not in this page" };
  const line = lines(`t${layer}-${prompt}`)?.[method];
  if (!line) return { reason: document.readyState === "loading" ? "still loading" : "not in this page" };
  if (line.startsWith("!")) return { reason: decodeURIComponent(line.slice(1)) };
  const [bytes, file] = line.split(" ");
  const kind = bytes.startsWith("iVBOR") ? "png" : "webp";
  return { source: `data:image/${kind};base64,${bytes}`, original: data.originals && `${data.originals}/${file}` };
}

function score(measure, method, prompt, slot, index) {
  const seeds = slots;
  return data.scores[measure][method][(prompt * seeds + slotOf(method, slot)) * data.indices.length + index] ?? null;
}

/** Return the mean over a prompt's images and seeds; null without any. */
function meanScore(measure, method, prompt) {
  const size = slots * data.indices.length;
  const known = data.scores[measure][method].slice(prompt * size, (prompt + 1) * size).filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function gain(measure, method, prompt) {
  const [own, base] = [meanScore(measure, method, prompt), meanScore(measure, data.base, prompt)];
  return own === null || base === null ? null : (own - base) * (data.measures[measure].sign || 1);
}

/** The mean score, negative where lower is better. */
function signedScore(measure, method, prompt) {
  const own = meanScore(measure, method, prompt);
  return own === null ? null : own * (data.measures[measure].sign || 1);
}

function shownScore(value, measure, signed = false) {
  if (value === null) return "—";
  const size = Math.abs(value); // a check passes or fails: 1 or 0, not 1.0000
  const text = Number.isInteger(size) ? String(size) : size.toFixed(data.measures[measure].decimals);
  return (value < 0 && Number(text) ? "-" : signed ? "+" : "") + text;
}

/** Return a number in [0, 1) that depends only on the text (FNV-1a, then one Murmur mix). */
function chance(text) {
  let hash = 2166136261;
  for (const letter of text) hash = Math.imul(hash ^ letter.codePointAt(0), 16777619);
  hash = Math.imul(hash ^ (hash >>> 16), 2246822507);
  hash = Math.imul(hash ^ (hash >>> 13), 3266489909);
  return ((hash ^ (hash >>> 16)) >>> 0) / 4294967296;
}

/** What the browser keeps under a name, in ``localStorage`` or for this tab; nothing where it forbids it. */
function stored(place, name, otherwise) {
  try {
    return JSON.parse(place().getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keep a value, or forget it if null; return whether the browser does. */
function store(place, name, value) {
  try {
    if (value === null) place().removeItem(name);
    else place().setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const always = () => localStorage;
const thisTab = () => sessionStorage;

/** Show the pixels of small images, and smooth large ones. */
function sharpen(image) {
  image.classList.toggle("pixels", Math.max(image.naturalWidth, image.naturalHeight) <= PIXELS);
}

// -- tables -----------------------------------------------------------------------------------------------------------

const COLUMNS = `alignbench columns ${data.name}`; // table -> titles of its hidden columns
const MENU_FROM = 5; // columns, from which a table has a menu of them

/** The texts of an element's first line without those for screen readers only, and its notes in small type apart. */
function words(element) {
  const copy = element.cloneNode(true);
  for (const unseen of copy.querySelectorAll(".sr, .hint, .change")) unseen.remove();
  const clean = (text) => text.replace(/\s+/g, " ").trim();
  const small = clean([...copy.querySelectorAll("small")].map((note) => note.textContent).join(" "));
  for (const note of copy.querySelectorAll("small")) note.remove();
  return [clean(copy.textContent), small];
}

/** The number that a cell begins with; null for none. */
function numberIn(cell) {
  const text = cell.dataset.value ?? words(cell)[0].replaceAll(",", "").replace("−", "-").replace(/^[<>≤≥]\s*/, "");
  const number = parseFloat(text);
  return Number.isNaN(number) ? null : number;
}

/** Return the head's cells by column, from the last row that has one for it. A head of several columns is not one's. */
function headsOf(table) {
  const heads = [];
  const taken = []; // rows that a cell from above still covers, by column
  for (const row of table.tHead.rows) {
    let column = 0;
    for (const cell of row.cells) {
      while (taken[column] > 0) taken[column++] -= 1;
      for (let i = 0; i < cell.colSpan; i += 1) taken[column + i] = cell.rowSpan - 1;
      if (cell.colSpan === 1) heads[column] = cell;
      cell.dataset.at = column;
      column += cell.colSpan;
    }
    for (; column < taken.length; column += 1) if (taken[column] > 0) taken[column] -= 1;
  }
  return heads;
}

function setUpTables() {
  let hinted = false;
  for (const box of document.querySelectorAll(".text .scroll")) {
    const table = box.querySelector("table");
    if (!table) continue;
    const about = data.tables[box.dataset.table] ?? {};
    const regular = [...table.tBodies].every((body) => [...body.rows].every((row) => [...row.cells].every((cell) => cell.colSpan * cell.rowSpan === 1)));
    const tools = el("div", { class: "tools", role: "group", "aria-label": `${box.getAttribute("aria-label")}, tools` });
    const heads = headsOf(table);
    box.before(tools);
    const leads = regular && linkCells(table, about);
    if (regular && table.tBodies[0]?.rows.length > 1) heads.forEach((head, column) => sortBy(table, head, column, heads));
    const keys = el("span", { class: "keys" }, "; arrow keys move between them");
    if (leads && !hinted) tools.append(el("span", { class: "hint" }, "A heading sorts. A number leads to its images", keys, "."));
    hinted ||= leads;
    if (regular && heads.length >= MENU_FROM) tools.append(columnMenu(box, table, heads));
    const told = el("span", { class: "told", role: "status" });
    const offer = (name, what, copied) => {
      const button = el("button", { type: "button", "data-copy": name }, `Copy ${what}`);
      button.addEventListener("click", () => {
        const whole = about.cells && (table.dataset.changed || table.querySelector("[hidden]"));
        told.textContent = put(...copied()) ? `Copied${whole ? ": the whole table, in the report's order" : ""}.` : "The browser does not allow copying.";
      });
      tools.append(button);
    };
    const cells = () => about.cells ?? matrixOf(table);
    offer("cells", "table", () => [cells().map((row) => row.map(oneLine).join("\t")).join("\n"), asHtml(cells())]);
    offer("csv", "CSV", () => [asCsv(cells())]);
    if (about.latex) offer("latex", "LaTeX", () => [about.latex]);
    tools.append(told);
  }
  document.addEventListener("copy", copySelection);
}

// -- order of rows

function sortBy(table, head, column, heads) {
  const button = el("button", { type: "button", class: "sort" });
  button.append(...head.childNodes);
  head.append(button);
  const first = /↓/.test(button.textContent) || !isNumeric(table, column) ? "ascending" : "descending"; // the best first
  button.addEventListener("click", () => {
    const next = { [first]: first === "ascending" ? "descending" : "ascending" };
    const now = head.getAttribute("aria-sort");
    const to = now === null ? first : (next[now] ?? null);
    for (const other of heads) other.removeAttribute("aria-sort");
    if (to) head.setAttribute("aria-sort", to);
    orderRows(table, column, to);
  });
}

function isNumeric(table, column) {
  const cells = [...table.tBodies].flatMap((body) => [...body.rows].map((row) => row.cells[column])).filter((cell) => words(cell)[0] !== "—");
  return cells.filter((cell) => numberIn(cell) !== null).length * 2 > cells.length;
}

/** Sort the rows by a column; without a direction into the report's order. What is not measured comes last. */
function orderRows(table, column, direction) {
  const numeric = isNumeric(table, column);
  const turn = direction === "descending" ? -1 : 1;
  if (direction) table.dataset.changed = "sorted";
  else delete table.dataset.changed;
  for (const body of table.tBodies) {
    const rows = [...body.rows];
    rows.forEach((row, i) => (row.dataset.place ??= i));
    const keys = new Map(rows.map((row) => [row, numeric ? numberIn(row.cells[column]) : words(row.cells[column])[0]]));
    const compare = (a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      const last = (key) => Number(key === null || key === "—");
      const by = numeric ? x - y : x.localeCompare(y, undefined, { numeric: true });
      return last(x) - last(y) || turn * by;
    };
    rows.sort((a, b) => (direction && compare(a, b)) || a.dataset.place - b.dataset.place);
    body.append(...rows);
  }
}

// -- columns hidden and shown

function columnMenu(box, table, heads) {
  const name = box.getAttribute("aria-label");
  const titles = heads.map((head) => words(head).filter(Boolean).join(" "));
  const summary = el("summary");
  const note = el("p", { class: "hidden-columns" });
  const choices = titles.slice(1).map((title, i) => {
    const choice = el("input", { type: "checkbox", "data-column": i + 1 });
    return el("label", {}, choice, title);
  });
  const all = el("button", { type: "button" }, "Show all");
  const menu = el("details", { class: "menu" }, summary, el("fieldset", {}, el("legend", { class: "sr" }, `Columns of ${name}`), ...choices, all));
  const inputs = [...menu.querySelectorAll("input")];
  const show = () => {
    const gone = inputs.filter((choice) => !choice.checked).map((choice) => Number(choice.dataset.column));
    hideColumns(table, heads, gone);
    summary.textContent = gone.length ? `Columns (${gone.length} hidden)` : "Columns";
    note.hidden = !gone.length;
    note.textContent = `Hidden columns: ${gone.map((column) => titles[column]).join("; ")}.`;
    return gone.map((column) => titles[column]);
  };
  const change = () => {
    const gone = show();
    const kept = stored(always, COLUMNS, {});
    if (gone.length) kept[name] = gone;
    else delete kept[name];
    store(always, COLUMNS, Object.keys(kept).length ? kept : null);
  };
  menu.addEventListener("input", change);
  all.addEventListener("click", () => {
    for (const choice of inputs) choice.checked = true;
    change();
  });
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    menu.open = false;
    summary.focus();
  });
  document.addEventListener("click", (event) => {
    if (!menu.contains(event.target)) menu.open = false;
  });
  const gone = stored(always, COLUMNS, {})[name] ?? [];
  for (const choice of inputs) choice.checked = !gone.includes(titles[choice.dataset.column]);
  box.after(note);
  show();
  return menu;
}

/** A head over several columns spans those that are left, and goes with the last of them. */
function hideColumns(table, heads, gone) {
  for (const body of table.tBodies) {
    for (const row of body.rows) [...row.cells].forEach((cell, column) => (cell.hidden = gone.includes(column)));
  }
  heads.forEach((head, column) => (head.hidden = gone.includes(column)));
  for (const cell of [...table.tHead.rows].flatMap((row) => [...row.cells])) {
    if (heads.includes(cell)) continue;
    cell.dataset.span ??= cell.colSpan;
    const under = Array.from({ length: Number(cell.dataset.span) }, (_, i) => Number(cell.dataset.at) + i);
    const left = under.filter((column) => !gone.includes(column)).length;
    cell.hidden = !left;
    cell.colSpan = Math.max(1, left);
  }
}

// -- from a number to its images

/** Make the numbers of methods on measures links; return whether there is one. The arrow keys move between them. */
function linkCells(table, about) {
  const links = [];
  [...table.tBodies].flatMap((body) => [...body.rows]).forEach((row, number) => {
    const method = about.methods?.[number];
    if (method === null || method === undefined) return;
    const own = about.measures[number];
    const first = [...row.cells].findIndex((cell) => cell.classList.contains("number"));
    const made = [...row.cells].map((cell, column) => {
      const task = about.tasks[column];
      const measure = about.columns[column] ?? (column === first && own !== null ? own : task === null ? null : about.whole);
      if (!column || measure === null || cell.querySelector("a") || cell.firstElementChild?.matches("[aria-hidden]")) return null;
      const link = el("a", { href: addressOf(toImages(method, measure, task)), tabindex: "-1", class: "to-images" });
      link.append(cell.firstChild);
      cell.prepend(link);
      return link;
    });
    if (made.some(Boolean)) links.push(made);
  });
  if (!links.length) return false;
  links[0].find(Boolean).tabIndex = 0;
  table.addEventListener("focusin", (event) => {
    if (event.target.matches(".to-images")) for (const link of links.flat()) if (link) link.tabIndex = link === event.target ? 0 : -1;
  });
  table.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    const cell = event.target.matches(".to-images") && event.target.closest("td");
    if (!cell || (!down && !right)) return;
    event.preventDefault();
    const step = (from) => (right ? (right > 0 ? from.nextElementSibling : from.previousElementSibling)
      : (down > 0 ? from.parentElement.nextElementSibling : from.parentElement.previousElementSibling)?.cells[from.cellIndex]);
    let to = step(cell);
    while (to && (to.hidden || !to.querySelector(".to-images"))) to = step(to);
    to?.querySelector(".to-images").focus();
  });
  return true;
}

/** The gallery of a method's images beside the base model's, sorted by its gain on a measure, or by its score. */
function toImages(method, measure, tag) {
  const gains = data.base !== null && method !== data.base;
  const { key } = data.measures[measure];
  const found = new URLSearchParams({ evaluator: key, sort: gains ? "gain" : "score", method: data.methods[method], by: key });
  if (tag) found.set("task", `=${tag}`);
  for (const label of new Set([...(gains ? [data.base] : []), method].sort((a, b) => a - b))) found.append("only", data.methods[label]);
  return found;
}

// -- copying

const oneLine = (text) => String(text).replace(/\s+/g, " ").trim();
const isNumber = (text) => /^[-+]?[\d,]*\.?\d+$/.test(text);

/** A text that a spreadsheet would take for a formula gets an apostrophe, as in the report's CSV. */
const noFormula = (text) => (/^[=+\-@\t\r]/.test(text) && !isNumber(text) ? `'${text}` : String(text));

function asCsv(rows) {
  const quoted = (value) => (/[",\r\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  return rows.map((row) => `${row.map(quoted).join(",")}\r\n`).join("");
}

function asHtml(rows) {
  return el("table", {}, ...rows.map((row) => el("tr", {}, ...row.map((text) => el("td", {}, oneLine(text)))))).outerHTML;
}

/** Put text, and where given HTML, on the clipboard; return whether it is there. This also works on pages without TLS. */
function put(text, html = "") {
  let done = false;
  const write = (event) => {
    event.clipboardData.setData("text/plain", text);
    if (html) event.clipboardData.setData("text/html", html);
    event.preventDefault();
    event.stopImmediatePropagation();
    done = true;
  };
  const chosen = document.body.appendChild(el("span", {}, "copied")); // some browsers copy only what is selected
  getSelection().selectAllChildren(chosen);
  document.addEventListener("copy", write, { capture: true });
  document.execCommand("copy");
  document.removeEventListener("copy", write, { capture: true });
  chosen.remove();
  return done;
}

/** Return the texts of the cells that are shown and chosen, an interval in two columns of its own. */
function matrixOf(table, chosen = () => true) {
  const at = (cell) => Number(cell.dataset.at ?? cell.cellIndex);
  const taken = [...table.rows].map((row) => new Map([...row.cells].filter((cell) => !cell.hidden && chosen(cell)).map((cell) => [at(cell), cell])));
  const rows = taken.filter((row) => row.size);
  const columns = [...new Set(rows.flatMap((row) => [...row.keys()]))].sort((a, b) => a - b);
  const ends = (cell) => {
    const small = cell ? words(cell)[1] : "";
    return small === "[unknown]" ? ["unknown", "unknown"] : small.match(/^\[([^,\]]+), ([^\]]+)\]$/)?.slice(1);
  };
  const wide = new Set(columns.filter((column) => rows.some((row) => ends(row.get(column)))));
  return rows.map((row) => columns.flatMap((column) => {
    const cell = row.get(column);
    const [text, small] = cell ? words(cell) : ["", ""];
    const minus = text === "—" ? "" : text.replace(/^−/, "-");
    const plain = isNumber(minus) ? minus.replaceAll(",", "") : noFormula(minus);
    const whole = [plain, small].filter(Boolean).join(" ");
    if (!wide.has(column)) return [whole];
    if (cell?.closest("thead")) return [whole, "low", "high"];
    return ends(cell) ? [plain, ...ends(cell)] : [whole, "", ""];
  }));
}

/** A selection inside one table goes to a spreadsheet cell by cell. */
function copySelection(event) {
  const selection = getSelection();
  if (selection.isCollapsed) return;
  const of = (node) => (node?.nodeType === Node.ELEMENT_NODE ? node : node?.parentElement)?.closest("table");
  const table = of(selection.anchorNode);
  if (!table || of(selection.focusNode) !== table) return;
  const rows = matrixOf(table, (cell) => selection.containsNode(cell, true));
  if (rows.flat().length < 2) return;
  event.clipboardData.setData("text/plain", rows.map((row) => row.map(oneLine).join("\t")).join("\n"));
  event.clipboardData.setData("text/html", asHtml(rows));
  event.preventDefault();
}

// -- gallery ----------------------------------------------------------------------------------------------------------

const form = byId("filter");
const fields = ["search", "task", "evaluator", "sort", "method", "by", "random", "reverse", "seed", "image"];
const defaults = { search: "", task: "", evaluator: "", sort: "order", random: "1", reverse: "", seed: "0", image: "0" };
let order = []; // prompts shown

function setUpGallery() {
  options(form.elements.task, [["", "all tasks"], ...tasks.map((tag) => [`=${tag}`, nicely(tag)])]);
  const measures = data.measures.map((measure, i) => [String(i), `${measure.name} [${measure.role}]`]);
  options(form.elements.evaluator, [["", "all evaluators"], ...measures]);
  options(form.elements.by, measures);
  options(form.elements.method, data.methods.map((label, i) => [String(i), label]));
  defaults.method = String(Math.max(0, data.methods.findIndex((_, i) => i !== data.base)));
  defaults.by = measures.length ? "0" : "";
  if (data.base === null || !measures.length) form.querySelector("option[value=gain]").remove();
  if (!measures.length) form.querySelector("option[value=score]").remove();
  const runs = Array.from({ length: slots }, (_, slot) => [String(slot), runName(slot)]);
  options(form.elements.seed, runs);
  options(form.elements.image, data.indices.map((index, i) => [String(i), String(index)]));
  for (const [i, label] of data.methods.entries()) {
    const box = el("input", { type: "checkbox", name: "shown", value: String(i), checked: "" });
    byId("shown").append(el("label", {}, box, el("bdi", {}, label)));
  }
  form.addEventListener("input", () => changeGallery());
  for (const button of form.querySelectorAll("[data-all]")) {
    button.addEventListener("click", () => {
      for (const box of boxes()) box.checked = Boolean(button.dataset.all);
      changeGallery();
    });
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    writeForm(new URLSearchParams());
    changeGallery();
  });
}

function runName(slot) {
  const seeds = new Set(data.seeds.filter((found) => slot < found.length && found[0] !== null).map((found) => found[slot]));
  return seeds.size === 1 ? `seed ${[...seeds][0]}` : seeds.size ? `training run ${slot + 1}` : "none";
}

/** Return the settings that differ from the defaults, methods and measures by name. */
function readForm() {
  const found = new URLSearchParams();
  for (const name of fields) {
    const control = form.elements[name];
    const value = control.type === "checkbox" ? (control.checked ? control.value : "") : control.value;
    if (value !== (defaults[name] ?? "")) found.set(name, named(name, value));
  }
  const [on, off] = [true, false].map((is) => boxes().filter((box) => box.checked === is));
  const few = on.length && on.length < off.length; // the shorter list
  for (const box of few ? on : off) found.append(few ? "only" : "hide", data.methods[box.value]);
  return found;
}

function writeForm(found) {
  for (const name of fields) {
    const control = form.elements[name];
    const value = found.has(name) ? unnamed(name, found.get(name)) : (defaults[name] ?? "");
    if (control.type === "checkbox") control.checked = Boolean(value);
    else control.value = value;
    if (control.tagName === "SELECT" && control.selectedIndex < 0) control.value = defaults[name] ?? "";
  }
  const [only, hidden] = [found.getAll("only"), found.getAll("hide")];
  for (const box of boxes()) {
    const label = data.methods[box.value];
    box.checked = only.length ? only.includes(label) : !hidden.includes(label);
  }
}

const boxes = () => [...byId("shown").querySelectorAll("input")];

function named(field, value) {
  if (field === "method") return data.methods[value] ?? "";
  if (field === "by" || field === "evaluator") return data.measures[value]?.key ?? "";
  if (field === "image") return String(data.indices[value] ?? "");
  return value;
}

function unnamed(field, value) {
  const place = {
    method: () => data.methods.indexOf(value),
    by: () => data.measures.findIndex((measure) => measure.key === value),
    evaluator: () => data.measures.findIndex((measure) => measure.key === value),
    image: () => data.indices.indexOf(Number(value)),
  }[field];
  return place ? String(place()) : value;
}

function changeGallery() {
  const found = readForm();
  remember(found);
  drawGallery();
}

let drawn = null; // the settings of the rows drawn last

let pending = null; // the address to be, and the timer until then

const addressOf = (found) => (found.size ? `#pictures&${found}` : "#pictures");

/** Put the state into the address, so that the view can be linked; delayed, since browsers limit the rate. */
function remember(found, more = {}) {
  document.querySelector("[data-view=pictures]").href = addressOf(found); // so that returning restores the view
  for (const [name, value] of Object.entries(more)) found.set(name, value);
  clearTimeout(pending?.timer);
  pending = { address: addressOf(found), before: location.hash, timer: setTimeout(putAddress, 100) };
}

function putAddress() {
  clearTimeout(pending?.timer);
  // unless a link was followed meanwhile
  if (pending && location.hash === pending.before) history.replaceState(history.state, "", pending.address);
  pending = null;
}

function chosen() {
  const value = (name) => form.elements[name].value;
  return {
    task: value("task"),
    words: value("search").toLowerCase().split(/\s+/).filter(Boolean),
    measures: value("evaluator") === "" ? data.measures.map((_, i) => i) : [Number(value("evaluator"))],
    methods: boxes().filter((box) => box.checked).map((box) => Number(box.value)),
    slot: Number(value("seed")),
    index: Number(value("image")),
  };
}

function matching(how) {
  return data.prompts.map((_, i) => i).filter((prompt) => {
    const text = promptText(prompt).toLowerCase();
    const scored = how.measures.length > 1 || !how.measures.length || form.elements.evaluator.value === "" ||
      data.methods.some((_, method) => meanScore(how.measures[0], method, prompt) !== null);
    return (how.task === "" || `=${task(prompt)}` === how.task) && how.words.every((word) => text.includes(word)) && scored;
  });
}

/** Return the key that prompts are sorted by, largest first; null comes last. */
function sortKey(prompt) {
  const value = (name) => form.elements[name].value;
  return {
    order: () => -prompt,
    disagreement: () => data.disagreement[prompt],
    gain: () => gain(Number(value("by")), Number(value("method")), prompt),
    score: () => signedScore(Number(value("by")), Number(value("method")), prompt),
    random: () => chance(`${value("random")} ${data.prompts[prompt][0]}`),
  }[value("sort")]();
}

function sorted(prompts) {
  const keys = new Map(prompts.map((prompt) => [prompt, sortKey(prompt)]));
  const turn = form.elements.reverse.checked ? -1 : 1;
  const last = (key) => (key === null ? 1 : 0);
  return [...prompts].sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    return last(x) - last(y) || turn * ((y ?? 0) - (x ?? 0)) || a - b;
  });
}

const near = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) fill(target);
      else empty(target);
    }
  },
  { rootMargin: "800px 0px" },
);

function drawGallery() {
  const { sort, method } = form.elements;
  for (const label of form.querySelectorAll("[data-for]")) label.hidden = !label.dataset.for.split(" ").includes(sort.value);
  for (const option of method.options) option.disabled = sort.value === "gain" && Number(option.value) === data.base;
  if (method.selectedOptions[0]?.disabled) method.value = defaults.method;
  drawn = readForm().toString();
  const how = chosen();
  order = sorted(matching(how));
  near.disconnect();
  const rows = order.map(emptyRow);
  byId("rows").replaceChildren(...rows);
  for (const row of rows) near.observe(row);
  byId("count").textContent = summary(how);
  byId("how").textContent = order.length ? sorting(how) : "";
}

/** The choices that the rows alone do not show; a printed page and a screenshot need them. */
function sorting(how) {
  const { sort, method, by, random, search, reverse } = form.elements;
  const [label, measure] = [data.methods[method.value], data.measures[by.value]?.name];
  const sortedBy = {
    order: "in prompt order",
    disagreement: "sorted by disagreement",
    gain: `sorted by the gain of ${label} over ${data.methods[data.base]} on ${measure}`,
    score: `sorted by the score of ${label} on ${measure}`,
    random: `in random order, seed ${random.value}`,
  }[sort.value];
  const facts = [reverse.checked ? `${sortedBy}, reversed` : sortedBy, runName(how.slot), `image ${data.indices[how.index]}`];
  if (how.task) facts.unshift(nicely(how.task.slice(1)));
  if (search.value.trim()) facts.unshift(`prompts with “${search.value.trim()}”`);
  return `Shown: ${facts.join("; ")}.`;
}

function summary(how) {
  if (!data.prompts.length) return "The store has no prompts yet: nothing has been generated or scored.";
  if (!order.length) return "No prompt matches. Change or reset the filter.";
  const methods = how.methods.length ? "" : " No method is selected.";
  return `${order.length} of ${data.prompts.length} prompts, ${how.methods.length} of ${data.methods.length} methods.${methods}`;
}

function emptyRow(prompt) {
  const facts = [nicely(task(prompt))];
  const apart = data.disagreement[prompt];
  facts.push(apart === null ? "disagreement undefined" : `disagreement ${apart.toFixed(2)}`);
  if (form.elements.sort.value === "gain") {
    const by = Number(form.elements.by.value);
    const value = gain(by, Number(form.elements.method.value), prompt);
    facts.push(value === null ? "gain unknown" : `gain of ${data.methods[form.elements.method.value]} ${shownScore(value, by, true)}`);
  }
  if (form.elements.sort.value === "score") {
    const by = Number(form.elements.by.value);
    const value = meanScore(by, Number(form.elements.method.value), prompt);
    facts.push(value === null ? "score unknown" : `${data.measures[by].name} of ${data.methods[form.elements.method.value]} ${shownScore(value, by)}`);
  }
  const text = promptText(prompt);
  const heading = el("h3", { id: `p${prompt}`, dir: "auto", class: text.length > 200 ? "long" : null }, text);
  const meta = el("p", { class: "meta" }, ...facts.map((fact) => el("span", {}, el("bdi", {}, fact))));
  const cells = el("div", { class: "cells" });
  return el("article", { class: "row", "data-prompt": prompt, tabindex: "-1", "aria-labelledby": `p${prompt}` }, heading, meta, cells);
}

function fill(row) {
  const cells = row.lastElementChild;
  if (cells.childElementCount) return;
  const [how, prompt] = [chosen(), Number(row.dataset.prompt)];
  const best = new Map(how.measures.map((measure) => [measure, bestOf(measure, how, prompt)]));
  cells.replaceChildren(...how.methods.map((method) => cell(method, prompt, how, best)));
  cells.style.minHeight = "";
}

/** Remove the images of a distant row, keeping its height. */
function empty(row) {
  const cells = row.lastElementChild;
  if (!cells.childElementCount || cells.contains(document.activeElement)) return;
  cells.style.minHeight = `${cells.offsetHeight}px`;
  cells.replaceChildren();
}

function bestOf(measure, how, prompt) {
  const { sign } = data.measures[measure];
  const found = how.methods.map((method) => score(measure, method, prompt, how.slot, how.index)).filter((value) => value !== null);
  return sign && found.length > 1 && Math.max(...found) !== Math.min(...found) ? sign * Math.max(...found.map((value) => sign * value)) : null;
}

function cell(method, prompt, how, best) {
  const label = data.methods[method];
  const found = imageOf(method, prompt, how.slot, how.index);
  let shown;
  if (found.reason) {
    shown = el("div", { class: "thumb absent" }, `No image: ${found.reason}.`);
  } else {
    const image = el("img", { alt: `${label}: ${promptText(prompt)}`, decoding: "async" });
    image.addEventListener("load", () => sharpen(image));
    image.src = found.source;
    shown = el("button", { type: "button", class: "thumb", "data-method": method }, image);
    shown.addEventListener("click", () => openZoom(prompt, method));
  }
  const scores = el("dl", { class: "scores" });
  for (const measure of how.measures) {
    const value = score(measure, method, prompt, how.slot, how.index);
    const isBest = value !== null && value === best.get(measure);
    const text = value === null ? [el("span", { "aria-hidden": "true" }, "—"), el("span", { class: "sr" }, "no score")] : [shownScore(value, measure)];
    if (isBest) text.push(el("span", { class: "sr" }, ", best of the row"));
    const { name, short } = data.measures[measure];
    scores.append(el("dt", { title: name }, short), el("dd", { class: isBest ? "best" : null }, ...text));
  }
  return el("figure", {}, shown, el("figcaption", {}, el("b", {}, el("bdi", {}, label)), scores));
}

/** Move by J and K from the row that has the focus, or else from the one at the top of the window. */
function stepRow(by) {
  const rows = [...byId("rows").children];
  const focused = document.activeElement.closest?.(".row");
  let at = rows.indexOf(focused);
  if (at < 0) at = rows.findIndex((row) => row.getBoundingClientRect().top > 0) - (by > 0 ? 1 : 0);
  const next = rows[Math.min(Math.max(at + by, 0), rows.length - 1)];
  if (!next) return;
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "start" });
}

// -- an enlarged image ------------------------------------------------------------------------------------------------

const zoom = byId("zoom");
let looked = { prompt: 0, method: 0, flicker: false };
let preferred = null; // the second method that was chosen

/** Enlarge an image on a click: one entry of the history, so that Back closes it. */
function openZoom(prompt, method) {
  putAddress();
  const found = readForm();
  for (const [name, value] of Object.entries(enlarged(prompt, method))) found.set(name, value);
  history.pushState({ enlarged: true }, "", addressOf(found));
  route();
}

const enlarged = (prompt, method) => ({ zoom: data.prompts[prompt][0], of: data.methods[method] });

function showZoom(prompt, method) {
  const opening = !zoom.open;
  looked = { prompt, method, flicker: false };
  if (opening) zoom.showModal();
  drawZoom();
  if (opening) byId("zoom-name").focus();
}

/** After closing by a key or a button: back over the entry that opening made, or in place if a link led here. */
function leaveZoom() {
  if (!/&zoom=/.test(location.hash)) return; // Back closed it
  clearTimeout(pending?.timer);
  pending = null;
  if (history.state?.enlarged) history.back();
  else history.replaceState(history.state, "", addressOf(readForm()));
}

/** The method to flicker with: the one that was chosen, else base, else the next; never the image itself. */
function second() {
  const candidates = [preferred, data.base, (looked.method + 1) % data.methods.length];
  return candidates.find((method) => method !== null && method !== looked.method) ?? null;
}

/** Keep the originals of both methods in memory, so that flickering shows like beside like. */
const originals = new Map();

function original(file) {
  if (!originals.has(file)) {
    if (originals.size > 8) originals.delete(originals.keys().next().value);
    originals.set(file, Object.assign(new Image(), { src: file }));
  }
  return originals.get(file);
}

function drawZoom() {
  const how = chosen();
  const { prompt, flicker } = looked;
  const other = second();
  const method = flicker ? other : looked.method;
  options(byId("zoom-second"), data.methods.map((label, i) => [String(i), label]).filter(([i]) => Number(i) !== looked.method));
  byId("zoom-second").value = String(other);
  byId("flicker").disabled = byId("zoom-second").disabled = other === null;
  const found = imageOf(method, prompt, how.slot, how.index);
  const image = byId("zoom-image");
  byId("zoom-name").replaceChildren(el("bdi", {}, data.methods[method]));
  byId("zoom-prompt").textContent = promptText(prompt);
  byId("flicker").setAttribute("aria-pressed", String(flicker));
  image.hidden = Boolean(found.reason);
  byId("zoom-absent").hidden = !found.reason;
  byId("zoom-absent").textContent = found.reason ? `No image: ${found.reason}.` : "";
  image.alt = `${data.methods[method]}: ${promptText(prompt)}`;
  if (found.reason) image.removeAttribute("src");
  else showLarge(image, found);
  const beside = other === null ? {} : imageOf(other, prompt, how.slot, how.index);
  if (beside.original) original(beside.original);
  const seed = data.seeds[method][slotOf(method, how.slot)];
  const facts = [["task", nicely(task(prompt))], ["training run", seed === null ? "none" : `seed ${seed}`], ["image", String(data.indices[how.index])]];
  for (const measure of how.measures) facts.push([data.measures[measure].name, shownScore(score(measure, method, prompt, how.slot, how.index), measure)]);
  byId("zoom-scores").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  byId("zoom-status").textContent = `${data.methods[method]}, prompt ${order.indexOf(prompt) + 1} of ${order.length}`;
  remember(readForm(), enlarged(prompt, looked.method));
  nameWindow();
}

/** Show the thumbnail at once, then replace it by the original if that is beside the page. */
function showLarge(image, found) {
  image.onload = () => sharpen(image);
  const whole = found.original && original(found.original);
  const ready = whole?.complete && whole.naturalWidth;
  image.src = ready ? whole.src : found.source;
  if (!whole || ready) return;
  whole.addEventListener("load", () => {
    if (image.src === found.source) image.src = whole.src;
  });
}

function stepZoom(methods, prompts) {
  const shown = chosen().methods;
  const cycle = (list, now, by) => list[(list.indexOf(now) + by + list.length) % list.length] ?? now;
  looked = { method: methods ? cycle(shown, looked.method, methods) : looked.method, prompt: prompts ? cycle(order, looked.prompt, prompts) : looked.prompt, flicker: false };
  drawZoom();
}

function setUpZoom() {
  byId("zoom-close").addEventListener("click", () => zoom.close());
  byId("flicker").addEventListener("click", () => {
    looked.flicker = !looked.flicker;
    drawZoom();
  });
  byId("zoom-second").addEventListener("input", (event) => {
    preferred = Number(event.target.value);
    drawZoom();
  });
  for (const button of zoom.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => stepZoom(...button.dataset.step.split(",").map(Number)));
  }
  zoom.addEventListener("click", (event) => {
    if (event.target === zoom) zoom.close(); // outside the image
  });
  zoom.addEventListener("close", () => {
    leaveZoom();
    nameWindow();
    if (byId("pictures").hidden) return;
    const row = byId("rows").querySelector(`[data-prompt="${looked.prompt}"]`);
    row?.scrollIntoView({ block: "nearest" });
    if (row) fill(row);
    (row?.querySelector(`[data-method="${looked.method}"]`) ?? row)?.focus({ preventScroll: true });
  });
  zoom.addEventListener("keydown", (event) => {
    if (event.target.tagName === "SELECT" || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      ArrowLeft: () => stepZoom(-1, 0),
      ArrowRight: () => stepZoom(1, 0),
      ArrowUp: () => stepZoom(0, -1),
      ArrowDown: () => stepZoom(0, 1),
      f: () => event.repeat || byId("flicker").click(), // a key held down must not make the screen flash
    }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
}

// -- blind comparison -------------------------------------------------------------------------------------------------

const setup = byId("setup");
const PLACE = `alignbench votes ${data.digest}`;
const SEEN = `${PLACE} seen`; // kept once a result was shown in this browser, since later votes may be less blind
let votes = []; // as last read: {prompt, image, left, right, vote, after_result}; methods by name
let ballots = []; // {prompt, left, right} in the order in which they are shown
let showing = null; // the ballot on the screen
let mine = stored(thisTab, PLACE, []); // keys of the votes cast in this tab, for undoing
let inMemory = null; // the votes, where the browser keeps none

/** Return [rate, lo, hi] with Wilson's 95 % interval for ``wins`` of ``count`` (a tie is half a win); null for none. */
function wilson(wins, count) {
  if (!count) return null;
  const z = 1.959963984540054;
  const rate = wins / count;
  const scale = 1 + (z * z) / count;
  const middle = (rate + (z * z) / (2 * count)) / scale;
  const half = (z / scale) * Math.sqrt((rate * (1 - rate)) / count + (z * z) / (4 * count * count));
  return [rate, Math.max(0, middle - half), Math.min(1, middle + half)];
}

const keyOf = (prompt, one, other) => JSON.stringify([prompt, ...[one, other].sort()]);
const voteKey = (vote) => keyOf(vote.prompt, vote.left, vote.right);

function setUpBlind() {
  const methods = data.methods.map((label, i) => [String(i), label]);
  options(setup.elements.first, [["all", "every pair of methods"], ...methods]);
  options(setup.elements.second, methods);
  options(setup.elements.task, [["", "all tasks"], ...tasks.map((tag) => [`=${tag}`, nicely(tag)])]);
  if (data.methods.length > 1) {
    const first = data.base === 0 ? 1 : 0;
    setup.elements.first.value = String(first);
    setup.elements.second.value = String(data.base ?? 1);
  }
  setup.addEventListener("input", adaptSetup);
  setup.addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  for (const button of byId("ballot").querySelectorAll("[data-vote]")) button.addEventListener("click", () => cast(button.dataset.vote));
  byId("undo").addEventListener("click", undo);
  byId("reveal").addEventListener("click", showResult);
  byId("save-json").addEventListener("click", () => download("json", votesAsJson()));
  byId("save-csv").addEventListener("click", () => download("csv", votesAsCsv()));
  byId("load").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file) tell(read(await file.text()));
    event.target.value = "";
  });
  byId("clear").addEventListener("click", () => {
    if (votes.length && confirm(`Delete ${votes.length} votes? This cannot be undone.`)) {
      change(() => []);
      drawBallot();
      tell("All votes were deleted.");
    }
  });
  addEventListener("storage", (event) => {
    if (event.key !== null && event.key !== PLACE) return;
    votes = restored();
    byId("result").hidden = true;
    countBallots(); // the pair on the screen stays until this tab has voted on it
    tell("Another tab changed the votes.");
  });
  byId("ballot").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      ArrowLeft: () => cast("left"),
      ArrowRight: () => cast("right"),
      ArrowDown: () => cast("tie"),
      t: () => cast("tie"),
      s: () => cast("skip"),
      u: undo,
    }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
  for (const side of ["left", "right"]) byId(side).addEventListener("load", (event) => sharpen(event.target));
  adaptSetup();
  votes = restored();
  tell("");
}

function adaptSetup() {
  const { first, second } = setup.elements;
  second.disabled = first.value === "all";
  setup.querySelector("button").disabled = data.methods.length < 2 || (first.value !== "all" && first.value === second.value);
}

/** Return the pairs to vote on, first image of the first training run; the seed decides order and sides. */
function makeBallots(pairs, tag, seed) {
  const made = [];
  for (const prompt of data.prompts.keys()) {
    if (tag !== "" && `=${task(prompt)}` !== tag) continue;
    for (const [a, b] of pairs) {
      if (imageOf(a, prompt, 0, 0).reason || imageOf(b, prompt, 0, 0).reason) continue;
      const [one, other] = [a, b].sort((x, y) => x - y);
      const name = `${seed} ${data.prompts[prompt][0]} ${one} ${other}`;
      const [left, right] = chance(`side ${name}`) < 0.5 ? [one, other] : [other, one];
      made.push({ prompt, left, right, key: keyOf(data.prompts[prompt][0], data.methods[a], data.methods[b]), turn: chance(name) });
    }
  }
  return made.sort((x, y) => x.turn - y.turn);
}

function start() {
  const { first, second, task: tag, random } = setup.elements;
  const all = data.methods.flatMap((_, a) => data.methods.slice(a + 1).map((_, i) => [a, a + 1 + i]));
  const pairs = first.value === "all" ? all : [[Number(first.value), Number(second.value)]];
  ballots = makeBallots(pairs, tag.value, random.value);
  byId("result").hidden = true;
  byId("ballot").hidden = false;
  drawBallot();
  byId("ballot").focus({ preventScroll: true });
  byId("ballot").scrollIntoView();
}

function current() {
  const done = new Set(votes.map(voteKey));
  return ballots.find((ballot) => !done.has(ballot.key));
}

function drawBallot() {
  const now = current();
  showing = now ?? null;
  for (const button of byId("ballot").querySelectorAll("[data-vote]")) button.disabled = !now;
  byId("ballot").querySelector(".pair").hidden = !now;
  byId("question").textContent = now ? promptText(now.prompt) : "";
  countBallots();
  if (now) showPair(now);
}

function countBallots() {
  const done = new Set(votes.map(voteKey));
  const count = ballots.filter((ballot) => ballot !== showing && done.has(ballot.key)).length;
  byId("undo").disabled = !mine.length;
  byId("progress").textContent = showing
    ? `Pair ${count + 1} of ${ballots.length}`
    : ballots.length ? `You have voted on all ${ballots.length} pairs. Show the result below.` : "No prompt has an image of both methods.";
}

/** Show thumbnails at once, then both originals together: one alone would give the method away. */
function showPair(ballot) {
  const images = [byId("left"), byId("right")];
  const found = [ballot.left, ballot.right].map((method) => imageOf(method, ballot.prompt, 0, 0));
  images.forEach((image, i) => (image.src = found[i].source));
  if (!data.originals) return;
  const originals = found.map(({ original }) => Object.assign(new Image(), { src: original }));
  const replace = () => {
    if (showing === ballot) images.forEach((image, i) => (image.src = originals[i].src));
  };
  Promise.all(originals.map((image) => image.decode())).then(replace, () => {}); // without them the thumbnails stay
}

function cast(vote) {
  const now = showing;
  if (!now) return;
  const [prompt, left, right] = [data.prompts[now.prompt][0], data.methods[now.left], data.methods[now.right]];
  const made = { prompt, image: data.indices[0], left, right, vote, after_result: stored(always, SEEN, seen) };
  change((known) => [...known.filter((other) => voteKey(other) !== now.key), made]);
  mine = [...mine.filter((key) => key !== now.key), now.key];
  store(thisTab, PLACE, mine);
  tell("");
  drawBallot();
  if (!showing) byId("ballot").focus({ preventScroll: true });
}

/** Undo the last vote of this tab. */
function undo() {
  const key = mine.pop();
  if (key === undefined) return;
  store(thisTab, PLACE, mine);
  change((known) => known.filter((vote) => voteKey(vote) !== key));
  tell("");
  drawBallot();
}

function tell(text) {
  const skipped = votes.filter((vote) => vote.vote === "skip").length;
  const count = votes.length ? `${votes.length - skipped} votes, ${skipped} skipped.` : "No votes yet.";
  byId("votes").textContent = [text, count, kept ? "" : "This browser does not store them: export them before you leave."].filter(Boolean).join(" ");
}

let kept = true; // whether the browser keeps votes when the page is closed
let seen = false; // a result was shown in this tab

/** Change the votes that the browser holds now, not those read earlier: another tab may have voted meanwhile. */
function change(how) {
  votes = how(restored());
  inMemory = votes;
  kept = store(always, PLACE, votes);
  byId("result").hidden = true;
}

function restored() {
  return kept ? sound(stored(always, PLACE, inMemory ?? [])) : inMemory;
}

/** Return the votes that belong to this page. */
function sound(found) {
  const known = new Set(data.prompts.map(([id]) => id));
  const good = (vote) =>
    vote && known.has(vote.prompt) && data.methods.includes(vote.left) && data.methods.includes(vote.right) &&
    vote.left !== vote.right && ["left", "right", "tie", "skip"].includes(vote.vote);
  return Array.isArray(found) ? found.filter(good) : [];
}

const votesAsJson = () => `${JSON.stringify({ format: "alignbench votes 1", sweep: data.name, page: data.digest, votes }, null, 1)}\n`;

function votesAsCsv() {
  const columns = ["prompt", "image", "left", "right", "vote", "after_result"];
  return asCsv([columns, ...votes.map((vote) => columns.map((name) => noFormula(vote[name])))]);
}

/** Add the votes of an exported file, which replace earlier ones on the same pair; return a message. */
function read(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    return "This file is not JSON: nothing was read.";
  }
  if (found?.format !== "alignbench votes 1" || !Array.isArray(found.votes)) return "This file contains no alignbench votes: nothing was read.";
  if (found.page !== data.digest) return `These votes belong to another page (${String(found.sweep)}): nothing was read.`;
  const good = sound(found.votes);
  change((known) => [...new Map([...known, ...good].map((vote) => [voteKey(vote), vote])).values()]);
  if (ballots.length) drawBallot();
  const bad = found.votes.length - good.length;
  return `${good.length} votes read${bad ? `, ${bad} invalid` : ""}.`;
}

function download(ending, text) {
  const link = el("a", { download: `${data.name}-votes.${ending}` });
  link.href = URL.createObjectURL(new Blob([text], { type: ending === "csv" ? "text/csv" : "application/json" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** Return a row for each pair of methods: [first, second, wins, ties, losses, skipped]. */
function tally() {
  const rows = new Map();
  for (const { left, right, vote } of votes) {
    const [first, second] = [left, right].sort((a, b) => data.methods.indexOf(b) - data.methods.indexOf(a));
    const key = JSON.stringify([first, second]);
    if (!rows.has(key)) rows.set(key, [first, second, 0, 0, 0, 0]);
    const winner = { left, right }[vote];
    rows.get(key)[vote === "skip" ? 5 : vote === "tie" ? 3 : winner === first ? 2 : 4] += 1;
  }
  return [...rows.values()];
}

function showResult() {
  const rows = tally();
  const box = byId("result");
  box.hidden = false;
  if (!rows.length) {
    box.replaceChildren(el("p", {}, "No votes to count."));
    return;
  }
  seen = true;
  store(always, SEEN, true);
  const heads = ["method", "against", "wins", "ties", "losses", "skipped", "win rate [95 %]"];
  const head = el("tr", {}, ...heads.map((text, i) => el("th", { scope: "col", class: i > 1 ? "number" : null }, text)));
  const body = rows.map(([first, second, wins, ties, losses, skipped]) => {
    const found = wilson(wins + ties / 2, wins + ties + losses);
    const rate = found ? [found[0].toFixed(3), el("small", {}, `[${found[1].toFixed(3)}, ${found[2].toFixed(3)}]`)] : ["—"];
    const cells = [second, wins, ties, losses, skipped].map((value, i) => el("td", { class: i ? "number" : null }, el("bdi", {}, String(value))));
    return el("tr", {}, el("th", { scope: "row" }, el("bdi", {}, first)), ...cells, el("td", { class: "number" }, ...rate));
  });
  const table = el("table", {}, el("caption", {}, "Result of the blind comparison"), el("thead", {}, head), el("tbody", {}, ...body));
  const late = votes.filter((vote) => vote.after_result).length;
  const note = "Win rate: wins plus half of the ties, over all votes except skipped ones, with Wilson's 95 % interval. It is valid for these prompts and this voter, and not if pairs were selected after looking." +
    (late ? ` ${late} of the votes were cast after a result had been shown.` : "");
  const region = el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Result of the blind comparison" }, table);
  box.replaceChildren(el("h3", { tabindex: "-1" }, "Result"), region, el("p", {}, note));
  box.firstElementChild.focus();
}

// -- print ------------------------------------------------------------------------------------------------------------

/** Every row is printed with its images, not only those near the window. */
function setUpPrint() {
  addEventListener("beforeprint", () => {
    near.disconnect();
    if (!byId("pictures").hidden) for (const row of byId("rows").children) fill(row);
  });
  addEventListener("afterprint", () => {
    for (const row of byId("rows").children) near.observe(row); // which empties those that are far
  });
}

// -- views and theme --------------------------------------------------------------------------------------------------

const TITLE = document.title;
const SPOTS = `alignbench scroll ${data.digest}`;
let shown = { view: null, key: null }; // the view and the entry of the history
let leftAt = null; // where the page was scrolled to when a link was clicked
const spots = new Map(stored(thisTab, SPOTS, [])); // where each entry of the history, and each view, was left

/** Show the view that the hash names: "#report", "#pictures&task=...", "#blind", or a chapter of the report. */
function route() {
  const [name, ...rest] = location.hash.slice(1).split("&");
  const view = VIEWS.includes(name) ? name : "report";
  const before = shown;
  leave();
  if (!history.state?.key) history.replaceState({ ...history.state, key: `${Date.now()} ${Math.random()}` }, "");
  shown = { view, key: history.state.key };
  for (const id of VIEWS) byId(id).hidden = id !== view;
  for (const link of document.querySelectorAll(".bar [data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const settings = rest.join("&");
  const same = view === "pictures" ? openGallery(new URLSearchParams(settings)) : name === view;
  if (view !== "pictures" && zoom.open) zoom.close();
  nameWindow();
  if (before.view !== view || (view === "report" && spots.has(shown.key))) {
    scrollTo(0, spots.get(shown.key) ?? (same ? spots.get(view) : 0) ?? 0);
    if (!spots.has(shown.key) && view === "report" && name !== "report") byId(name)?.scrollIntoView();
  } else if (view === "pictures" && !same) scrollTo(0, spots.get(shown.key) ?? 0);
  if (before.view !== null && before.view !== view) (byId(`${view}-name`) ?? byId(view)).focus({ preventScroll: true });
}

/** Note where the entry that is left was scrolled to. */
function leave() {
  if (shown.view === null) return;
  for (const place of [shown.key, shown.view]) {
    spots.delete(place);
    spots.set(place, leftAt ?? scrollY);
  }
  leftAt = null;
}

/** The window's title tells views, and enlarged images, apart in tabs, bookmarks and the history. */
function nameWindow() {
  const { view } = shown;
  const words = [view === "report" ? "" : byId(`${view}-name`).textContent, TITLE];
  if (zoom.open) words.unshift(byId("zoom-name").textContent);
  document.title = words.filter(Boolean).join(" – ");
}

/** Show the gallery, and an image enlarged if the address names one; return whether the rows are as they were. */
function openGallery(found) {
  const [prompt, method] = [data.prompts.findIndex(([id]) => id === found.get("zoom")), data.methods.indexOf(found.get("of"))];
  const lost = found.has("zoom") && (prompt < 0 || method < 0);
  for (const name of ["zoom", "of"]) found.delete(name);
  writeForm(found);
  const same = readForm().toString() === drawn;
  document.querySelector("[data-view=pictures]").href = addressOf(readForm());
  if (!same) drawGallery();
  if (lost) byId("count").textContent += " The image that the link names is not in this page.";
  if (prompt >= 0 && method >= 0) showZoom(prompt, method);
  else if (zoom.open) zoom.close();
  return same;
}

function setUpHistory() {
  history.scrollRestoration = "manual"; // the browser would scroll before the view is the right one
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#']");
    if (link && link.hash !== location.hash && !event.ctrlKey && !event.metaKey && !event.shiftKey) leftAt = scrollY;
  }, true);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // its hash would lose the view
    leftAt = null;
    byId("main").focus();
  });
  addEventListener("hashchange", route);
  addEventListener("pagehide", () => {
    leave();
    store(thisTab, SPOTS, [...spots].slice(-60));
  });
}

const THEME = "alignbench theme";

function setUpTheme() {
  const button = byId("theme");
  const dark = () => {
    const set = document.documentElement.dataset.theme;
    return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const show = () => button.setAttribute("aria-pressed", String(dark()));
  const system = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const set = (theme) => {
    if (["light", "dark"].includes(theme)) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    show();
  };
  button.addEventListener("click", () => {
    const theme = dark() ? "light" : "dark";
    set(theme);
    store(always, THEME, theme === system() ? null : theme); // without a choice of its own it follows the system
  });
  addEventListener("storage", (event) => event.key === THEME && set(stored(always, THEME, null)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  set(stored(always, THEME, null));
}

setUpTheme();
if (matchMedia("(max-width: 40rem)").matches) {
  for (const details of document.querySelectorAll("details[open]")) details.open = false;
}
setUpGallery();
setUpZoom();
setUpBlind();
setUpTables();
setUpHistory();
setUpPrint();
byId("pictures").addEventListener("keydown", (event) => {
  const writes = event.target.matches("input:not([type=checkbox]), select");
  if (writes || event.ctrlKey || event.metaKey || event.altKey) return;
  const by = { j: 1, k: -1 }[event.key.toLowerCase()];
  if (by) stepRow(by);
});
route();
document.addEventListener("DOMContentLoaded", () => {
  if (!byId("pictures").hidden) drawGallery(); // rows drawn before their images were parsed
  if (zoom.open) drawZoom();
});
