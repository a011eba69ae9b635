"use strict";
// Parts of interactive pages: heat maps on a canvas, legends, and lists that arrow keys walk.

const $ = (id) => document.getElementById(id);

// --- Colors -------------------------------------------------------------------------------------

const painter = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

/** The red, green and blue of a CSS variable. */
function rgb(name) {
  painter.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name);
  painter.fillRect(0, 0, 1, 1);
  return [...painter.getImageData(0, 0, 1, 1).data].slice(0, 3);
}

/** A legend below a map: a color scale between two labels. */
function legend(id, color, low, high, from = "var(--empty)") {
  const bar = document.createElement("i");
  bar.style.background = `linear-gradient(to right, ${from}, ${color})`;
  $(id).replaceChildren(low, bar, high);
}

// --- Maps ---------------------------------------------------------------------------------------

/** A heat map on a canvas, which mouse, touch and arrow keys explore. */
class HeatMap {
  /**
   * @param id       of the canvas; `${id}-readout` shows the cell in focus
   * @param describe (row, column) -> the text about a cell
   * @param pick     (row, column): called for a click and for Enter
   */
  constructor(id, describe, pick = () => {}) {
    Object.assign(this, { canvas: $(id), output: $(`${id}-readout`), describe, pick });
    this.cell = null;
    const { canvas } = this;
    canvas.addEventListener("pointermove", (e) => this.point(this.at(e)));
    canvas.addEventListener("pointerdown", (e) => {
      this.point(this.at(e));
      if (this.cell) this.pick(...this.cell);
    });
    canvas.addEventListener("keydown", (e) => this.key(e));
    canvas.addEventListener("focus", () => this.point(this.cell ?? this.start ?? [0, 0]));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /**
   * @param rows  arrays of numbers from -1 to 1, which may differ in length; below 0 is `low`
   * @param options high, low: CSS variables; apart: columns that stand apart at the left, in
   *              the color of the null;
   *              marks: cells [row, column] with a frame; row: a row to frame; height: of the
   *              map, from its width, in pixels; start: the first cell for the keyboard;
   *              labels: of the rows, which are shown where there is space; ends: whether they
   *              stand at the ends of the rows and not at their starts
   */
  show(label, rows, options) {
    this.rows = rows;
    this.columns = Math.max(...rows.map((row) => row.length));
    Object.assign(this, {
      low: "--sink", apart: 0, marks: [], row: null, height: (width) => width, ends: false,
    }, options);
    this.canvas.setAttribute("aria-label", `${label}; arrow keys move from cell to cell`);
    this.draw();
  }

  /** The left edge of a column in CSS pixels; those that stand apart are wider. */
  left(column) {
    const { apart, columns, margin, ends } = this;
    const gap = apart ? 6 : 0, wide = apart ? 12 : 0, start = ends ? 0 : margin;
    const each = (this.canvas.clientWidth - margin - apart * wide - gap) / (columns - apart);
    if (column < apart) return start + column * wide;
    return start + apart * wide + gap + (column - apart) * each;
  }

  right(column) {
    return column < this.apart ? this.left(column) + 12 : this.left(column + 1);
  }

  /** Write the labels beside their rows. */
  write(pen, each) {
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--muted");
    pen.textBaseline = "middle";
    pen.textAlign = this.ends ? "left" : "right";
    this.labels.forEach((label, row) => {
      const x = this.ends ? this.right(this.rows[row].length - 1) + 5 : this.margin - 5;
      pen.fillText(label, x, (row + 0.5) * each);
    });
  }

  at({ offsetX, offsetY }) {
    const row = Math.floor((offsetY / this.canvas.clientHeight) * this.rows.length);
    let column = 0;
    while (column < this.columns - 1 && offsetX >= this.left(column + 1)) column++;
    return this.clip(row, column);
  }

  clip(row, column) {
    row = Math.min(Math.max(row, 0), this.rows.length - 1);
    return [row, Math.min(Math.max(column, 0), this.rows[row].length - 1)];
  }

  key(event) {
    const [row, column] = this.cell ?? [0, 0];
    const moved = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1], Home: [row, 0], End: [row, this.columns],
      PageUp: [row - 10, column], PageDown: [row + 10, column],
    }[event.key];
    if (moved) this.point(this.clip(...moved));
    else if (event.key === "Enter" || event.key === " ") this.pick(row, column);
    else return;
    event.preventDefault();
  }

  point(cell) {
    if (this.cell && cell[0] === this.cell[0] && cell[1] === this.cell[1]) return;
    this.cell = cell;
    this.output.textContent = this.describe(...cell);
    this.draw();
  }

  draw() {
    const { canvas } = this, width = canvas.clientWidth;
    if (!this.rows || !width) return;
    const height = Math.round(this.height(width)), density = window.devicePixelRatio;
    canvas.style.height = `${height}px`;
    canvas.width = width * density;
    canvas.height = height * density;
    const pen = canvas.getContext("2d"), each = height / this.rows.length;
    pen.scale(density, density);
    pen.imageSmoothingEnabled = false;
    pen.font = `${Math.min(12, each)}px system-ui, sans-serif`;
    const widths = each < 9 ? [0] : this.labels.map((label) => pen.measureText(label).width + 8);
    this.margin = Math.min(Math.max(...widths), width / 4);
    const picture = this.picture(), { apart, columns } = this;
    const paint = (from, to) => pen.drawImage(picture, from, 0, to - from, picture.height,
      this.left(from), 0, this.right(to - 1) - this.left(from), height);
    if (apart) paint(0, apart);
    paint(apart, columns);
    if (this.margin) this.write(pen, each);
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink");
    const frame = (row, column, color, line) => {
      pen.strokeStyle = color;
      pen.lineWidth = line;
      const x = this.left(column), w = this.right(column) - x;
      const extra = Math.max(0, 5 - Math.min(w, each)) / 2; // a tiny cell has a larger frame
      pen.strokeRect(x - extra, row * each - extra, w + 2 * extra, each + 2 * extra);
    };
    const mark = getComputedStyle(document.documentElement).getPropertyValue("--sink");
    for (const [row, column] of this.marks) frame(row, column, mark, 1.5);
    if (this.row !== null) {
      pen.strokeStyle = ink;
      pen.lineWidth = 1;
      const start = this.left(0), end = this.right(this.rows[this.row].length - 1);
      pen.strokeRect(start + 0.5, this.row * each + 0.5, end - start - 1, Math.max(1, each - 1));
    }
    if (this.cell && this.cell[0] < this.rows.length) frame(...this.cell, ink, 2);
  }

  /** One pixel a cell. */
  picture() {
    const picture = new OffscreenCanvas(this.columns, this.rows.length);
    const pen = picture.getContext("2d");
    const image = pen.createImageData(this.columns, this.rows.length);
    const [empty, high, low, null_] = ["--empty", this.high, this.low, "--null"].map(rgb);
    this.rows.forEach((row, r) => row.forEach((value, c) => {
      const end = c < this.apart ? null_ : value < 0 ? low : high;
      const share = Math.min(1, Math.abs(value));
      const at = 4 * (r * this.columns + c);
      for (let i = 0; i < 3; i++) image.data[at + i] = empty[i] + share * (end[i] - empty[i]);
      image.data[at + 3] = 255;
    }));
    pen.putImageData(image, 0, 0);
    return picture;
  }
}

/** Arrow keys move the focus in a list of elements; one of them is in the tab order. */
function roving(elements, columns, select) {
  elements.forEach((element, i) => {
    element.tabIndex = -1;
    element.addEventListener("click", () => select(i));
    element.addEventListener("keydown", (event) => {
      const last = elements.length - 1;
      let to = {
        ArrowLeft: i - 1, ArrowRight: i + 1, ArrowUp: i - columns, ArrowDown: i + columns,
        Home: 0, End: last, Enter: i, " ": i,
      }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      if (to < 0 || to > last) to = i;
      elements[to].focus();
      select(to);
    });
  });
}

function mark(elements, index) {
  elements.forEach((element, i) => {
    element.setAttribute("aria-selected", i === index);
    element.tabIndex = i === index ? 0 : -1;
  });
}

