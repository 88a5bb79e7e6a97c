// Sorts a table by the column whose heading is clicked; a second click turns the order round.
for (const table of document.querySelectorAll(".scroll table")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.addEventListener("click", () => {
    const falling = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) =>
      key(a).localeCompare(key(b), undefined, { numeric: true }));
    table.tBodies[0].append(...(falling ? rows.reverse() : rows));
  }));
}
