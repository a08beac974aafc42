// The table of all entries: filters and sorting over plain rows; the state is kept in the address. No request is made.
// (The parameter is called `text`: at `q` the theme opens its own search.)
(() => {
  "use strict";
  const table = document.getElementById("rq-papers");
  if (!table) return;
  const form = document.getElementById("rq-filters");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const column = Object.fromEntries(heads.map((head, index) => [head.dataset.key, index]));
  const listed = ["bits", "quantizes", "tags"];
  const states = ["reproduced", "contradicted", "not-run"];

  const rows = [...body.rows].map((row, order) => {
    const text = heads.map((_, index) => row.cells[index].textContent.trim());
    const counts = Object.fromEntries(states.map((state) => [state, parseInt(text[column[state]].replace(/\D+/g, ""), 10)]));
    return {
      row,
      order,
      counts,
      shown: true,
      keys: heads.map((head, index) => sortKey(head, text[index])),
      search: [text.slice(0, 6).join(" "), row.cells[0].firstChild.getAttribute("href"), row.dataset.a].join(" ").toLowerCase(),
      venue: text[column.venue],
      year: text[column.year],
      sets: Object.fromEntries(listed.map((key) => [key, new Set(text[column[key]].split(", "))])),
      planned: "n" in row.dataset,
    };
  });
  let sort = { key: "", descending: false };
  let tags = [];

  function sortKey(head, text) {
    if (!("number" in head.dataset)) return text.toLowerCase();
    const found = text.match(/\d+/);
    return found ? Number(found[0]) : -1;
  }

  function wanted() {
    return {
      words: form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean),
      venue: form.elements.venue.value,
      year: form.elements.year.value,
      bits: form.elements.bits.value,
      quantizes: form.elements.quantizes.value,
      state: form.elements.state.value,
    };
  }

  function fits(item, want) {
    return (
      want.words.every((word) => item.search.includes(word)) &&
      tags.every((tag) => item.sets.tags.has(tag)) &&
      (!want.venue || item.venue === want.venue) &&
      (!want.year || item.year === want.year) &&
      (!want.bits || item.sets.bits.has(want.bits)) &&
      (!want.quantizes || item.sets.quantizes.has(want.quantizes)) &&
      (!want.state || (want.state === "no-implementation" ? item.planned : item.counts[want.state] > 0))
    );
  }

  const slice = 60; // rows that appear at once; the others follow in the next frames, so that typing stays smooth
  let later = 0;

  function filter() {
    const want = wanted();
    const appearing = [];
    let n = 0;
    for (const item of rows) {
      item.shown = fits(item, want);
      n += item.shown;
      if (!item.shown) item.row.hidden = true;
      else if (item.row.hidden) appearing.push(item);
    }
    clearTimeout(later);
    appear(appearing);
    document.getElementById("rq-count").textContent = `${n} of ${rows.length} shown`;
    showTags();
    remember(want);
  }

  function appear(items) {
    for (const item of items.slice(0, slice)) item.row.hidden = false;
    if (items.length > slice) later = setTimeout(() => appear(items.slice(slice)), 16);
  }

  function showTags() {
    const chosen = document.getElementById("rq-chosen");
    chosen.replaceChildren(
      ...tags.map((tag) => {
        const button = document.createElement("button");
        button.type = "button";
        button.className = "rq-tag";
        button.textContent = `${tag} \u00d7`;
        button.setAttribute("aria-label", `Remove the tag ${tag}`);
        button.addEventListener("click", () => {
          tags = tags.filter((other) => other !== tag);
          filter();
        });
        return button;
      })
    );
  }

  function order() {
    const index = column[sort.key];
    const sign = sort.descending ? -1 : 1;
    const compare = (a, b) => {
      if (index === undefined) return a.order - b.order;
      const [x, y] = [a.keys[index], b.keys[index]];
      return sign * (typeof x === "number" ? x - y : x.localeCompare(y)) || a.order - b.order;
    };
    rows.sort(compare);
    body.append(...rows.map((item) => item.row));
    for (const head of heads) {
      if (head.dataset.key !== sort.key) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", sort.descending ? "descending" : "ascending");
    }
  }

  function remember(want) {
    const query = new URLSearchParams();
    if (want.words.length) query.set("text", form.elements.text.value);
    for (const tag of tags) query.append("tag", tag);
    for (const key of ["venue", "year", "bits", "quantizes", "state"]) if (want[key]) query.set(key, want[key]);
    if (sort.key) query.set("sort", (sort.descending ? "-" : "") + sort.key);
    const text = query.toString();
    try {
      history.replaceState(null, "", text ? `?${text}` : location.pathname);
    } catch (error) {
      // an address that may not be changed: the filters work all the same
    }
  }

  function recall() {
    const query = new URLSearchParams(location.search);
    form.elements.text.value = query.get("text") || "";
    const known = new Set([...form.elements.tag.options].map((option) => option.value));
    tags = query.getAll("tag").filter((tag) => tag && known.has(tag));
    for (const key of ["venue", "year", "bits", "quantizes", "state"]) {
      form.elements[key].value = query.get(key) || "";
      if (form.elements[key].selectedIndex < 0) form.elements[key].value = "";
    }
    const wish = query.get("sort") || "";
    sort = { key: wish.replace(/^-/, ""), descending: wish.startsWith("-") };
    if (!(sort.key in column)) sort = { key: "", descending: false };
  }

  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => {
      const again = sort.key === head.dataset.key;
      sort = { key: head.dataset.key, descending: again ? !sort.descending : false };
      order();
      remember(wanted());
    });
    head.append(button);
  }
  form.addEventListener("input", (event) => {
    if (event.target.name === "tag") {
      const tag = event.target.value;
      if (tag && !tags.includes(tag)) tags.push(tag);
      event.target.value = "";
    }
    filter();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    tags = [];
    sort = { key: "", descending: false };
    setTimeout(() => {
      order();
      filter();
    });
  });
  window.addEventListener("popstate", () => {
    recall();
    order();
    filter();
  });

  form.hidden = false;
  recall();
  if (sort.key) order();
  filter();
})();
