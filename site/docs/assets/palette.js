// Sets the colour scheme before anything is drawn: the reader's choice, else the system's. Takes the place of the
// inline script of Material for MkDocs (MIT, Martin Donath), partials/javascripts/palette.html.
(() => {
  const saved = __md_get("__palette");
  const apply = (color) => {
    for (const [key, value] of Object.entries(color)) document.body.setAttribute("data-md-color-" + key, value);
  };
  if (saved && saved.color) {
    apply(saved.color);
  } else if (matchMedia("(prefers-color-scheme: dark)").matches) {
    apply({ scheme: "slate" });
  }
})();
