// The data of the page, which of its rows is shown, and the link that encodes it.

const {
  rows, names, labels, prompts, turns, strings, scores, titles, yes_no, series, conditions, pieces, start, axis: strength,
} =
  JSON.parse(document.getElementById("data").textContent);

const CHOICES = ["vector", "layer", "prompt_id", "sample"];
const IN_LINK = { vector: "vector", layer: "layer", prompt_id: "prompt", sample: "sample" };

function textOf(row) {
  return row === undefined ? "" : strings[rows.text[row]] ?? "";
}

// The view for a requested selection. A choice that is missing, or has no text, becomes that of `start`; where `start`
// has none either, the first possible one.
function viewOf(requested) {
  const view = { options: {}, query: requested.query ?? "" };
  let remaining = rows.coefficient.map((_, row) => row);
  for (const choice of CHOICES) {
    const options = [...new Set(remaining.map((row) => rows[choice][row]))];
    view.options[choice] = options;
    view[choice] = [requested[choice], start[choice], options[0]].find((code) => options.includes(code));
    remaining = remaining.filter((row) => rows[choice][row] === view[choice]);
  }
  view.list = remaining.sort((a, b) => rows.coefficient[a] - rows.coefficient[b]);
  view.index = nearest(view.list.map((row) => rows.coefficient[row]), requested.coefficient ?? start.coefficient);
  view.row = view.list[view.index];
  view.coefficient = rows.coefficient[view.row];
  view.zero = view.list.find((row) => rows.coefficient[row] === 0);
  view.condition = conditions[`${view.vector},${view.layer}`];
  return view;
}

// The fields of a link that differ from the view, in words.
function differencesOf(link, view) {
  const shown = fieldsOf(toLink(view));
  const words = [...fieldsOf(link)].flatMap(([field, value]) => {
    if (field === "find" || (field === strength ? numberOf(value) === view.coefficient : value === shown.get(field))) {
      return [];
    }
    return [`${field} "${value}" (${shown.has(field) ? `shown: ${shown.get(field)}` : "no such field"})`];
  });
  return words.length ? `No text for this link: ${words.join(", ")}.` : "";
}

function fieldsOf(link) {
  return new URLSearchParams(link.slice(1));
}

function numberOf(text) {
  return text?.trim() ? Number(text) : NaN;
}

function nearest(values, wanted) {
  if (wanted === undefined) {
    const positive = values.findIndex((value) => value > 0);
    return positive < 0 ? values.length - 1 : positive;
  }
  const distances = values.map((value) => Math.abs(value - wanted));
  return distances.indexOf(Math.min(...distances));
}

function toLink(view) {
  const link = new URLSearchParams(CHOICES.map((choice) => [IN_LINK[choice], names[choice][view[choice]]]));
  link.set(strength, view.coefficient);
  if (view.query) link.set("find", view.query);
  return `#${link}`;
}

function fromLink(link) {
  const fields = fieldsOf(link), coefficient = numberOf(fields.get(strength));
  const requested = { query: fields.get("find") ?? "" };
  for (const choice of CHOICES) requested[choice] = names[choice].indexOf(fields.get(IN_LINK[choice]));
  if (Number.isFinite(coefficient)) requested.coefficient = coefficient;
  return requested;
}
