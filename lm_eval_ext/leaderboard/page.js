"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;  // never markup: texts come from models and data sets
    if (name) element.className = name;
    return element;
  };
  const body = $("board").tBodies[0];
  const rows = [...body.rows];
  const heads = [...$("board").tHead.rows[0].cells];
  const names = JSON.parse($("names").textContent);

  // ---- sort ----
  const sortBy = (place, descending) => {
    const numeric = heads[place].dataset.type === "number";
    const keyed = rows.map((row) => [row.cells[place].dataset.value, row]);
    keyed.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");  // what is missing comes last, either way
      const order = numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
      return descending ? -order : order;
    });
    body.append(...keyed.map(([, row]) => row));
    heads.forEach((head, other) => head.setAttribute("aria-sort", other !== place ? "none" : descending ? "descending" : "ascending"));
    $("sorter").value = `${place} ${descending ? 1 : 0}`;
  };
  heads.forEach((head, place) => {
    const button = head.querySelector("button");
    const first = head.dataset.type === "number" && place > 0;
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      sortBy(place, now === "none" ? first : now === "ascending");
    });
    for (const down of [0, 1]) {
      const option = make("option", `${button.textContent} ${down ? "↓" : "↑"}`);
      option.value = `${place} ${down}`;
      $("sorter").append(option);
    }
  });
  $("sorter").addEventListener("change", (event) => {
    const [place, down] = event.target.value.split(" ").map(Number);
    sortBy(place, down === 1);
  });

  // ---- filter ----
  const plain = (text) => text.toLowerCase().replace(/\s+/g, " ").trim();
  const texts = new Map(rows.map((row) => [row, plain(row.textContent)]));
  const filter = () => {
    const wanted = plain($("search").value);
    let shown = 0;
    for (const row of rows) {
      const fits = (!$("method").value || row.dataset.method === $("method").value)
        && (!$("decoding").value || row.dataset.decoding === $("decoding").value)
        && (!$("comparable").checked || row.dataset.comparable === "1")
        && texts.get(row).includes(wanted);
      row.hidden = !fits;
      shown += fits;
    }
    $("count").textContent = `${shown} of ${rows.length}`;
  };
  $("filters").addEventListener("input", filter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());

  // ---- provenance: a link into it opens it ----
  const openTarget = () => {
    const target = location.hash.length > 1 && $(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", openTarget);
  openTarget();

  // ---- samples ----
  const unpacked = new Map();
  const unpack = async (task) => {
    if (!unpacked.has(task)) {
      const packed = [...document.querySelectorAll("script.samples")].find((script) => script.dataset.task === task);
      const bytes = Uint8Array.from(atob(packed.textContent.trim()), (letter) => letter.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      unpacked.set(task, JSON.parse(await new Response(stream).text()));
    }
    return unpacked.get(task);
  };
  const KINDS = [["gained", "better than base"], ["lost", "worse than base"], ["changed", "other answer, same score"], ["same", "same answer"], ["wrong", "score 0"], ["right", "score above 0"]];
  const kindOf = (mine, base, lower) => {
    if (!base) return mine[2] > 0 ? "right" : "wrong";
    if (mine[2] !== base[2]) return (mine[2] > base[2]) !== lower ? "gained" : "lost";
    return mine[1] !== base[1] ? "changed" : "same";
  };
  const costText = (cost) => cost ? `${cost.solved_tokens} tokens, ${cost.nfe_requested} evaluations requested, ${cost.nfe_computed} computed, ${cost.passes} passes, ${cost.seconds.toFixed(3)} s` : "";
  let current = [];
  const card = ({ kind, mine, base, text, labels }) => {
    const article = make("article", undefined, `sample ${kind}`);
    const head = make("h3");
    head.append(make("b", KINDS.find(([key]) => key === kind)[1]), ` · document ${mine[0] + 1}`);
    if (costText(mine[3])) head.append(` · ${costText(mine[3])}`);
    article.append(head, make("pre", text[0]));
    const answers = make("div", undefined, "answers");
    const put = (title, content) => {
      const box = make("div");
      box.append(make("h4", title), make("pre", content === "" ? "(empty)" : content));
      answers.append(box);
    };
    put("target", text[1]);
    if (base) put(`${labels[0]}: score ${base[2]}`, base[1]);
    put(`${labels[1]}: score ${mine[2]}`, mine[1]);
    article.append(answers);
    return article;
  };
  const draw = () => {
    const word = $("drill-search").value.toLowerCase();
    const fits = current.filter((item) => (!$("drill-show").value || item.kind === $("drill-show").value)
      && (!word || [...item.text, item.mine[1], item.base ? item.base[1] : ""].some((text) => text.toLowerCase().includes(word))));
    $("drill-count").textContent = `${fits.length} of ${current.length}`;
    $("drill-list").replaceChildren();
    const page = (start) => {
      $("drill-list").append(...fits.slice(start, start + 40).map(card));
      if (fits.length > start + 40) {
        const more = make("button", `40 more of ${fits.length - start - 40}`, "more");
        more.addEventListener("click", () => { more.remove(); page(start + 40); });
        $("drill-list").append(more);
      }
    };
    page(0);
    $("drill-list").scrollTop = 0;
  };
  const openSamples = async (task, number) => {
    const content = await unpack(task);
    const { base, lower, answers } = content.rows[number];
    const theirs = new Map(base === null || !content.rows[base] ? [] : content.rows[base].answers.map((answer) => [answer[0], answer]));
    const order = KINDS.map(([kind]) => kind);
    const labels = [base === null ? "" : `base #${base}`, `#${number}`];
    current = answers.map((mine) => {
      const other = theirs.get(mine[0]);
      return { mine, base: other, kind: kindOf(mine, other, lower), text: content.documents[mine[0]], labels };
    });
    current.sort((a, b) => order.indexOf(a.kind) - order.indexOf(b.kind) || a.mine[0] - b.mine[0]);
    $("drill-title").textContent = `${names[number]} on ${task}`;
    $("drill-about").textContent = base === null ? "No base to compare with." : `Against ${names[base]}; changed answers first.`;
    const all = make("option", `all (${current.length})`);
    all.value = "";
    $("drill-show").replaceChildren(all);
    for (const [kind, words] of KINDS) {
      const count = current.filter((item) => item.kind === kind).length;
      if (!count) continue;
      const option = make("option", `${words} (${count})`);
      option.value = kind;
      $("drill-show").append(option);
    }
    $("drill-search").value = "";
    draw();
    $("drill").showModal();
  };
  body.addEventListener("click", (event) => {
    const button = event.target.closest("button.open");
    if (button) openSamples(button.dataset.task, Number(button.dataset.row));
  });
  $("drill-search").addEventListener("input", draw);
  $("drill-show").addEventListener("input", draw);
  $("drill-close").addEventListener("click", () => $("drill").close());
  $("drill").addEventListener("click", (event) => { if (event.target === $("drill")) $("drill").close(); });
})();
