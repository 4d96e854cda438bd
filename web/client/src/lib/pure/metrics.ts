/** What the numbers of a dictionary mean, in one line each. Unknown ones are shown under their own name. */

import { count, number, percent } from "./format";

export interface Metric {
  name: string;
  value: string;
  meaning: string;
}

interface Known {
  keys: string[];
  name: string;
  meaning: string;
  show: (value: number) => string;
}

const plain = (value: number) => number(value);

const KNOWN: Known[] = [
  { keys: ["l0"], name: "L0", meaning: "features that fire on a token, on average", show: plain },
  { keys: ["fvu"], name: "FVU", meaning: "share of the activations’ variance that is not rebuilt; 0 is perfect", show: plain },
  {
    keys: ["fvu_without_outliers", "fvu_without_outlier_dimensions", "fvu_no_outliers", "fvu_trimmed"],
    name: "FVU, outliers out",
    meaning: "the same without the few dimensions that carry most of the variance",
    show: plain,
  },
  {
    keys: ["ce_recovered", "ce_loss_recovered", "loss_recovered"],
    name: "CE recovered",
    meaning: "share of the loss kept with the rebuilt activations put in, against zeros",
    show: percent,
  },
  { keys: ["kl_recovered"], name: "KL recovered", meaning: "the same for the distance between predictions", show: percent },
  { keys: ["ce_clean"], name: "CE, model", meaning: "loss of the untouched model, nats per token", show: plain },
  { keys: ["ce_spliced", "ce_sae", "ce_reconstructed"], name: "CE, rebuilt", meaning: "loss with the rebuilt activations put in", show: plain },
  { keys: ["ce_zero", "ce_ablated"], name: "CE, zeros", meaning: "loss with zeros put in", show: plain },
  { keys: ["kl", "kl_spliced"], name: "KL, rebuilt", meaning: "how far predictions move with the rebuilt activations", show: plain },
  { keys: ["kl_zero", "kl_ablated"], name: "KL, zeros", meaning: "how far predictions move with zeros", show: plain },
  { keys: ["cosine", "cosine_similarity"], name: "Cosine", meaning: "between activations and what is rebuilt", show: plain },
  { keys: ["dead", "dead_fraction", "frac_dead"], name: "Dead", meaning: "share of features that never fired in the evaluation", show: percent },
  { keys: ["n_dead"], name: "Dead features", meaning: "that never fired in the evaluation", show: count },
  { keys: ["n_tokens", "tokens"], name: "Tokens", meaning: "that the evaluation read", show: count },
];

/** The metrics to show, the well-known ones first and explained. */
export function explain(metrics: Record<string, number>): Metric[] {
  const left = new Map(Object.entries(metrics));
  const out: Metric[] = [];
  for (const { keys, name, meaning, show } of KNOWN) {
    const key = keys.find((k) => left.has(k) || left.has(k.toUpperCase()));
    if (key === undefined) continue;
    const found = left.has(key) ? key : key.toUpperCase();
    out.push({ name, meaning, value: show(left.get(found)!) });
    left.delete(found);
  }
  for (const [key, value] of left) out.push({ name: key.replaceAll("_", " "), meaning: "", value: number(value) });
  return out;
}
