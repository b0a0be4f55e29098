// The data of the page, which of its rows is shown, and the link that says so.

const { rows, names, labels, prompts, strings, scores, series, places, pieces } =
  JSON.parse(document.getElementById("data").textContent);

const CHOICES = ["vector", "layer", "prompt_id", "sample"];
const IN_LINK = { vector: "vector", layer: "layer", prompt_id: "prompt", sample: "sample" };

function textOf(row) {
  return row === undefined ? "" : strings[rows.text[row]] ?? "";
}

// What is shown for a wish. A wish may say little, or what is not there: then the first that goes with what it says.
function settle(wish) {
  const view = { options: {}, query: wish.query ?? "" };
  let left = rows.coefficient.map((_, row) => row);
  for (const choice of CHOICES) {
    const options = [...new Set(left.map((row) => rows[choice][row]))];
    view.options[choice] = options;
    view[choice] = options.includes(wish[choice]) ? wish[choice] : options[0];
    left = left.filter((row) => rows[choice][row] === view[choice]);
  }
  view.list = left.sort((a, b) => rows.coefficient[a] - rows.coefficient[b]);
  view.index = nearest(view.list.map((row) => rows.coefficient[row]), wish.coefficient);
  view.row = view.list[view.index];
  view.coefficient = rows.coefficient[view.row];
  view.zero = view.list.find((row) => rows.coefficient[row] === 0);
  view.place = places[`${view.vector},${view.layer}`];
  return view;
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
  const wish = { query: link.get("find") ?? "" };
  for (const choice of CHOICES) wish[choice] = names[choice].indexOf(link.get(IN_LINK[choice]));
  const coefficient = Number.parseFloat(link.get("coefficient"));
  if (Number.isFinite(coefficient)) wish.coefficient = coefficient;
  return wish;
}
