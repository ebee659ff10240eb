// What the page begins with while the demo model is the only one: a workflow that draws.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const VISITED = "Comfy.TutorialCompleted";

/**
 * Put our graph in the place of the page's default one, whose models are not there, and skip its templates dialog.
 *
 * The page still decides by itself when to show its default graph: never instead of a workflow that was open before.
 */
export async function prepareFirstScreen() {
  const standard = window.comfyAPI?.defaultGraph?.defaultGraph;
  if (!standard) return; // a page of another make: it begins in its own way
  const answer = await api.fetchApi("/taco_dit/first_screen");
  const { graph } = answer.ok ? await answer.json() : {};
  if (!graph) return;
  for (const key of Object.keys(standard)) delete standard[key];
  Object.assign(standard, graph);
  const settings = app.extensionManager.setting;
  if (!settings.get(VISITED)) await settings.set(VISITED, true);
}
