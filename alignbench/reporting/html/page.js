// Interactive parts of the report's page: three views, the gallery, an enlarged image, the blind comparison.
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

function shownScore(value, measure, signed = false) {
  if (value === null) return "—";
  const text = Math.abs(value).toFixed(data.measures[measure].decimals);
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

/** Show the pixels of small images, and smooth large ones. */
function sharpen(image) {
  image.classList.toggle("pixels", Math.max(image.naturalWidth, image.naturalHeight) <= PIXELS);
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
  const others = data.methods.map((label, i) => [String(i), label]).filter(([i]) => Number(i) !== data.base);
  options(form.elements.method, others);
  defaults.method = others.length ? others[0][0] : "";
  defaults.by = measures.length ? "0" : "";
  if (data.base === null || !measures.length) form.querySelector("option[value=gain]").remove();
  const runs = Array.from({ length: slots }, (_, slot) => [String(slot), runName(slot)]);
  options(form.elements.seed, runs);
  options(form.elements.image, data.indices.map((index, i) => [String(i), String(index)]));
  for (const [i, label] of data.methods.entries()) {
    const box = el("input", { type: "checkbox", name: "shown", value: String(i), checked: "" });
    byId("shown").append(el("label", {}, box, el("bdi", {}, label)));
  }
  form.addEventListener("input", () => changeGallery());
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
  for (const box of boxes()) if (!box.checked) found.append("hide", data.methods[box.value]);
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
  const hidden = found.getAll("hide");
  for (const box of boxes()) box.checked = !hidden.includes(data.methods[box.value]);
}

const boxes = () => [...byId("shown").querySelectorAll("input")];

function named(field, value) {
  if (field === "method") return data.methods[value] ?? "";
  if (field === "by" || field === "evaluator") return data.measures[value]?.name ?? "";
  if (field === "image") return String(data.indices[value] ?? "");
  return value;
}

function unnamed(field, value) {
  const place = {
    method: () => data.methods.indexOf(value),
    by: () => data.measures.findIndex((measure) => measure.name === value),
    evaluator: () => data.measures.findIndex((measure) => measure.name === value),
    image: () => data.indices.indexOf(Number(value)),
  }[field];
  return place ? String(place()) : value;
}

function changeGallery() {
  const found = readForm();
  remember(found);
  drawGallery();
}

let remembering = 0;

/** Put the state into the address, so that the view can be linked; delayed, since browsers limit the rate. */
function remember(found) {
  const text = found.toString();
  const address = text ? `#pictures&${text}` : "#pictures";
  document.querySelector("[data-view=pictures]").href = address; // so that returning restores the view
  clearTimeout(remembering);
  const before = location.hash;
  remembering = setTimeout(() => {
    if (location.hash === before) history.replaceState(null, "", address); // unless a link was followed meanwhile
  }, 100);
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
  for (const label of form.querySelectorAll("[data-for]")) label.hidden = label.dataset.for !== form.elements.sort.value;
  const how = chosen();
  order = sorted(matching(how));
  near.disconnect();
  const rows = order.map(emptyRow);
  byId("rows").replaceChildren(...rows);
  for (const row of rows) near.observe(row);
  byId("count").textContent = summary(how);
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
  const heading = el("h3", { id: `p${prompt}`, dir: "auto" }, promptText(prompt));
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
    const { name } = data.measures[measure];
    scores.append(el("dt", { title: name }, name), el("dd", { class: isBest ? "best" : null }, ...text));
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

function openZoom(prompt, method) {
  looked = { prompt, method, flicker: false };
  options(byId("zoom-second"), data.methods.map((label, i) => [String(i), label]));
  byId("zoom-second").value = String(method !== data.base && data.base !== null ? data.base : (method + 1) % data.methods.length);
  drawZoom();
  if (!zoom.open) zoom.showModal();
  byId("zoom-name").focus();
}

function drawZoom() {
  const how = chosen();
  const { prompt, flicker } = looked;
  const method = flicker ? Number(byId("zoom-second").value) : looked.method;
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
  const seed = data.seeds[method][slotOf(method, how.slot)];
  const facts = [["task", nicely(task(prompt))], ["training run", seed === null ? "none" : `seed ${seed}`], ["image", String(data.indices[how.index])]];
  for (const measure of how.measures) facts.push([data.measures[measure].name, shownScore(score(measure, method, prompt, how.slot, how.index), measure)]);
  byId("zoom-scores").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  byId("zoom-status").textContent = `${data.methods[method]}, prompt ${order.indexOf(prompt) + 1} of ${order.length}`;
  const state = readForm();
  state.set("zoom", data.prompts[prompt][0]);
  state.set("of", data.methods[looked.method]);
  remember(state);
}

/** Show the thumbnail at once, then replace it by the original if that is beside the page. */
function showLarge(image, found) {
  image.onload = () => sharpen(image);
  image.src = found.source;
  if (!found.original) return;
  const original = new Image();
  original.onload = () => {
    if (image.src === found.source) image.src = original.src;
  };
  original.src = found.original;
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
  byId("zoom-second").addEventListener("input", drawZoom);
  for (const button of zoom.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => stepZoom(...button.dataset.step.split(",").map(Number)));
  }
  zoom.addEventListener("click", (event) => {
    if (event.target === zoom) zoom.close(); // outside the image
  });
  zoom.addEventListener("close", () => {
    remember(readForm());
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
      f: () => byId("flicker").click(),
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
let votes = []; // {prompt, image, left, right, vote, after_result}; methods by name
let ballots = []; // {prompt, left, right} in the order in which they are shown
let named_once = false; // a result was shown, so later votes may be less blind

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
      votes = [];
      byId("result").hidden = true;
      keep();
      drawBallot();
      tell("All votes were deleted.");
    }
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
  restore();
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
  const done = new Set(votes.map(voteKey));
  const count = ballots.filter((ballot) => done.has(ballot.key)).length;
  const now = current();
  byId("undo").disabled = !votes.length;
  for (const button of byId("ballot").querySelectorAll("[data-vote]")) button.disabled = !now;
  byId("ballot").querySelector(".pair").hidden = !now;
  byId("question").textContent = now ? promptText(now.prompt) : "";
  byId("progress").textContent = now
    ? `Pair ${count + 1} of ${ballots.length}`
    : ballots.length ? `You have voted on all ${ballots.length} pairs. Show the result below.` : "No prompt has an image of both methods.";
  if (now) showPair(now);
}

/** Show thumbnails at once, then both originals together: one alone would give the method away. */
function showPair(ballot) {
  const images = [byId("left"), byId("right")];
  const found = [ballot.left, ballot.right].map((method) => imageOf(method, ballot.prompt, 0, 0));
  images.forEach((image, i) => (image.src = found[i].source));
  if (!data.originals) return;
  const originals = found.map(({ original }) => Object.assign(new Image(), { src: original }));
  const replace = () => {
    if (current()?.key === ballot.key) images.forEach((image, i) => (image.src = originals[i].src));
  };
  Promise.all(originals.map((image) => image.decode())).then(replace, () => {}); // without them the thumbnails stay
}

function cast(vote) {
  const now = current();
  if (!now) return;
  const [prompt, left, right] = [data.prompts[now.prompt][0], data.methods[now.left], data.methods[now.right]];
  votes.push({ prompt, image: data.indices[0], left, right, vote, after_result: named_once });
  keep();
  byId("result").hidden = true;
  tell("");
  drawBallot();
  if (!current()) byId("ballot").focus({ preventScroll: true });
}

function undo() {
  votes.pop();
  keep();
  byId("result").hidden = true;
  tell("");
  drawBallot();
}

function tell(text) {
  const skipped = votes.filter((vote) => vote.vote === "skip").length;
  const count = votes.length ? `${votes.length - skipped} votes, ${skipped} skipped.` : "No votes yet.";
  byId("votes").textContent = [text, count, kept ? "" : "This browser does not store them: export them before you leave."].filter(Boolean).join(" ");
}

let kept = true; // whether the browser keeps votes when the page is closed

function keep() {
  try {
    localStorage.setItem(PLACE, JSON.stringify(votes));
  } catch {
    kept = false;
  }
}

function restore() {
  try {
    votes = sound(JSON.parse(localStorage.getItem(PLACE) ?? "[]"));
  } catch {
    votes = [];
    keep();
  }
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
  const quoted = (value) => (/[",\r\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  return `${[columns, ...votes.map((vote) => columns.map((name) => vote[name]))].map((row) => row.map(quoted).join(",")).join("\r\n")}\r\n`;
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
  const merged = new Map([...votes, ...good].map((vote) => [voteKey(vote), vote]));
  votes = [...merged.values()];
  keep();
  byId("result").hidden = true;
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
  named_once = true;
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

// -- views and theme --------------------------------------------------------------------------------------------------

/** Show the view that the hash names: "#report", "#pictures&task=...", "#blind", or a chapter of the report. */
function route() {
  const [name, ...rest] = location.hash.slice(1).split("&");
  if (name === "main") return; // the link that skips the header
  const view = VIEWS.includes(name) ? name : "report";
  const changed = byId(view).hidden;
  for (const id of VIEWS) byId(id).hidden = id !== view;
  for (const link of document.querySelectorAll(".bar [data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (view === "pictures") openGallery(new URLSearchParams(rest.join("&")));
  if (!changed) return;
  if (view === "report" && name !== "report") byId(name)?.scrollIntoView();
  else scrollTo(0, 0);
  (byId(`${view}-name`) ?? byId(view)).focus({ preventScroll: true });
}

function openGallery(found) {
  writeForm(found);
  drawGallery();
  const prompt = data.prompts.findIndex(([id]) => id === found.get("zoom"));
  const method = data.methods.indexOf(found.get("of"));
  if (prompt >= 0 && method >= 0 && !zoom.open) openZoom(prompt, method);
}

function setUpTheme() {
  const button = byId("theme");
  const dark = () => {
    const set = document.documentElement.dataset.theme;
    return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const show = () => button.setAttribute("aria-pressed", String(dark()));
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}

setUpTheme();
if (matchMedia("(max-width: 40rem)").matches) {
  for (const details of document.querySelectorAll("details[open]")) details.open = false;
}
setUpGallery();
setUpZoom();
setUpBlind();
addEventListener("hashchange", route);
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
