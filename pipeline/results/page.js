// Filters and sorts the tables of the page. What is selected is kept in the address, after "#".
"use strict";
(() => {
  const KEYS = ["data", "shots", "budget", "answers", "model"];
  const form = document.getElementById("filters");
  if (!form) return;
  const tables = [...document.querySelectorAll("table.board")];
  const fields = [...form.elements].filter((field) => field.name);
  const lines = (table) => [...table.tBodies[0].rows];
  const sorting = { sort: form.dataset.sort, order: "descending" };
  const start = { ...values(), ...sorting };

  function values() {
    return Object.fromEntries(
      fields.map((field) => [field.name, field.type === "checkbox" ? String(field.checked) : field.value]));
  }

  function select(state) {
    for (const field of fields) {
      const value = state[field.name];
      if (field.type === "checkbox") field.checked = value === "true";
      else field.value = value;
      if (field.value !== value && field.tagName === "SELECT") field.value = start[field.name];
    }
    sorting.sort = state.sort;
    sorting.order = state.order === "ascending" ? "ascending" : "descending";
  }

  function shown(line, state) {
    const data = line.dataset;
    return line.cells[0].textContent.toLowerCase().includes(state.method.trim().toLowerCase())
      && (!state.class || data.class.split("|").includes(state.class))
      && KEYS.every((key) => !state[key] || data[key] === state[key]);
  }

  function sort(table) {
    const heads = [...table.tHead.rows[0].cells];
    const at = heads.findIndex((head) => head.textContent === sorting.sort);
    heads.forEach((head, i) => {
      if (i === at) head.setAttribute("aria-sort", sorting.order);
      else head.removeAttribute("aria-sort");
    });
    if (at < 0) return;
    const sign = sorting.order === "ascending" ? 1 : -1;
    const numeric = lines(table).some((line) => line.cells[at].dataset.v !== undefined);
    const key = (line) => numeric ? line.cells[at].dataset.v : line.cells[at].textContent;
    table.tBodies[0].append(...lines(table).sort((one, other) => {
      const [a, b] = [key(one), key(other)];
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);  // empty cells last
      return sign * (numeric ? a - b : a.localeCompare(b));
    }));
  }

  function update() {
    const state = { ...values(), ...sorting };
    let visible = 0, all = 0;
    for (const table of tables) {
      for (const line of lines(table)) {
        line.hidden = !shown(line, state);
        visible += !line.hidden;
        all += 1;
      }
      table.closest(".wide").hidden = lines(table).every((line) => line.hidden);
      for (const key of KEYS) table.classList.toggle(`one-${key}`, !!state[key]);
      table.classList.toggle("short", state.more !== "true");
      sort(table);
    }
    form.querySelector("output").value = `${visible} of ${all} lines shown`;
    const changed = Object.entries(state).filter(([key, value]) => value !== start[key]);
    const hash = new URLSearchParams(changed).toString();
    if (hash || location.hash.includes("=")) history.replaceState(null, "", `#${hash}`);
  }

  function restore() {
    const hash = location.hash.slice(1);
    if (hash.includes("=")) select({ ...start, ...Object.fromEntries(new URLSearchParams(hash)) });
    update();
  }

  for (const table of tables) {
    for (const head of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.addEventListener("click", () => {
        const again = sorting.sort === button.textContent && sorting.order === "descending";
        sorting.order = again ? "ascending" : "descending";
        sorting.sort = button.textContent;
        update();
      });
      head.replaceChildren(button);
    }
  }
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    select(start);
    update();
  });
  addEventListener("hashchange", restore);
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const part of closed) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of closed) part.open = false;
  });
  form.hidden = false;
  restore();
})();
