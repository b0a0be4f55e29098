// Texts as elements: differences, shaded tokens and search results. Texts only become text nodes.

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function minus(text) {
  return text.replaceAll("-", "\u2212");
}

function number(x) {
  if (x === null || x === undefined) return "\u2013";
  return minus(String(Number.isInteger(x) ? x : Number(x.toPrecision(4))));
}

function signed(x) {
  return (x > 0 ? "+" : "") + number(x);
}

// A mean and its interval, with the decimals that give the largest of them three significant figures.
function estimate(mean, low, high) {
  if (mean === null || mean === undefined) return "\u2013";
  const known = [mean, low, high].filter((x) => x !== null);
  const largest = Math.max(...known.map(Math.abs)) || 1;
  const decimals = Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(largest))));
  const [middle, ...ends] = known.map((x) => minus(x.toFixed(decimals)));
  return ends.length === 2 ? `${middle} [${ends[0]}, ${ends[1]}]` : middle;
}

// The nodes of text[start, end): each layer wraps its ranges; later layers apply within and between them.
function nodes(text, start, end, layers) {
  if (start >= end) return [];
  if (!layers.length) return [text.slice(start, end)];
  const [{ ranges, wrap }, ...further] = layers;
  const result = [];
  let at = start;
  for (const range of ranges) {
    const from = Math.max(range.start, at), to = Math.min(range.end, end);
    if (from >= to) continue;
    result.push(...nodes(text, at, from, further), wrap(range, nodes(text, from, to, further)));
    at = to;
  }
  return [...result, ...nodes(text, at, end, further)];
}

function marked(tag) {
  return (_, inside) => make(tag, {}, ...inside);
}

// The tokens of a row's text with their projections; empty if the page has none.
function tokensOf(row) {
  const values = rows.projections?.[row];
  let end = 0;
  return (values ? pieces[rows.text[row]] : []).map((length, k) => {
    end += length;
    return { start: end - length, end, value: values[k] };
  });
}

function shaded([centre, extent]) {
  return ({ value }, inside) => {
    const share = Math.min(1, Math.abs(value - centre) / (extent || 1));
    const about = { class: value < centre ? "token low" : "token high", title: number(value) };
    const element = make("span", about, ...inside);
    element.style.setProperty("--share", share.toFixed(2));
    return element;
  };
}

function paint(element, text, layers) {
  element.replaceChildren(...(text ? nodes(text, 0, text.length, layers) : [make("i", {}, "no text")]));
}
