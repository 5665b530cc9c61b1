// The strip over an answer: the gate weights of all its tokens, stacked, from the first token to the last.

const SVG = "http://www.w3.org/2000/svg";
const MOST_COLUMNS = 600; // with more tokens, neighbours are averaged: no screen shows more

export class Strip {
  constructor(classes) {
    this.element = document.createElementNS(SVG, "svg");
    this.element.setAttribute("class", "strip");
    this.element.setAttribute("role", "img");
    this.element.setAttribute("preserveAspectRatio", "none");
    // The first specialist lies at the bottom. Each layer reaches down to the ground, so the highest is drawn first.
    this.layers = classes.map((name) => this.#add("path", `layer ${name}`));
    this.element.append(...this.layers.toReversed());
    this.mark = this.#add("rect", "mark");
    this.mark.setAttribute("height", "1");
    this.element.append(this.mark);
    this.count = 0;
  }

  #add(tag, className) {
    const shape = document.createElementNS(SVG, tag);
    shape.setAttribute("class", className);
    return shape;
  }

  /** Draw one row of weights per token; a token without weights leaves a gap. */
  draw(rows) {
    this.count = rows.length;
    const columns = average(rows, Math.ceil(rows.length / MOST_COLUMNS));
    this.element.setAttribute("viewBox", `0 0 ${Math.max(1, columns.length)} 1`);
    this.columns = columns.length;
    const height = columns.map(() => 0);
    for (const [n, layer] of this.layers.entries()) {
      let path = "M0,1";
      for (const [x, column] of columns.entries()) {
        height[x] += column?.[n] ?? 0;
        path += `V${(1 - height[x]).toFixed(3)}H${x + 1}`;
      }
      layer.setAttribute("d", `${path}V1Z`);
    }
  }

  /** Show where one token is; null shows none. */
  point(index) {
    this.mark.toggleAttribute("hidden", index === null);
    if (index === null) return;
    const width = this.columns / this.count;
    this.mark.setAttribute("x", String(index * width));
    this.mark.setAttribute("width", String(Math.max(width, this.columns / 250)));
  }

  /** The position of the token below a point of the screen. */
  at(clientX) {
    const box = this.element.getBoundingClientRect();
    const share = (clientX - box.left) / box.width;
    return Math.min(this.count - 1, Math.max(0, Math.floor(share * this.count)));
  }
}

function average(rows, width) {
  if (width <= 1) return rows;
  const columns = [];
  for (let start = 0; start < rows.length; start += width) {
    const group = rows.slice(start, start + width).filter((row) => row !== null);
    columns.push(
      group.length === 0 ? null : group[0].map((_, n) => group.reduce((sum, row) => sum + row[n], 0) / group.length),
    );
  }
  return columns;
}
