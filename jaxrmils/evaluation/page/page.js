"use strict";
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const show = (event) => {
    const target = event.target.closest("[data-tip]");
    tip.hidden = !target;
    if (!target) return;
    tip.textContent = target.dataset.tip;
    const { clientX: x, clientY: y } = event;
    const right = Math.min(x + 14, innerWidth - tip.offsetWidth - 8);
    const below = y + 18 + tip.offsetHeight < innerHeight ? y + 18 : y - tip.offsetHeight - 10;
    tip.style.left = `${Math.max(4, right)}px`;
    tip.style.top = `${Math.max(4, below)}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, true);

  for (const tools of document.querySelectorAll("[data-table]")) {
    const table = document.getElementById(tools.dataset.table);
    const body = table.querySelector("tbody.rows");
    tools.hidden = false;
    tools.querySelector("[data-sort]").addEventListener("change", (event) => {
      const key = event.target.value;
      const value = (row) => Number(row.dataset[key]);
      body.append(...[...body.rows].sort((a, b) => value(a) - value(b)));
    });
    tools.querySelector("[data-filter]").addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase();
      for (const row of body.rows) row.hidden = !row.dataset.name.toLowerCase().includes(words);
    });
    for (const box of tools.querySelectorAll("[data-series]")) {
      box.addEventListener("change", () => {
        table.classList.toggle(`hide-${box.dataset.series}`, !box.checked);
      });
    }
  }
})();
