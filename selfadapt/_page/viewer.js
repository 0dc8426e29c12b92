// Before and after, one over the other: a slider, buttons and keys. Without it both are side by side.
const section = document.querySelector("#before-after");
const pairs = [...document.querySelectorAll(".pair")];

function show(pair, at) {
  pair.style.setProperty("--at", `${at}%`);
  pair.dataset.at = at;
  pair.nextElementSibling.value = at;
  press("show", pairs.every((each) => each.dataset.at === String(at)) ? String(at) : null);
}

function showAll(at) {
  for (const pair of pairs) show(pair, at);
}

function outline(which) {
  section.dataset.outlines = which;
  press("outlines", which);
}

function press(group, value) {
  for (const button of section.querySelectorAll(`[data-${group}-button]`)) {
    button.setAttribute("aria-pressed", button.getAttribute(`data-${group}-button`) === value);
  }
}

function flip(pair) {
  show(pair, Number(pair.dataset.at) >= 50 ? 0 : 100);
}

function enlarge(figure, large = !figure.classList.contains("large")) {
  figure.classList.toggle("large", large);
  const button = figure.querySelector(".enlarge");
  button.setAttribute("aria-pressed", large);
  button.textContent = large ? "Reduce" : "Enlarge";
  figure.scrollIntoView({ block: "nearest" });
}

if (section) {
  document.documentElement.classList.add("js");
  for (const pair of pairs) {
    const { width, height } = pair.querySelector("svg").viewBox.baseVal;
    pair.parentElement.style.setProperty("--aspect", width / height);
    pair.tabIndex = 0;
    pair.addEventListener("click", () => enlarge(pair.parentElement));
    pair.nextElementSibling.addEventListener("input", (event) => show(pair, event.target.value));
    pair.parentElement.querySelector(".enlarge").addEventListener("click", () => enlarge(pair.parentElement));
  }
  section.addEventListener("click", ({ target }) => {
    const { showButton, outlinesButton } = target.closest("button")?.dataset ?? {};
    if (showButton) showAll(showButton);
    if (outlinesButton) outline(outlinesButton);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const pair = document.activeElement.closest(".pair") ?? section.querySelector(".pair:hover");
    const states = ["all", "changed", "none"];
    if (event.key === "b") showAll(100);
    else if (event.key === "a") showAll(0);
    else if (event.key === "o") outline(states[(states.indexOf(section.dataset.outlines) + 1) % 3]);
    else if (event.key === "Escape") document.querySelectorAll(".large").forEach((each) => enlarge(each, false));
    else if (event.key === "Enter" && document.activeElement === pair) enlarge(pair.parentElement);
    else if (event.key === " " && pair && !document.activeElement.closest("button, input, summary")) flip(pair);
    else return;
    event.preventDefault();
  });
  showAll(50);
  outline("all");
}
