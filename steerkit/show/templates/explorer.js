// The page: choices, slider, keys and search change the requested selection; `show` draws the view of it.

const at = (id) => document.getElementById(id);
const slider = at("coefficient"), find = at("find"), help = at("help"), root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const linked = location.hash.includes("=");  // otherwise a section's anchor
let requested = linked ? fromLink(location.hash) : { query: "", ...start };
let view = viewOf(requested);
const OPEN = 2;  // scores that are not folded
let lastHit, pendingLink;

function go(change) {
  requested = { ...requested, ...change };
  show();
  at("link-status").textContent = "";
  clearTimeout(pendingLink);
  pendingLink = setTimeout(() => history.replaceState(null, "", toLink(view)), 300);  // browsers refuse many in a row
}

// Show a search result; an unsteered one is shown under the selected vector and layer.
function goTo(row) {
  const target = Object.fromEntries(CHOICES.map((choice) => [choice, rows[choice][row]]));
  const here = { ...target, vector: view.vector, layer: view.layer };
  const stays = rows.coefficient[row] === 0 && viewOf(here).prompt_id === target.prompt_id;
  lastHit = row;
  go({ ...(stays ? here : target), coefficient: rows.coefficient[row] });
}

function show() {
  const before = view.row;
  view = viewOf(requested);
  at("live").ariaLive = view.row === before ? "off" : "polite";
  showChoices();
  showTexts();
  cards.forEach(showScore);
  at("link").href = toLink(view);
}

function showChoices() {
  for (const choice of CHOICES) {
    const options = view.options[choice], texts = choice === "prompt_id" ? labels : names[choice];
    const select = at(choice);
    if (select.dataset.options !== options.join()) {
      select.replaceChildren(...options.map((code) => make("option", { value: code, dir: "auto" }, texts[code])));
      select.dataset.options = options.join();
    }
    select.value = view[choice];
    select.parentElement.hidden = options.length < 2;
  }
  const values = view.list.map((row) => rows.coefficient[row]);
  slider.max = values.length - 1;
  slider.disabled = values.length < 2;
  slider.value = view.index;
  const dose = rows.relative_dose[view.row];
  const about = dose === null ? "" : ` (relative dose ${number(Number(dose.toPrecision(2)))})`;
  const valueText = signed(view.coefficient) + about;
  at("value").textContent = valueText;
  slider.setAttribute("aria-valuetext", valueText);
  const few = (value, k) => values.length < 12 || value === 0 || k === 0 || k === values.length - 1;
  at("ticks").replaceChildren(...values.map((value, k) => make("span", {}, few(value, k) ? number(value) : "")));
}

function aboutRow(row, ...condition) {
  const ended = { true: "ended with an end token", false: "cut off at the limit" }[rows.finished[row]];
  const found = yes_no.flatMap((k) => {
    const value = rows.scores[k][row];
    return value === null ? [] : [`${titles[k]}: ${value ? "yes" : "no"}`];
  });
  return [...condition, `${strength} ${signed(rows.coefficient[row])}`, ...found, ...(ended ? [ended] : [])].join(", ");
}

function showTexts() {
  const { row, zero } = view, wanted = pattern(view.query);
  const [removed, added] = zero === undefined ? [[], []] : differences(textOf(zero), textOf(row));
  const shade = at("shade")?.checked && view.condition.shade;
  at("stage").classList.toggle("shaded", Boolean(shade));
  for (const [id, which, ranges, tag] of [["plain", zero, removed, "del"], ["steered", row, added, "ins"]]) {
    const layers = [
      { ranges, wrap: marked(tag) },
      ...(shade && which !== undefined ? [{ ranges: tokensOf(which), wrap: shaded(view.condition.shade) }] : []),
      { ranges: matches(textOf(which), wanted), wrap: marked("mark") },
    ];
    paint(at(id), textOf(which), layers);
  }
  at("plain-about").textContent = zero === undefined ? "not in this sweep" : aboutRow(zero);
  at("steered-about").textContent = aboutRow(row, names.vector[view.vector], `layer ${names.layer[view.layer]}`);
  const messages = turns[view.prompt_id].flatMap(([role, text]) => [make("b", { class: "role" }, role), text, "\n"]);
  at("prompt").replaceChildren(...(messages.length ? messages.slice(0, -1) : [strings[prompts[view.prompt_id]] ?? ""]));
  const reference = rows.reference[row];
  at("reference").textContent = strings[reference] ?? "";
  at("reference").parentElement.hidden = reference === null;
  showScale();
}

function showScale() {
  if (!at("scale")) return;
  const shade = view.condition.shade;
  at("scale").hidden = !shade;
  at("no-scale").hidden = Boolean(shade);
  if (!shade) return;
  const [centre, extent] = shade;
  [["low-end", centre - extent], ["centre", centre], ["high-end", centre + extent]].forEach(([id, value]) => {
    at(id).textContent = number(Number(value.toPrecision(3)));
  });
}

function newCard(score, k) {
  const card = { score, title: titles[k] };
  card.this = make("p", { class: "this" });
  card.figure = make("div", { class: "chart" });
  card.legend = make("ul", { class: "legend" });
  card.values = make("table", {}, make("caption", {}, `${card.title}: mean and 95 % interval`));
  const about = { class: "scroll", tabindex: "0", role: "group", "aria-label": `Values of ${card.title}` };
  card.table = make("details", {}, make("summary", {}, "Values as a table"), make("div", about, card.values));
  const heading = make("h4", { title: score }, card.title);
  const parts = [heading, card.this, card.figure, card.legend, card.table];
  card.root = make("article", { class: "card score" }, ...parts);
  return card;
}

