// Tables of class "sortable" are sorted by a click on a header: figures from the largest, words from
// the first, a second click the other way round. Without scripts they stay as they are.
(() => {
  const text = (row, column) => {
    let place = 0;
    for (const cell of row.cells) {
      place += cell.colSpan;
      if (place > column) return cell.textContent.trim();
    }
    return "";
  };
  const value = (words) => {
    const figure = words.replace(/,/g, "").match(/^[+-]?[0-9.]+(e[+-]?[0-9]+)?/i);
    return figure ? Number(figure[0]) : NaN;
  };
  const sort = (table, column, header) => {
    const body = table.tBodies[0], rows = [...body.rows];
    const entries = rows.map((row) => ({ row, words: text(row, column), value: value(text(row, column)) }));
    const absent = (entry) => entry.words === "" || entry.words === "-" || (numeric && Number.isNaN(entry.value));
    const numeric = header.classList.contains("n") || entries.every((entry) => !Number.isNaN(entry.value));
    const before = header.getAttribute("aria-sort") || "none";
    const first = numeric ? "descending" : "ascending", second = numeric ? "ascending" : "descending";
    const order = before === first ? second : first, sign = order === "ascending" ? 1 : -1;
    const compared = (a, b) => numeric ? a.value - b.value : a.words.localeCompare(b.words, "en", { numeric: true });
    entries.sort((a, b) => absent(a) - absent(b) || (absent(a) ? 0 : sign * compared(a, b)));
    body.append(...entries.map((entry) => entry.row));
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", order);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    let column = 0;
    for (const header of table.tHead.rows[0].cells) {
      const place = column;
      column += header.colSpan;
      if (!header.textContent.trim()) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.title = "sort";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sort(table, place, header));
    }
  }
})();
