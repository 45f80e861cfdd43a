
"use strict";
// A click on a column's header sorts by it: ascending, descending, then in network order again. Rows are compared by the
// numbers in full precision; those without a number stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const numeric = (head) => head.classList.contains("number");
  const compare = (column, direction) => (one, other) => {
    const [a, b] = [one.cells[column], other.cells[column]];
    if (!numeric(heads[column])) {
      return direction * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
    }
    const [known, also] = ["value" in a.dataset, "value" in b.dataset];
    return known && also ? direction * (Number(a.dataset.value) - Number(b.dataset.value)) : also - known;
  };
  heads.forEach((head, column) => {
    // Not a button element: on paper, browsers leave those out where a header is repeated.
    const button = head.firstElementChild;
    button.setAttribute("role", "button");
    button.tabIndex = 0;
    const sort = () => {
      const next = { ascending: "descending", descending: null }[head.getAttribute("aria-sort") ?? ""];
      const order = next === undefined ? "ascending" : next;
      heads.forEach((own) => own.removeAttribute("aria-sort"));
      if (order) head.setAttribute("aria-sort", order);
      body.append(...(order ? [...rows].sort(compare(column, order === "ascending" ? 1 : -1)) : rows));
    };
    button.addEventListener("click", sort);
    button.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sort();
    });
  });
}
for (const hint of document.querySelectorAll(".hint")) hint.hidden = false;
// On paper, everything is unfolded.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const one of folded) one.open = true;
});
window.addEventListener("afterprint", () => {
  for (const one of folded) one.open = false;
});
