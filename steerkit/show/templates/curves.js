// A score over the coefficient: lines with their intervals as SVG, and as a table.

const SIZE = { width: 360, height: 200, left: 46, right: 12, top: 12, bottom: 36 };
const LOGARITHMIC = ["perplexity"];
const STYLES = ["own", "control first", "control second"];

function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function label(attributes, text) {
  return draw("text", { "text-anchor": "middle", ...attributes }, text);
}

function steps(low, high, most) {
  const rough = (high - low) / most, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((x) => x * unit >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-6), last = Math.floor(high / step + 1e-6);
  return Array.from({ length: last - first + 1 }, (_, k) => (first + k) * step);
}

function decades(low, high) {
  const count = Math.ceil(Math.log10(high / low)) + 2;
  const powers = Array.from({ length: count }, (_, k) => Math.floor(Math.log10(low)) + k);
  const within = (values) => values.filter((x) => x >= low && x <= high);
  const fine = within(powers.flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power)));
  const ticks = fine.length < 7 ? fine : within(powers.map((power) => 10 ** power));
  return ticks.length < 2 ? steps(low, high, 3) : ticks;
}

// The map from values to pixels, and the ticks.
function axis(values, from, to, { logarithmic = false, margin = 0, most = 5 } = {}) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) {
    const room = Math.abs(low) * 0.1 || 0.5;
    [low, high] = logarithmic ? [low / 1.2, high * 1.2] : [low - room, high + room];
  }
  const map = logarithmic ? Math.log : (x) => x;
  const room = (map(high) - map(low)) * margin;
  const [first, last] = [map(low) - room, map(high) + room];
  const toPixel = (x) => from + ((map(x) - first) / (last - first)) * (to - from);
  return { toPixel, ticks: logarithmic ? decades(low, high) : steps(low, high, most) };
}

// The runs of consecutive points that have all of these columns.
function stretches(points, ...columns) {
  const runs = [[]];
  for (const point of points) {
    if (columns.every((column) => point[column] !== null)) runs.at(-1).push(point);
    else runs.push([]);
  }
  return runs.filter((stretch) => stretch.length);
}

function path(corners, close = "") {
  return `M${corners.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join("L")}${close}`;
}

function drawLine({ points, style }, x, y) {
  const at = (stretch, column) => stretch.map((point) => [x(point[0]), y(point[column])]);
  const bands = stretches(points, 2, 3).map((stretch) =>
    draw("path", { class: "band", d: path([...at(stretch, 2), ...at(stretch, 3).reverse()], "Z") }));
  const lines = stretches(points, 1).map((stretch) => draw("path", { class: "line", d: path(at(stretch, 1)) }));
  const dots = stretches(points, 1).flat().map((point) =>
    draw("circle", { class: "dot", cx: x(point[0]).toFixed(1), cy: y(point[1]).toFixed(1), r: 2.5 }));
  return draw("g", { class: style }, ...bands, ...lines, ...dots);
}

// The lines, with the shown coefficient marked; `pick` is called with a coefficient that is clicked.
function chart({ score, title }, lines, coefficients, now, pick) {
  const { width, height, left, right, top, bottom } = SIZE;
  const about = `${title} over the ${strength}; the table below has the values`;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": about });
  const values = lines.flatMap(({ points }) => points.flatMap((point) => point.slice(1, 4))).filter((v) => v !== null);
  if (!values.length) return svg;
  const logarithmic = LOGARITHMIC.includes(score) && Math.min(...values) > 0;
  const x = axis(coefficients, left, width - right, { margin: 0.03, most: 7 });
  const y = axis(values, height - bottom, top, { logarithmic, margin: 0.05, most: 4 });
  for (const tick of y.ticks) {
    const at = y.toPixel(tick).toFixed(1);
    svg.append(draw("path", { class: "grid", d: `M${left},${at}H${width - right}` }));
    svg.append(label({ x: left - 6, y: at, "text-anchor": "end", "dominant-baseline": "central" }, number(tick)));
  }
  for (const tick of x.ticks) {
    const at = x.toPixel(tick).toFixed(1);
    svg.append(draw("path", { class: tick === 0 ? "grid zero" : "grid", d: `M${at},${top}V${height - bottom}` }));
    svg.append(label({ x: at, y: height - bottom + 14 }, number(tick)));
  }
  const caption = logarithmic ? `${strength}; the score on a logarithmic scale` : strength;
  svg.append(label({ x: (left + width - right) / 2, y: height - 4 }, caption));
  svg.append(draw("path", { class: "now", d: `M${x.toPixel(now).toFixed(1)},${top}V${height - bottom}` }));
  const groups = lines.map((line) => drawLine(line, x.toPixel, y.toPixel));
  svg.append(...groups.reverse());
  const own = lines.find(({ style }) => style === "own");
  const current = own?.points.find(([coefficient]) => coefficient === now);
  if (current && current[1] !== null) {
    const centre = { cx: x.toPixel(now).toFixed(1), cy: y.toPixel(current[1]).toFixed(1) };
    svg.append(draw("circle", { class: "own here", ...centre, r: 5 }));
  }
  svg.addEventListener("click", (event) => {
    const pixel = (event.offsetX / svg.clientWidth) * width;
    const distances = coefficients.map((coefficient) => Math.abs(x.toPixel(coefficient) - pixel));
    pick(coefficients[distances.indexOf(Math.min(...distances))]);
  });
  return svg;
}

function titleOf({ name, of }) {
  return of > 1 ? `${name} (mean of ${of})` : name;
}

function legend(lines, now) {
  return lines.map((line) => {
    const point = line.points.find(([coefficient]) => coefficient === now) ?? [];
    const entry = make("li", { class: line.style });
    entry.append(make("span", { class: "swatch", "aria-hidden": "true" }));
    entry.append(make("bdi", { class: "name" }, titleOf(line)));
    entry.append(make("span", {}, `${estimate(point[1], point[2] ?? null, point[3] ?? null)} at ${signed(now)}`));
    entry.append(make("span", {}, `area under the curve ${estimate(...(line.area ?? [null, null, null]))}`));
    return entry;
  });
}

function valuesOf(lines, coefficients, now) {
  const head = make("tr", {}, make("th", { scope: "col", class: "number" }, strength));
  for (const line of lines) {
    head.append(make("th", { scope: "col", class: "number" }, make("bdi", {}, titleOf(line)), ", n"));
  }
  const body = coefficients.map((coefficient) => {
    const row = make("tr", coefficient === now ? { "aria-current": "true" } : {});
    row.append(make("th", { scope: "row", class: "number" }, signed(coefficient)));
    for (const { points } of lines) {
      const [, mean, low, high, n] = points.find(([c]) => c === coefficient) ?? [coefficient, null, null, null, null];
      row.append(make("td", { class: "number" }, `${estimate(mean, low, high)}, ${number(n)}`));
    }
    return row;
  });
  return [make("thead", {}, head), make("tbody", {}, ...body)];
}
