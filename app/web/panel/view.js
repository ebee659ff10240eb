// Draws the state of /taco_dit/status: ranks and plan stay in view, the rest scrolls.

/** An element with a class and children (elements or texts). */
function el(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  // append() makes text nodes of strings: nothing here is ever read as HTML
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function size(bytes) {
  const gib = bytes / 2 ** 30;
  return gib >= 0.95 ? `${gib.toFixed(1)} GiB` : `${Math.round(bytes / 2 ** 20)} MiB`;
}

function milliseconds(value) {
  return `${value >= 100 ? Math.round(value) : value.toFixed(1)} ms`;
}

/** A bar of parts, each a share from 0 to 1 of the whole width. */
function bar(...parts) {
  return el("div", "taco-bar", ...parts.map(([kind, share]) => {
    const part = el("div", `taco-part taco-${kind}`);
    part.style.width = `${Math.min(100, Math.max(0, share * 100)).toFixed(1)}%`;
    return part;
  }));
}

const PHASES = ["text", "load", "compile", "capture", "denoise", "exchange", "vae", "save", "other"];
const SHOWN_EVENTS = 4; // of each list, until the reader asks for all

/** Seconds as short as they can be read. */
function seconds(value) {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** [phase, seconds] of a prompt, in the order of PHASES, without what took no time. */
function phasesOf(prompt) {
  const all = { ...prompt.phases, other: prompt.other };
  return PHASES.map((name) => [name, all[name] ?? 0]).filter(([, time]) => time >= 0.005);
}

export class Panel {
  constructor(container, texts, clearEvents) {
    this.texts = texts;
    this.root = el("div", "taco-panel", el("div", "taco-quiet", texts.connecting));
    this.clearEvents = clearEvents;
    this.allEvents = false; // whether the list of events is shown whole
    this.chosen = null; // id of the prompt that the reader chose in the chart; the last one without
    container.replaceChildren(this.root);
  }

  /** Draw a status; where the reader had scrolled to stays. */
  show(status) {
    this.status = status;
    const top = this.root.scrollTop;
    const parts = [this.promptSection(status), this.historySection(status), this.stepSection(status),
      this.planSection(status)].filter(Boolean);
    const failed = status.events.some((event) => event.level === "error");
    if (failed) parts.unshift(this.eventSection(status)); // what needs a hand comes first
    else parts.push(this.eventSection(status));
    this.root.replaceChildren(this.head(status), ...parts);
    this.root.scrollTop = top;
  }

  section(title, aside, ...children) {
    return el("section", "taco-section", el("header", "taco-row", el("h3", "", title), aside), ...children);
  }

  /** What stays in view: who is there, what they do, and how work is shared. */
  head(status) {
    const busy = status.current_run.sampling;
    const state = el("span", busy ? "taco-state taco-busy" : "taco-state", busy ? this.texts.sampling : this.texts.idle);
    return el("header", "taco-head",
      el("div", "taco-row", el("h2", "", "TACO-DiT"), state),
      ...status.ranks.map((rank) => this.rankCard(rank)),
      this.sharing(status));
  }

  /** One line: how many work, by which plan, and why. */
  sharing(status) {
    const t = this.texts;
    const gpu = String(status.ranks[0]?.device).startsWith("cuda");
    if (status.world_size === 1) return el("p", "taco-quiet", gpu ? t.oneGpu : t.oneRank);
    const run = status.active_plan === null ? status.last_run : null;
    const working = run ? run.working : status.working;
    if (working === null || working === undefined) {
      return el("p", "taco-quiet", status.enabled ? t.atWork(status.world_size, null, gpu) : t.off);
    }
    const reasons = this.reasons(run ?? status);
    const line = el("p", working < status.world_size ? "taco-waste" : "", t.atWork(status.world_size, working, gpu));
    if (reasons) line.append(t.because(reasons));
    return el("div", "", line, el("strong", "taco-plan", t.planOf(run ? run.plan : status.active_plan)));
  }

  /** Reasons in the page's language. */
  reasons(from) {
    const codes = from.reasons ?? [];
    return this.texts.reason ? codes.map((why) => this.reason(why, from.reason)).join("；") : from.reason;
  }

  reason(why, text) {
    const template = this.texts.reason?.[why.code];
    return template ? template.replace(/{(\w+)}/g, (_, name) => why[name]) : text;
  }

  rankCard(rank) {
    const t = this.texts;
    const gpu = String(rank.device).startsWith("cuda");
    const late = rank.age > 5 ? el("span", "taco-late", t.late(Math.round(rank.age))) : null;
    const name = rank.name && rank.name.toLowerCase() !== String(rank.device) ? `${rank.device} · ${rank.name}` : rank.device;
    const known = rank.memory_used !== undefined;
    const memory = known ? `${size(rank.memory_used)} / ${size(rank.memory_total)}` : t.none;
    const use = rank.utilisation ?? null;
    const heat = rank.temperature ?? null;
    const title = el("div", "taco-row", el("strong", "", t.rank(rank.rank)), el("span", "taco-quiet taco-cut", name),
      el("span", "taco-number taco-heat", heat === null ? t.none : `${heat} °C`));
    title.lastChild.title = t.temperature;
    const card = el("div", "taco-card", title, late, el("div", "taco-meters",
      this.meter(gpu ? t.memory : t.processMemory, memory, known ? rank.memory_used / rank.memory_total : 0, t.memoryHint),
      this.meter(gpu ? t.use : t.cpuUse, use === null ? t.none : `${Math.round(use * 100)} %`, use ?? 0, t.useHint)));
    card.dataset.rank = rank.rank;
    return card;
  }

  meter(label, value, share, hint) {
    const made = el("div", "taco-meter",
      el("div", "taco-row", el("span", "taco-quiet", label), el("span", "taco-number", value)),
      bar(["used", share]));
    made.title = hint;
    return made;
  }

  lossyNote(status) {
    return status.lossy?.length ? el("p", "", `${this.texts.lossy}: ${status.lossy.join(", ")}`) : null;
  }

  planSection(status) {
    const t = this.texts, lossy = this.lossyNote(status);
    const planned = status.world_size > 1 && status.enabled && status.active_plan !== null;
    const details = planned ? [status.workload ? el("p", "taco-quiet", t.work(status.workload)) : null, this.considered(status)] : [];
    const shown = [this.times(status), lossy, ...details].filter(Boolean);
    return shown.length ? this.section(t.plan, null, ...shown) : null;
  }

  /** Predicted, measured, and by one rank, as far as each is known. */
  times(status) {
    const run = status.current_run, last = status.last_run;
    if (status.predicted_ms === null || status.predicted_ms === undefined) return null;
    const measured = run.calls ? milliseconds(run.mean_call_ms) : null;
    const line = el("p", "taco-quiet", this.texts.times(milliseconds(status.predicted_ms), measured));
    if (last?.speed_up && !run.sampling) {
      line.append(this.texts.speedUp(last.speed_up.toFixed(2), milliseconds(last.one_rank_ms)));
    }
    return line;
  }

  /** The plans that were weighed, with predicted times where this machine was measured. */
  considered(status) {
    const possible = status.considered.filter((choice) => choice.impossible === undefined);
    const t = this.texts;
    const measured = status.predicted_ms !== null;
    const slowest = Math.max(...possible.map((choice) => choice.relative_time));
    const rows = possible.slice(0, 5).map((choice, place) => el("div", place ? "taco-choice" : "taco-choice taco-chosen",
      el("span", "taco-cut", choice.plan), ...(measured ? [bar(["used", choice.relative_time / slowest]),
        el("span", "taco-number", milliseconds(choice.predicted_ms))] : [])));
    const impossible = status.considered.filter((choice) => choice.impossible !== undefined)
      .map((choice) => el("div", "taco-quiet", t.notPossible(choice.plan, this.reason(choice.why_not, choice.impossible))));
    const title = measured ? t.predictedTimes(status.world_size) : t.possible(status.world_size);
    return el("div", "taco-choices", el("div", "taco-quiet", title), ...rows, ...impossible);
  }

  stepSection(status) {
    const t = this.texts;
    const run = status.current_run;
    if (!run.calls) return this.section(t.steps, null, el("p", "taco-quiet", t.noPlan));
    const means = run.ranks.map((times) => ({ compute: times.compute / (times.calls || 1), exchange: times.exchange / (times.calls || 1) }));
    const longest = Math.max(...means.map((mean) => mean.compute + mean.exchange)) || 1;
    const rows = means.map((mean, rank) => el("div", "taco-meter",
      el("div", "taco-row", el("span", "", t.rank(rank)),
        el("span", "taco-number", `${milliseconds(mean.compute)} + ${milliseconds(mean.exchange)}`)),
      bar(["compute", mean.compute / longest], ["exchange", mean.exchange / longest])));
    const legend = el("div", "taco-legend", el("i", "taco-compute"), t.compute, el("i", "taco-exchange"), t.exchange);
    const graphs = status.world_size > 1 && status.cuda_graph ? el("p", "taco-quiet", t.graphs) : null;
    const count = el("span", "taco-quiet taco-steps", t.stepCount(run.calls));
    return this.section(t.steps, count, legend, ...rows, graphs);
  }

  /** One prompt as a bar of its phases: the last one, or the one chosen in the chart. */
  promptSection(status) {
    const t = this.texts, prompts = status.last_prompts ?? [];
    const prompt = prompts.find((one) => one.prompt_id === this.chosen) ?? prompts.at(-1);
    if (!prompt) return null;
    const parts = phasesOf(prompt);
    const whole = parts.reduce((sum, [, time]) => sum + time, 0) || 1;
    const strip = bar(...parts.map(([name, time]) => [`phase-${name}`, time / whole]));
    strip.classList.add("taco-strip");
    parts.forEach(([name, time], place) => { strip.children[place].title = `${t.phase[name]} ${t.seconds(seconds(time))}`; });
    const legend = el("div", "taco-legend taco-phases", ...parts.map(([name, time]) => el("span", "",
      el("i", `taco-phase-${name}`), t.phase[name], el("b", "taco-number", t.seconds(seconds(time))))));
    const moved = prompt.counts.weight_bytes ? el("p", "taco-quiet", t.moved(size(prompt.counts.weight_bytes))) : null;
    const total = el("span", "taco-number taco-prompt-total", t.seconds(seconds(prompt.total)));
    const title = prompt === prompts.at(-1) ? t.prompt : t.promptAt(new Date(prompt.ended * 1000).toLocaleTimeString());
    return this.section(title, total, strip, legend, moved);
  }

  /** The last prompts as columns, each as high as it took long. */
  historySection(status) {
    const t = this.texts, prompts = status.last_prompts ?? [];
    if (prompts.length < 2) return null;
    const longest = Math.max(...prompts.map((prompt) => prompt.total)) || 1;
    const columns = prompts.map((prompt) => {
      const column = el("button", `taco-column taco-${prompt.result}`);
      if (prompt.prompt_id === this.chosen) column.classList.add("taco-chosen-column");
      const whole = prompt.total || 1;
      const stack = el("span", "taco-stack", ...phasesOf(prompt).map(([name, time]) => {
        const part = el("span", `taco-phase-${name}`);
        part.style.height = `${Math.min(100, (time / whole) * 100).toFixed(1)}%`;
        return part;
      }));
      stack.style.height = `${Math.max(3, (prompt.total / longest) * 100).toFixed(1)}%`;
      column.append(stack);
      column.title = [new Date(prompt.ended * 1000).toLocaleTimeString(), t.result[prompt.result],
        t.seconds(seconds(prompt.total))].join(" · ");
      column.ariaLabel = column.title;
      column.addEventListener("click", () => {
        this.chosen = this.chosen === prompt.prompt_id ? null : prompt.prompt_id;
        this.show(this.status);
      });
      return column;
    });
    const scale = el("span", "taco-quiet taco-number", t.upTo(seconds(longest)));
    return this.section(t.history(prompts.length), scale, el("div", "taco-chart", ...columns));
  }

  eventSection(status) {
    const t = this.texts;
    if (!status.events.length) return this.section(t.events, null, el("p", "taco-quiet", t.noEvents));
    const clear = el("button", "taco-clear", t.clear);
    clear.addEventListener("click", () => this.clearEvents());
    const newest = status.events.toReversed().toSorted((a, b) => (a.level !== "error") - (b.level !== "error"));
    const shown = this.allEvents ? newest : newest.slice(0, SHOWN_EVENTS);
    const cards = shown.map((event) => this.eventCard(event, status));
    if (newest.length > SHOWN_EVENTS) {
      const more = el("button", "taco-clear taco-more", this.allEvents ? t.fewer : t.more(newest.length - SHOWN_EVENTS));
      more.addEventListener("click", () => {
        this.allEvents = !this.allEvents;
        this.show(this.status);
      });
      cards.push(more);
    }
    return this.section(t.events, clear, ...cards);
  }

  eventCard(event, status) {
    const t = this.texts;
    const when = new Date(event.time * 1000).toLocaleTimeString();
    const where = status.world_size > 1 ? `${t.onRank(event.ranks)} · ` : "";
    const times = event.count > 1 ? ` · ${event.count}×` : "";
    return el("div", `taco-event taco-${event.level}`,
      el("div", "taco-quiet", `${where}${when}${times}`),
      el("div", "taco-message", event.text),
      el("div", "taco-cure", el("span", "taco-quiet", `${t.cure}: `), t.remedy?.[event.cure_code] ?? event.cure));
  }
}
