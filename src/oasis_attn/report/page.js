"use strict";
// Tables that are sorted by a click on the header of a column.

/** The number in a cell: the first one; null if it begins with none. */
function numberIn(text) {
  const found = text.replaceAll(",", "").match(/^[<+]?\s*(-?[\d.]+(?:e[+-]?\d+)?|-?inf)(\s*[x%])?/i);
  if (!found) return null;
  const value = /inf/i.test(found[1]) ? (found[1][0] === "-" ? -Infinity : Infinity) : Number(found[1]);
  return found[2]?.trim() === "x" ? 100 * value : value; // a change in x among those in %
}

/** Sort the rows by a column; cells without a number stand last in a column of numbers. */
function sortBy(table, column, descending) {
  const rows = [...table.tBodies[0].rows];
  const keys = new Map(rows.map((row) => {
    const text = row.cells[column].textContent.trim();
    return [row, { text, number: numberIn(text) }];
  }));
  const numeric = rows.filter((row) => keys.get(row).number !== null).length >= rows.length / 2;
  const sign = descending ? -1 : 1;
  rows.sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (!numeric) return sign * x.text.localeCompare(y.text, "en", { numeric: true });
    if (x.number === null || y.number === null) return (x.number === null) - (y.number === null);
    return sign * (x.number - y.number || 0);
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table")) {
  if (!table.tHead || table.tBodies[0].rows.length < 2) continue;
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.title = "Sort by this column";
    header.append(button);
    button.addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      headers.forEach((each) => each.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(table, column, descending);
    });
  });
}

// A box around something that fits into the page does not scroll, so that its header can stay at the
// top of the window, and the keyboard does not stop at it.
const sized = new ResizeObserver((entries) => {
  for (const { target: box } of entries) {
    const fits = box.firstElementChild.getBoundingClientRect().width <= box.clientWidth + 1;
    box.classList.toggle("fits", fits);
    box.tabIndex = fits ? -1 : 0;
  }
});
document.querySelectorAll(".scroll").forEach((box) => sized.observe(box));

// Printed, nothing is hidden.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
});
