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

// The view for a requested selection; a choice that is missing or does not exist becomes the first possible one.
function viewOf(requested) {
  const view = { options: {}, query: requested.query ?? "" };
  let remaining = rows.coefficient.map((_, row) => row);
  for (const choice of CHOICES) {
    const options = [...new Set(remaining.map((row) => rows[choice][row]))];
    view.options[choice] = options;
    view[choice] = options.includes(requested[choice]) ? requested[choice] : options[0];
    remaining = remaining.filter((row) => rows[choice][row] === view[choice]);
  }
  view.list = remaining.sort((a, b) => rows.coefficient[a] - rows.coefficient[b]);
  view.index = nearest(view.list.map((row) => rows.coefficient[row]), requested.coefficient);
  view.row = view.list[view.index];
  view.coefficient = rows.coefficient[view.row];
  view.zero = view.list.find((row) => rows.coefficient[row] === 0);
  view.condition = conditions[`${view.vector},${view.layer}`];
  return view;
}

// What a link asks for and this page does not have, in words.
function missingOf(requested) {
  const lacks = requested.unknown ?? [];
  const coefficient = requested.coefficient ?? view.coefficient;
  const words = coefficient === view.coefficient ? lacks : [...lacks, `coefficient ${signed(coefficient)}`];
  return words.length ? `The link asks for ${words.join(" and ")}, which this page does not have. Shown instead:` : "";
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
  link.set("coefficient", view.coefficient);
  if (view.query) link.set("find", view.query);
  return `#${link}`;
}

function fromLink(fragment) {
  const link = new URLSearchParams(fragment.slice(1));
  const requested = { query: link.get("find") ?? "", unknown: [] };
  for (const choice of CHOICES) {
    const wanted = link.get(IN_LINK[choice]);
    requested[choice] = names[choice].indexOf(wanted);
    if (wanted !== null && requested[choice] < 0) requested.unknown.push(`${IN_LINK[choice]} "${wanted}"`);
  }
  const coefficient = Number.parseFloat(link.get("coefficient"));
  if (Number.isFinite(coefficient)) requested.coefficient = coefficient;
  return requested;
}
