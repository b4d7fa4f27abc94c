// Filters and sorts the samples. Without this script they stand on their shelves: best, middle, worst, others.
(() => {
  const section = document.getElementById("samples");
  const form = document.getElementById("filter");
  if (!section || !form) return;
  const PAGE = 10;
  const all = [...section.querySelectorAll("article.sample")].map((node) => ({
    node,
    text: node.textContent.toLowerCase(),
    value: (name) => parseFloat(node.dataset[name]),
  }));
  const list = document.getElementById("found");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  let shown = PAGE;

  const wanted = (sample, values) => {
    if (values.outcome !== "all" && sample.node.dataset.outcome !== values.outcome) return false;
    if (values.group && sample.node.dataset.group !== values.group) return false;
    if (values.words && !sample.text.includes(values.words)) return false;
    const score = sample.value("ppo");
    if (values.from !== "" && !(score >= parseFloat(values.from))) return false;
    return !(values.to !== "" && !(score <= parseFloat(values.to)));
  };

  const update = () => {
    const data = new FormData(form);
    const values = Object.fromEntries(["outcome", "group", "from", "to", "sort"].map((name) => [name, data.get(name) ?? ""]));
    values.words = (data.get("words") ?? "").trim().toLowerCase();
    const [key, direction] = values.sort.split(" ");
    const last = direction === "up" ? Infinity : -Infinity; // samples without that figure come last
    const by = (sample) => (Number.isNaN(sample.value(key)) ? last : sample.value(key));
    const found = all.filter((sample) => wanted(sample, values));
    found.sort((a, b) => (by(a) === by(b) ? 0 : (direction === "up" ? by(a) - by(b) : by(b) - by(a))));
    list.replaceChildren(...found.slice(0, shown).map((sample) => sample.node));
    count.textContent = `${found.length} of ${all.length}`;
    more.hidden = found.length <= shown;
    more.textContent = `Show ${Math.min(PAGE, found.length - shown)} more`;
    section.classList.toggle("unmarked", !data.get("marks"));
  };

  form.addEventListener("input", () => { shown = PAGE; update(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { shown = PAGE; update(); }));
  more.addEventListener("click", () => {
    const first = shown;
    shown += PAGE;
    update();
    list.children[first]?.focus({ preventScroll: true }); // a keyboard goes on where the new ones begin
  });
  section.querySelectorAll(".shelf").forEach((shelf) => { shelf.hidden = true; });
  form.hidden = false;
  update();
})();
