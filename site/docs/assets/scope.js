// What Material for MkDocs (MIT, Martin Donath) has as an inline script in partials/javascripts/base.html, as a file,
// so that the content-security policy can forbid inline scripts.
__md_scope = new URL(document.currentScript.dataset.base, location);
__md_hash = (text) => [...text].reduce((hash, char) => (hash << 5) - hash + char.charCodeAt(0), 0);
__md_get = (key, storage = localStorage, scope = __md_scope) => JSON.parse(storage.getItem(scope.pathname + "." + key));
__md_set = (key, value, storage = localStorage, scope = __md_scope) => {
  try {
    storage.setItem(scope.pathname + "." + key, JSON.stringify(value));
  } catch (error) {
    // a full or forbidden storage: the choice lasts for this page only
  }
};
