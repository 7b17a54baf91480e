const table = document.getElementById("results");
const rows = table ? [...table.tBodies[0].rows] : [];

// Sort: what a cell counts as is in data-v; cells without it are compared as text, and come last among numbers.
function sortBy(column, header) {
  const descending = header.getAttribute("aria-sort") !== "descending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const value = (row) => row.cells[column].dataset.v;
  const text = (row) => row.cells[column].textContent.trim();
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) {
      if (x !== y) return x === undefined ? 1 : -1;
      return text(a).localeCompare(text(b), "en", { numeric: true }) * (descending ? -1 : 1);
    }
    return (x - y) * (descending ? -1 : 1);
  });
  table.tBodies[0].append(...rows);
}
if (table) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(column, header));
    header.append(button);
  });
}

// Filter: a row stays if it has all the words.
const filter = document.getElementById("filter");
if (filter && table) {
  filter.closest(".tools").hidden = false;
  const said = document.getElementById("filtered");
  const apply = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    said.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} shown`;
  };
  filter.addEventListener("input", apply);
  apply();
}

// A link to a q_id opens it.
const folds = [...document.querySelectorAll("details.qid")];
function openTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const fold = target && target.closest("details");
  if (fold) {
    fold.open = true;
    target.scrollIntoView();
  }
}
addEventListener("hashchange", openTarget);
openTarget();
for (const [id, open] of [["open-all", true], ["close-all", false]]) {
  document.getElementById(id)?.addEventListener("click", () => folds.forEach((fold) => { fold.open = open; }));
}
