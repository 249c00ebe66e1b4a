// Runs before the page is painted, so that a chosen theme does not flash in late.
const chosen = localStorage.getItem("dsv4.theme");
if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
