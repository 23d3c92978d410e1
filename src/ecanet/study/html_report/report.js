"use strict";
(() => {
  const tip = document.getElementById("tip");
  const say = (text, event) => {
    tip.textContent = text;
    tip.hidden = !text;
    const room = tip.getBoundingClientRect();
    const right = event.clientX + 14 + room.width < innerWidth;
    const below = event.clientY + 18 + room.height < innerHeight;
    tip.style.left = `${Math.max(4, right ? event.clientX + 14 : event.clientX - room.width - 10)}px`;
    tip.style.top = `${Math.max(4, below ? event.clientY + 18 : event.clientY - room.height - 10)}px`;
  };
  const cell = (heat, event) => {
    const box = heat.getBoundingClientRect();
    const rows = heat.dataset.classes.split("\n"), order = heat.dataset.order.split(" ");
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows.length);
    const column = Math.floor(((event.clientX - box.left) / box.width) * order.length);
    if (!(row in rows) || !(column in order)) return "";
    heat.cells ??= atob(heat.dataset.cells);
    const level = heat.cells.charCodeAt(row * order.length + column);
    const low = Number(heat.dataset.low), high = Number(heat.dataset.high);
    const value = level === 255 ? "no images" : (low + (level / 254) * (high - low)).toFixed(2);
    return `${rows[row]}, channel ${order[column]}: ${value}`;
  };
  const follow = (event) => {
    const mark = event.target.closest("[data-tip], [data-cells]");
    say(mark ? (mark.dataset.cells ? cell(mark, event) : mark.dataset.tip) : "", event);
  };
  document.addEventListener("pointermove", follow);
  document.addEventListener("pointerdown", follow);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
