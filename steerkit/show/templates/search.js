// Search in the texts.

const SHOWN = 50;
const AROUND = 45;

// The rows to search: a text at coefficient 0, which is listed under every vector and layer, counts once.
const seen = new Set();
const searched = rows.coefficient.map((_, row) => row).filter((row) => {
  if (rows.coefficient[row] !== 0) return true;
  const key = [rows.prompt_id[row], rows.sample[row], rows.text[row]].join();
  return !seen.has(key) && seen.add(key);
});

function pattern(query) {
  return query.trim() ? new RegExp(query.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "giu") : null;
}

function matches(text, wanted) {
  return wanted ? Array.from(text.matchAll(wanted), ({ 0: { length }, index }) =>
    ({ start: index, end: index + length })) : [];
}

function hitsOf(query) {
  const wanted = pattern(query);
  return wanted ? searched.filter((row) => textOf(row).search(wanted) >= 0) : [];
}

function hit(row, query, go) {
  const text = textOf(row), wanted = pattern(query);
  const middle = text.search(wanted);
  const halves = /^[\udc00-\udfff]|[\ud800-\udbff]$/g;
  const part = text.slice(Math.max(0, middle - AROUND), middle + 2 * AROUND).replace(halves, "");
  const condition = [names.vector[rows.vector[row]], `layer ${names.layer[rows.layer[row]]}`];
  const what = [...(rows.coefficient[row] === 0 ? ["unsteered"] : condition), signed(rows.coefficient[row])];
  const snippet = make("span", { class: "snippet", dir: "auto" });
  paint(snippet, part, [{ ranges: matches(part, wanted), wrap: marked("mark") }]);
  const about = make("span", { class: "about", dir: "auto" }, `${what.join(", ")}: ${labels[rows.prompt_id[row]]}`);
  const button = make("button", { type: "button" }, about, snippet);
  button.addEventListener("click", () => go(row));
  return make("li", {}, button);
}
