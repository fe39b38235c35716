// The samples of the page: filtered, a page of them at a time, drawn with DOM calls only (no text becomes markup).
"use strict";

(() => {
  const PAGE = 20;
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.querySelector(".filters");
  if (!form || !data.samples) return;

  const shorts = data.names ?? data.attentions;
  const list = document.getElementById("list");
  const swatches = [...document.getElementById("swatches").content.children];
  const samples = data.samples.map(prepare);
  let found = samples;
  let first = 0;

  function prepare(sample) {
    const answers = sample.answers.map(([attention, text, score, error, apart]) => ({
      attention, text: text ?? "", score, error, apart,
    }));
    const base = answers.find((answer) => answer.attention === data.baseline);
    for (const answer of answers) if (answer.apart === -1) answer.text = base.text;
    const words = [sample.id, sample.prompt, ...sample.references, ...answers.map((a) => a.text + " " + (a.error ?? ""))];
    return { ...sample, answers, base, words: words.join("\n").toLowerCase() };
  }

  const OUTCOMES = {
    wrong: (answer) => answer.score !== null && answer.score < 1,
    worse: (answer, base) => compares(answer, base) && answer.score < base.score,
    better: (answer, base) => compares(answer, base) && answer.score > base.score,
    error: (answer) => answer.error !== null,
  };

  function compares(answer, base) {
    return base !== undefined && answer.score !== null && base.score !== null;
  }

  function matches(sample, wanted) {
    const chosen = sample.answers.filter((a) => wanted.attention === "" || a.attention === Number(wanted.attention));
    return (
      chosen.length > 0 &&
      (wanted.task === "" || sample.task === wanted.task) &&
      (wanted.length === "" || sample.length === Number(wanted.length)) &&
      (wanted.text === "" || sample.words.includes(wanted.text)) &&
      (!wanted.differs || chosen.some((a) => a.apart !== null && a.apart >= 0)) &&
      (wanted.outcome === "" || chosen.some((a) => OUTCOMES[wanted.outcome](a, sample.base)))
    );
  }

  function wanted() {
    const value = (name) => form.elements.namedItem(name).value;
    return {
      text: value("text").trim().toLowerCase(),
      task: value("task"),
      length: value("length"),
      attention: value("attention"),
      outcome: value("outcome"),
      differs: form.elements.namedItem("differs").checked,
    };
  }

  function filter() {
    const now = wanted();
    found = samples.filter((sample) => matches(sample, now));
    first = 0;
    show();
  }

  function show() {
    const shown = found.slice(first, first + PAGE);
    list.replaceChildren(...shown.map((sample) => card(sample, wanted().attention)));
    for (const box of list.querySelectorAll("pre")) box.scrollTop = box.scrollHeight; // the question is at the end
    const count = (number) => number.toLocaleString("en");
    const range = `${count(first + 1)} – ${count(first + shown.length)} of ${count(found.length)}`;
    const hidden = samples.length - found.length;
    const text = found.length === 0 ? "No sample fits these filters." : range + (hidden ? ` (${count(hidden)} hidden)` : "");
    for (const place of document.querySelectorAll(".found")) place.textContent = text;
    for (const button of document.querySelectorAll("[data-step]")) {
      const target = first + PAGE * Number(button.dataset.step);
      button.disabled = target < 0 || target >= found.length;
    }
  }

  function element(name, style, ...children) {
    const made = document.createElement(name);
    if (style) made.className = style;
    made.append(...children);
    return made;
  }

  function card(sample, attention) {
    const place = [`${sample.length.toLocaleString("en")} tokens`];
    if (sample.depth !== null) place.push(`needle at ${Math.round(100 * sample.depth)} %`);
    const head = element("h3", "", element("span", "task", sample.task), element("span", "place", place.join(" · ")));
    head.title = sample.id;
    const prompt = element("pre", "prompt", `… ${sample.prompt}`);
    prompt.tabIndex = 0;
    prompt.setAttribute("aria-label", "End of the prompt");
    const references = element("ul", "references", ...sample.references.map((text) => element("li", "", text)));
    const asked = element("div", "asked");
    if (sample.prompt) asked.append(element("h4", "", "End of the prompt"), prompt);
    if (sample.references.length) asked.append(element("h4", "", "Reference"), references);
    const shown = sample.answers.filter((a) => attention === "" || a === sample.base || a.attention === Number(attention));
    const equal = shown.filter((a) => a === sample.base || a.apart === -1); // token by token the baseline's answer
    const groups = [equal, ...shown.filter((a) => !equal.includes(a)).map((a) => [a])].filter((group) => group.length);
    return element("article", "sample", head, asked, element("div", "answers", ...groups.map((g) => answer(g, sample))));
  }

  // One answer, under the names of all the attentions that gave exactly it.
  function answer(group, sample) {
    const one = group[0];
    const names = group.map(({ attention }) =>
      element("span", "name", swatches[attention].cloneNode(true), element("span", "", shorts[attention])));
    const head = element("h4", "", element("span", "names", ...names));
    if (one.score !== null) head.append(element("span", "score", `${Number((100 * one.score).toFixed(1))} %`));
    const body = one.error !== null ? element("p", "failed", one.error) : element("p", "text", ...pieces(one, sample));
    return element("div", "answer", head, body);
  }

  // The answer cut where a reference begins or ends and where it leaves the baseline's text.
  function pieces(one, sample) {
    const text = one.text;
    if (text === "") return [element("em", "", "empty answer")];
    const cuts = new Set([0, text.length]);
    const leaves = one.apart !== null && one.apart >= 0 ? common(text, sample.base.text) : text.length;
    cuts.add(leaves);
    const spans = references(text, sample.references);
    for (const [begin, end] of spans) cuts.add(begin).add(end);
    const ends = [...cuts].sort((a, b) => a - b);
    return ends.slice(1).map((end, index) => {
      const begin = ends[index];
      const inside = spans.some(([from, to]) => from <= begin && end <= to);
      const piece = element(inside ? "mark" : "span", begin >= leaves ? "apart" : "", text.slice(begin, end));
      return piece;
    });
  }

  function common(a, b) {
    let length = 0;
    while (length < a.length && length < b.length && a[length] === b[length]) length++;
    return length;
  }

  function references(text, wanted) {
    const spans = [];
    const lower = text.toLowerCase();
    for (const reference of wanted) {
      const needle = reference.toLowerCase();
      for (let at = lower.indexOf(needle); needle && at >= 0; at = lower.indexOf(needle, at + needle.length)) {
        spans.push([at, at + needle.length]);
      }
    }
    return spans;
  }

  function fill(name, entries) {
    for (const [value, text] of entries) form.elements.namedItem(name).append(new Option(text, value));
  }

  const distinct = (name) => [...new Set(samples.map((sample) => sample[name]))];
  fill("task", distinct("task").sort().map((task) => [task, task]));
  fill("length", distinct("length").sort((a, b) => a - b).map((n) => [n, n.toLocaleString("en")]));
  fill("attention", shorts.map((name, index) => [index, name]));
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter)); // the values are back only after this event
  for (const button of document.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => {
      first += PAGE * Number(button.dataset.step);
      show();
      form.scrollIntoView({ block: "start" });
    });
  }
  filter();
})();

// On paper the tables are open; on the screen they are as they were before.
(() => {
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.folded:not([open])")];
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of opened) part.open = false;
    opened = [];
  });
})();
