// What scrolls within the page is reached by the keyboard too.
addEventListener("load", () => {
  for (const box of document.querySelectorAll("pre, p, .table-wrapper, .wide"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
});
