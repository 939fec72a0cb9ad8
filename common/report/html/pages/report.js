"use strict";
// Browses the rows of a run's report. Every text of a run reaches the page as text alone, never as markup.
const report = (() => {
  const PAGE = 20;
  const FLAGS = { malformed: 1, disagrees: 2, cut: 4 };
  const FILTERS = ["split", "show", "label", "answer", "below", "query"];
  const $ = (id) => document.getElementById(id);
  const json = (id) => JSON.parse($(id).textContent);
  const meta = json("meta");
  const pieces = new Map(); // number of a piece -> its rows, or a promise of them
  const arriving = new Map(); // number of a piece that was asked for -> who waits
  let index = null; // columns: a value per row
  let found = []; // numbers of the rows that the filters let through
  let chosen = -1; // place in `found`
  let texts = null; // of every row in lower case, once somebody has searched
  let turn = 0; // of drawing: what a later one has overtaken is not shown

  // ---- rows

  function load(file) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${meta.folder}/${file}`;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${meta.folder}/${file} is missing: keep the folder beside this page`));
      document.head.append(script);
    });
  }

  function piece(number) {
    if (!pieces.has(number)) {
      pieces.set(number, meta.inside ? json(`rows-${number}`) : new Promise((resolve, reject) => {
        arriving.set(number, resolve);
        load(`rows-${number}.js`).catch(reject);
      }));
    }
    return pieces.get(number);
  }

  async function row(number) {
    return (await piece(Math.floor(number / meta.piece))).rows[number % meta.piece];
  }

  async function asked(number) { // the text of a question stands once in each piece
    return (await piece(Math.floor(number / meta.piece))).prompts[(await row(number)).prompt];
  }

  // ---- filters

  const wanted = () => Object.fromEntries(FILTERS.map((name) => [name, $(name).value]));

  function passes(wish, number) {
    const { split, label, answer, before, after, confidence, flags } = index;
    if (wish.split !== "" && split[number] !== Number(wish.split)) return false;
    if (wish.label !== "" && label[number] !== Number(wish.label)) return false;
    if (wish.answer !== "" && (after[number] < 0 || answer[number] !== Number(wish.answer))) return false;
    if (wish.below !== "" && !(confidence[number] >= 0 && confidence[number] < Number(wish.below))) return false;
    switch (wish.show) {
      case "wrong": return after[number] === 0;
      case "right": return after[number] === 1;
      case "fixed": return before[number] === 0 && after[number] === 1;
      case "broken": return before[number] === 1 && after[number] === 0;
      case "": return true;
      default: return (flags[number] & FLAGS[wish.show]) !== 0;
    }
  }

  function words(detail) {
    const replies = [detail.before, detail.after].flatMap((reply) => [reply?.text, reply?.answer]);
    const samples = (detail.samples ?? []).flatMap((sample) => [sample.text, ...Object.values(sample.said)]);
    return [...replies, ...(detail.candidates ?? []), ...samples].filter(Boolean).join("\n").toLowerCase();
  }

  async function searchable() {
    if (texts === null) {
      $("count").textContent = "reading all replies …";
      const all = await Promise.all(Array.from({ length: Math.ceil(meta.rows / meta.piece) }, (_, n) => piece(n)));
      const names = index.names.map((name) => name.toLowerCase());
      texts = all.flatMap((each) => each.rows).map((detail, n) => `${index.image[n].toLowerCase()}\n${names[index.label[n]] ?? ""}\n${words(detail)}`);
    }
    return texts;
  }

  async function filter(place) {
    const mine = ++turn;
    const wish = wanted();
    const query = wish.query.trim().toLowerCase();
    const haystack = query === "" ? null : await searchable();
    if (mine !== turn) return;
    found = [];
    for (let number = 0; number < meta.rows; number += 1) {
      if (passes(wish, number) && (haystack === null || haystack[number].includes(query))) found.push(number);
    }
    chosen = place === undefined ? 0 : found.indexOf(place);
    if (chosen < 0) chosen = 0;
    await draw();
  }

  // ---- the address: filters and image, so that a link leads to what one sees

  function remember() {
    const link = new URLSearchParams();
    const wish = wanted();
    for (const name of FILTERS) {
      if (wish[name] === "") continue;
      link.set(name, { split: index.splits, label: index.names, answer: [...index.names, ""] }[name]?.at(Number(wish[name])) ?? wish[name]);
    }
    if (found.length > 0) {
      link.set("image", index.image[found[chosen]]);
      link.set("row", found[chosen]);
    }
    history.replaceState(null, "", `#${link}`);
  }

  function recall() {
    const link = new URLSearchParams(location.hash.slice(1));
    for (const name of FILTERS) {
      let value = link.get(name) ?? "";
      if (link.has(name) && name === "split") value = String(index.splits.indexOf(value));
      if (link.has(name) && (name === "label" || name === "answer")) value = String(index.names.indexOf(value));
      $(name).value = value;
      if ($(name).selectedIndex === -1) $(name).value = "";
    }
    if (!FILTERS.some((name) => link.has(name)) && !link.has("image")) $("split").value = index.splits.length > 0 ? "0" : "";
    const number = Number(link.get("row") ?? -1), image = link.get("image");
    if (image === null || index.image[number] === image) return number < 0 ? undefined : number;
    const other = index.image.indexOf(image); // the page has been made anew
    return other < 0 ? undefined : other;
  }

  // ---- what one sees

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  const text = (value) => make("bdi", { textContent: value });
  const block = (value) => make("pre", { dir: "auto", textContent: value });

  function image(source, kind) {
    if (!source) return make("span", { className: kind === "thumb" ? "none" : "none large", title: "not kept" });
    const picture = make("img", { src: source, alt: "", className: kind });
    picture.onload = () => picture.classList.toggle("tiny", picture.naturalWidth <= 64);
    return picture;
  }

  const name = (number) => index.names[number] ?? "(no class name)";

  function mark(value) {
    if (value < 0) return null;
    return make("span", { className: `mark ${value ? "right" : "wrong"}`, title: value ? "right" : "wrong", textContent: value ? "✓" : "✗" });
  }

  function entry(place, detail) {
    const number = found[place];
    const tested = index.after[number] >= 0;
    const title = tested && index.answer[number] !== index.label[number]
      ? [text(name(index.label[number])), " → ", text(name(index.answer[number]))]
      : [text(name(index.label[number]))];
    const more = tested
      ? `${index.splits[index.split[number]]} · ${index.image[number]}${index.confidence[number] < 0 ? "" : ` · ${index.confidence[number]} %`}`
      : `update ${detail.step} · ${index.image[number]}`;
    const button = make("button", { type: "button" }, image(detail.picture, "thumb"),
      make("span", { className: "words" }, ...title, make("small", {}, text(more))),
      make("span", {}, mark(index.before[number]), index.before[number] < 0 ? null : " → ", mark(index.after[number])));
    button.setAttribute("aria-current", String(place === chosen));
    button.onclick = async () => {
      chosen = place;
      await draw();
      if ($("detail").offsetTop > $("list").offsetTop + 50) $("detail").scrollIntoView(); // on a narrow page it is below
    };
    return make("li", {}, button);
  }

  async function draw() {
    const mine = ++turn;
    const first = Math.floor(chosen / PAGE) * PAGE;
    const places = found.slice(first, first + PAGE).map((_, offset) => first + offset);
    const details = await Promise.all(places.map((place) => row(found[place])));
    const prompt = places.length > 0 ? await asked(found[chosen]) : null;
    if (mine !== turn) return;
    $("list").replaceChildren(...places.map((place, n) => entry(place, details[n])));
    $("detail").replaceChildren(...(places.length > 0 ? show(found[chosen], details[chosen - first], prompt) : []));
    const shown = found.filter((number) => index.after[number] >= 0);
    const right = shown.reduce((sum, number) => sum + index.after[number], 0);
    $("count").textContent = `${found.length.toLocaleString("en")} of ${meta.rows.toLocaleString("en")} row${meta.rows === 1 ? "" : "s"}`
      + (shown.length > 0 ? `; ${(100 * right / shown.length).toFixed(1)} % of the tested ones right` : "");
    $("page").textContent = found.length > 0 ? `${(first / PAGE + 1).toLocaleString("en")} / ${Math.ceil(found.length / PAGE).toLocaleString("en")}` : "nothing fits";
    $("previous").disabled = first === 0;
    $("next").disabled = first + PAGE >= found.length;
    remember();
  }

  function show(number, detail, prompt) {
    const label = name(index.label[number]);
    const head = make("div", { className: "head" }, image(detail.picture, "large"), make("div", {},
      make("h3", {}, text(label)), make("p", { className: "muted" }, text(index.image[number])),
      detail.candidates ? make("p", {}, "candidates: ", text(detail.candidates.join(", "))) : null));
    const question = prompt ? make("details", {}, make("summary", { textContent: "what the model was asked" }), block(prompt)) : null;
    const cards = detail.samples
      ? detail.samples.map((sample, n) => completion(sample, n))
      : [["before training", detail.before], ["after training", detail.after]]
        .filter(([, reply]) => reply).map(([title, reply]) => answered(detail.after ? title : "answer", reply, label));
    return [head, question, make("div", { className: "sides" }, ...cards)].filter(Boolean);
  }

  function answered(title, reply, label) {
    const card = make("section", { className: `card ${reply.correct ? "right" : "wrong"}` }, make("h3", { textContent: `${title} ${reply.correct ? "✓" : "✗"}` }));
    if (reply.text !== null) card.append(block(reply.text));
    card.append(make("p", { className: "answer" }, "answer: ", text(reply.answer || "none that can be read")));
    for (const [choice, share] of reply.top) {
      const bar = make("i");
      bar.style.width = `${100 * share}%`;
      card.append(make("div", { className: `bar${choice.toLowerCase() === label.toLowerCase() ? " true" : ""}` }, text(choice), make("span", {}, bar), make("span", { textContent: `${(100 * share).toFixed(1)} %` })));
    }
    return facts(card, reply.facts);
  }

  function completion(sample, n) {
    const card = make("section", { className: `card ${sample.advantage > 0 ? "right" : sample.advantage < 0 ? "wrong" : ""}` },
      make("h3", { textContent: `completion ${n + 1}` }), block(sample.text));
    facts(card, { reward: sample.reward, ...sample.rewards, advantage: sample.advantage, tokens: sample.tokens });
    for (const [who, what] of Object.entries(sample.said)) card.append(make("details", {}, make("summary", {}, "reply of ", text(who)), block(what)));
    return card;
  }

  function facts(card, values) {
    const list = make("dl");
    for (const [key, value] of Object.entries(values)) {
      const shown = value === true ? "yes" : value === false ? "no" : value === null ? "–" : Array.isArray(value) ? value.join(", ") : String(value);
      list.append(make("dt", {}, text(key.replaceAll("_", " "))), make("dd", {}, text(shown)));
    }
    card.append(list);
    return card;
  }

  // ---- moving about

  function move(steps) {
    if (found.length === 0) return;
    chosen = Math.max(0, Math.min(found.length - 1, chosen + steps));
    draw();
  }

  function leaf(pages) {
    const target = (Math.floor(chosen / PAGE) + pages) * PAGE;
    if (target < 0 || target >= found.length) return;
    chosen = target;
    draw();
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape") { $("filters").reset(); event.target.blur(); return; }
    if (typing) return;
    const actions = { j: () => move(1), k: () => move(-1), ArrowRight: () => leaf(1), ArrowLeft: () => leaf(-1), "/": () => $("query").focus() };
    if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
  }

  function fill(id, options) {
    $(id).replaceChildren(...options.map(([value, words]) => make("option", { value, textContent: words })));
  }

  function begin(columns) {
    index = columns;
    fill("split", [["", "all"], ...index.splits.map((split, n) => [n, split])]);
    fill("label", [["", "all"], ...index.names.map((words, n) => [n, words])]);
    fill("answer", [["", "all"], ...index.names.map((words, n) => [n, words]), [-1, "(no class name)"]]);
    let patience;
    $("filters").addEventListener("input", (event) => {
      clearTimeout(patience);
      patience = setTimeout(() => filter(), event.target.id === "query" ? 150 : 0);
    });
    $("filters").addEventListener("reset", () => setTimeout(() => filter(), 0));
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    $("previous").onclick = () => leaf(-1);
    $("next").onclick = () => leaf(1);
    document.addEventListener("keydown", key);
    document.addEventListener("click", (event) => {
      const cell = event.target.closest("button[data-label]");
      if (!cell) return;
      $("filters").reset();
      $("split").value = String(index.splits.indexOf(cell.dataset.split));
      $("label").value = cell.dataset.label;
      $("answer").value = cell.dataset.answer;
      $("replies").scrollIntoView();
      filter();
    });
    window.addEventListener("hashchange", () => { if (location.hash.includes("=")) filter(recall()); });
    filter(recall());
  }

  function trouble(error) { $("count").textContent = error.message; }

  window.addEventListener("unhandledrejection", (event) => { trouble(event.reason); event.preventDefault(); });
  document.addEventListener("DOMContentLoaded", () => {
    if (meta.inside) begin(json("index"));
    else load("index.js").catch(trouble);
  });

  return { // called by the files beside the page
    index: begin,
    rows: (number, rows) => { pieces.set(number, rows); arriving.get(number)?.(rows); arriving.delete(number); },
  };
})();