function showScore(card, k) {
  const mine = rows.scores[k];
  const before = view.zero === undefined ? null : mine[view.zero], after = mine[view.row];
  const change = before === null || after === null ? "" : ` (${signed(after - before)})`;
  card.this.textContent = `These texts: ${number(before)} \u2192 ${number(after)}${change}`;
  const lines = view.condition.series.flatMap((index, nth) => {
    const line = series[index].lines[k];
    return line ? [{ ...line, name: series[index].name, style: STYLES[Math.min(nth, 2)] }] : [];
  });
  const coefficients = [...new Set(lines.flatMap(({ points }) => points.map(([coefficient]) => coefficient)))];
  coefficients.sort((a, b) => a - b);
  card.figure.hidden = card.table.hidden = !lines.length;
  card.legend.replaceChildren(...legend(lines, view.coefficient));
  if (!lines.length) return card.legend.replaceChildren(make("li", {}, "not measured here"));
  card.figure.replaceChildren(
    chart(card, lines, coefficients, view.coefficient, (coefficient) => go({ coefficient })));
  card.values.replaceChildren(card.values.caption, ...valuesOf(lines, coefficients, view.coefficient));
}

function showHits() {
  const hits = hitsOf(requested.query);
  at("hits").replaceChildren(...hits.slice(0, SHOWN).map((row) => hit(row, requested.query, goTo)));
  at("hits").hidden = !hits.length;
  const more = hits.length > SHOWN ? `; the first ${SHOWN} are listed` : "";
  at("search-status").textContent = requested.query.trim() ? `${hits.length} of ${searched.length} texts${more}` : "";
}

function search(query) {
  lastHit = undefined;
  go({ query });
  showHits();
}

function nextHit(by) {
  const hits = hitsOf(requested.query), here = hits.indexOf(lastHit);
  if (hits.length) goTo(hits[here < 0 ? 0 : (here + by + hits.length) % hits.length]);
}

function step(choice, by) {
  const options = view.options[choice], index = options.indexOf(view[choice]) + by;
  if (index >= 0 && index < options.length) go({ [choice]: options[index] });
}

function slide(by) {
  const row = view.list[view.index + by];
  if (row !== undefined) go({ coefficient: rows.coefficient[row] });
}

const ACTIONS = {
  ArrowLeft: () => slide(-1),
  ArrowRight: () => slide(1),
  k: () => step("prompt_id", -1),
  j: () => step("prompt_id", 1),
  "/": () => find.focus(),
  "?": () => help.showModal(),
};

// Whether the focused element uses this arrow key itself.
function hasArrows(element) {
  if (element === slider) return true;
  const pane = element.closest(".text, .scroll");
  return pane && pane.scrollWidth > pane.clientWidth;
}

function onKey(event) {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || help.open || !Object.hasOwn(ACTIONS, key)) return;
  if (target.closest("select, #find")) return;
  if (key.startsWith("Arrow") ? hasArrows(target) : !at("single-keys").checked) return;
  event.preventDefault();
  ACTIONS[key]();
}

function onSearchKey(event) {
  if (event.key === "Enter") nextHit(event.shiftKey ? -1 : 1);
  if (event.key !== "Escape") return;
  find.value = "";
  search("");
  find.blur();
}

function isDark() {
  return (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
}

function showTheme() {
  at("theme").setAttribute("aria-pressed", isDark());
}

function restore() {
  if (!location.hash.includes("=")) return;
  requested = fromLink(location.hash);
  find.value = requested.query;
  show();
  showHits();
  arrive();
}

// Bring the linked text into view, below the slider that stays at the top, and name what differs from the link.
function arrive() {
  at("link-status").textContent = differencesOf(location.hash, view);
  const texts = at("texts");
  texts.style.scrollMarginTop = `${at("slide").offsetHeight}px`;
  texts.scrollIntoView({ behavior: "instant" });
}

// The chosen theme stays for the next visit where the browser keeps it.
function remembered(theme) {
  try {
    if (theme) localStorage.setItem("steerkit-theme", theme);
    return localStorage.getItem("steerkit-theme");
  } catch {
    return null;
  }
}

const cards = scores.map(newCard);
at("scores").append(...cards.slice(0, OPEN).map(({ root }) => root));
at("more").append(...cards.slice(OPEN).map(({ root }) => root));
at("more").parentElement.hidden = cards.length <= OPEN;
for (const choice of CHOICES) {
  at(choice).addEventListener("change", (event) => go({ [choice]: Number(event.target.value) }));
}
slider.addEventListener("input", () => go({ coefficient: rows.coefficient[view.list[slider.value]] }));
find.addEventListener("input", () => search(find.value));
find.addEventListener("keydown", onSearchKey);
at("shade")?.addEventListener("change", showTexts);
at("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  remembered(root.dataset.theme);
  showTheme();
});
if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
dark.addEventListener("change", showTheme);
at("show-help").addEventListener("click", () => help.showModal());
at("close-help").addEventListener("click", () => help.close());
document.addEventListener("keydown", onKey);
addEventListener("hashchange", restore);
showTheme();
find.value = requested.query;
show();
showHits();
for (const id of ["stage", "buttons"]) at(id).hidden = false;
if (linked) arrive();
