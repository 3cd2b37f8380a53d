// Applies the kept theme before the page is painted. Loaded as a classic script, which blocks painting.
"use strict";
(() => {
  let theme = null;
  try { theme = localStorage.getItem("nybble.theme"); } catch { /* A browser may refuse storage. */ }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
