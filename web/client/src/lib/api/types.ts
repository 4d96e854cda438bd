// Written by scripts/client_types.py from src/microtome/web/schemas.py. Do not edit.

/** `counts[i]` things lie between `edges[i]` and `edges[i + 1]`; one edge more than counts. */
export interface Histogram {
  edges: number[];
  counts: number[];
}

/** What was indexed: the model, the dictionary on it, the text, and how good the dictionary is. `layers`: the blocks that its features read, where these are several. */
export interface Summary {
  model: string;
  dictionary: string;
  hook_name: string;
  layers: number[];
  architecture: string;
  d_in: number;
  d_sae: number;
  k: number | null;
  dataset: string;
  n_tokens: number;
  n_sequences: number;
  context: number;
  n_alive: number;
  n_dead: number;
  metrics: Record<string, number>;
  density_histogram: Histogram;
  fingerprint: string;
  neuronpedia: string | null;
  provenance: Record<string, unknown>;
}

/** One line of the feature list. `density` is firings per token; `promotes` are the tokens it pushes up most; `layer` is the block that it reads, where features read different ones. */
export interface FeatureRow {
  feature: number;
  layer: number | null;
  count: number;
  n_sequences: number;
  density: number;
  mean: number;
  std: number;
  max: number;
  top_token: string | null;
  promotes: string[];
}

/** Rows `offset` to `offset + len(rows)` of the `total` that fit the filters. */
export interface FeaturePage {
  total: number;
  offset: number;
  rows: FeatureRow[];
}

/** A token and the feature's direct effect on its logit, per unit of activation. */
export interface Logit {
  token: string;
  value: number;
}

/** A feature whose decoder row points the same way. */
export interface Neighbour {
  feature: number;
  cosine: number;
  top_token: string | null;
}

/** One set of examples: the strongest (`band` −1), or a uniform sample of one stratum, where 0 is the weakest. `sampled` examples are kept, of `of` sequences whose peak lies in [low, high). */
export interface Band {
  kind: "top" | "sample";
  band: number;
  sampled: number;
  of: number;
  low: number;
  high: number;
}

/** Everything on a feature's page but its examples. `neuronpedia` is the address of its page there, if it has one. */
export interface Feature {
  row: FeatureRow;
  histogram: Histogram;
  top_logits: Logit[];
  bottom_logits: Logit[];
  neighbours: Neighbour[];
  encoder_norm: number;
  decoder_norm: number;
  bias: number;
  bands: Band[];
  neuronpedia: string | null;
}

/** A window of text. `activations[i]` belongs to `tokens[i]`; `peak` is the place of the strongest. */
export interface Example {
  value: number;
  band: number;
  sequence: number;
  position: number;
  start: number;
  peak: number;
  tokens: string[];
  token_ids: number[];
  activations: number[];
  document: string | null;
}

/** Examples `offset` to `offset + len(examples)` of the `total` stored ones of this kind and band. */
export interface ExamplePage {
  total: number;
  offset: number;
  examples: Example[];
}

/** A feature and how strongly it fires on one token. */
export interface Firing {
  feature: number;
  value: number;
}

/** A feature that fires somewhere in the text, with enough to recognise it. */
export interface FiredFeature {
  feature: number;
  layer: number | null;
  peak: number;
  at: number;
  n_tokens: number;
  max: number;
  density: number;
  top_token: string | null;
  promotes: string[];
}

/** The text's tokens, what fires on each (strongest first), and those features, the strongest in the text first. `skipped` tells how many leading tokens (the beginning-of-sequence token) are never counted. */
export interface Encoded {
  tokens: string[];
  firings: Firing[][];
  features: FiredFeature[];
  skipped: number;
  seconds: number;
}

/** A text to look at, and how many features to list for each token. */
export interface EncodeRequest {
  text: string;
  k?: number;
}

/** Whether texts can be encoded here. `reason` says why not, and what to do. */
export interface EncoderState {
  status: "ready" | "not loaded" | "loading" | "unavailable";
  reason: string | null;
  max_characters: number;
  max_tokens: number;
  waiting: number;
}

/** That the server is up, which index it serves, and whether it can encode. */
export interface Health {
  version: string;
  fingerprint: string;
  encoder: EncoderState;
}

/** An error. `message` is complete by itself; the other fields are its parts. */
export interface Problem {
  kind: string;
  message: string;
  what: string;
  got: string | null;
  expected: string | null;
  fix: string | null;
}
