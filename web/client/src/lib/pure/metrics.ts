/** What the numbers of a dictionary mean, in one line each. Unknown ones are shown under their own name. */

import { count, number, percent } from "./format";

export interface Metric {
  name: string;
  value: string;
  meaning: string;
  headline: boolean; // shown large; the others stand in a table
}

interface Known {
  key: string;
  name: string;
  meaning: string;
  show: (value: number) => string;
  headline?: boolean;
}

const plain = (value: number) => number(value);

const KNOWN: Known[] = [
  { key: "l0", name: "L0", meaning: "features that fire on a token, on average", show: plain, headline: true },
  {
    key: "fvu",
    name: "FVU",
    meaning: "share of the activations’ variance that is not rebuilt; 0 is perfect",
    show: plain,
    headline: true,
  },
  {
    key: "fvu_without_outliers",
    name: "FVU, outliers out",
    meaning: "the same without the few dimensions that carry most of the variance",
    show: plain,
    headline: true,
  },
  {
    key: "fvu_without_sinks",
    name: "FVU, sinks out",
    meaning: "the same without the few tokens (attention sinks) whose activations are many times as long as the others’",
    show: plain,
  },
  {
    key: "ce_recovered",
    name: "CE recovered",
    meaning: "of the loss that zeros would cost, the share that the rebuilt activations save",
    show: percent,
    headline: true,
  },
  {
    key: "kl_recovered",
    name: "KL recovered",
    meaning: "the same for how far the predictions move",
    show: percent,
  },
  {
    key: "dead_fraction",
    name: "Dead",
    meaning: "share of features that never fired in the evaluation",
    show: percent,
    headline: true,
  },
  { key: "n_dead", name: "Dead features", meaning: "that never fired in the evaluation", show: count },
  { key: "cosine", name: "Cosine", meaning: "between activations and what is rebuilt", show: plain },
  { key: "norm_ratio", name: "Norm ratio", meaning: "length of what is rebuilt over the activations’", show: plain },
  { key: "fvu_all_positions", name: "FVU, all positions", meaning: "special tokens counted too; their outsized norm flatters it", show: plain },
  { key: "outlier_variance", name: "Outlier variance", meaning: "share of the variance that the outlier dimensions carry", show: percent },
  { key: "ce_clean", name: "CE, model", meaning: "loss of the untouched model, nats per token", show: plain },
  { key: "ce_spliced", name: "CE, rebuilt", meaning: "loss with the rebuilt activations put in", show: plain },
  { key: "ce_zero", name: "CE, zeros", meaning: "loss with zeros put in", show: plain },
  {
    key: "top1_spliced",
    name: "Top-1 agreement",
    meaning: "share of tokens after which the most likely next token stays the model’s, with the rebuilt activations put in",
    show: percent,
  },
  {
    key: "top1_replaced",
    name: "Top-1, replacement model",
    meaning: "the same with all layers replaced in one run, each reading what those before it made",
    show: percent,
  },
  { key: "ce_replaced", name: "CE, replacement model", meaning: "loss of that run, nats per token", show: plain },
  { key: "delta_ce_replaced", name: "CE lost, replacement model", meaning: "that loss less the untouched model’s", show: plain },
  { key: "kl_replaced", name: "KL, replacement model", meaning: "how far predictions move in that run, nats", show: plain },
  { key: "kl_spliced", name: "KL, rebuilt", meaning: "how far predictions move with the rebuilt activations, nats", show: plain },
  { key: "kl_zero", name: "KL, zeros", meaning: "how far they move with zeros", show: plain },
  { key: "n_tokens", name: "Tokens", meaning: "that the evaluation read", show: count },
  { key: "n_function_tokens", name: "Tokens for CE and KL", meaning: "of them with the model run to its end", show: count },
];

/** The metrics to show, the well-known ones first and explained. */
export function explain(metrics: Record<string, number>): Metric[] {
  const left = new Map(Object.entries(metrics).map(([key, value]) => [key.toLowerCase(), { key, value }]));
  const out: Metric[] = [];
  for (const { key, name, meaning, show, headline = false } of KNOWN) {
    const found = left.get(key);
    if (found === undefined) continue;
    out.push({ name, meaning, value: show(found.value), headline });
    left.delete(key);
  }
  for (const { key, value } of left.values()) {
    out.push({ name: key.replaceAll("_", " "), meaning: "", value: number(value), headline: false });
  }
  return out;
}
