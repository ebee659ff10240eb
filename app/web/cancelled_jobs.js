// Jobs that a person cancelled read "Cancelled" in the page's list; the page itself calls them failed.

import { api } from "../../scripts/api.js";

const WORDS = {
  ar: "ملغى", en: "Cancelled", es: "Cancelado", fa: "لغو شد", fr: "Annulé", ja: "キャンセル済み", ko: "취소됨",
  "pt-BR": "Cancelado", ru: "Отменено", tr: "İptal edildi", zh: "已取消", "zh-TW": "已取消",
};
const ROWS = "[data-job-id]";
const PAUSE_MS = 100; // between a change of the page and a look at it; changes come in bursts

/** Relabel the rows of cancelled jobs, now and whenever the page draws them. `locale`: the page's language. */
export function nameCancelledJobs(locale) {
  const word = WORDS[locale] ?? WORDS.en;
  const states = new Map(); // job id -> whether it was cancelled, for jobs that the page calls failed

  /** Learn the states of the jobs shown that are not known yet. */
  async function learn(ids) {
    const answer = await api.fetchApi("/jobs?status=failed,cancelled&limit=200");
    if (!answer.ok) return;
    const over = new Map((await answer.json()).jobs.map((job) => [job.id, job.status === "cancelled"]));
    for (const id of ids) states.set(id, over.get(id) ?? false);
  }

  function label(row) {
    const [title, detail] = row.querySelectorAll("span[title]");
    if (title && title.textContent !== word) title.title = title.textContent = word;
    if (detail?.textContent) detail.title = detail.textContent = "";
  }

  async function look() {
    const rows = [...document.querySelectorAll(ROWS)];
    const failed = rows.filter((row) => row.querySelector("[class*='alert-circle']"));
    const unknown = failed.map((row) => row.dataset.jobId).filter((id) => !states.has(id));
    if (unknown.length) await learn(unknown);
    failed.filter((row) => states.get(row.dataset.jobId)).forEach(label);
  }

  let waiting = null;
  const soon = () => {
    waiting ??= setTimeout(() => {
      waiting = null;
      look().catch((error) => console.warn("TACO-DiT: the states of jobs are not known:", error));
    }, PAUSE_MS);
  };
  new MutationObserver(soon).observe(document.body, { childList: true, subtree: true, characterData: true });
}
