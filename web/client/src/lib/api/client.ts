/** The typed way to the server. Answers to GETs are kept for the life of the page: an index never changes while it is served. */

import type { ListState } from "$lib/pure/route";
import type { Encoded, ExamplePage, Feature, FeaturePage, Health, Problem, Summary } from "./types";

/** An error that the server explained, or that there was no server. `fix` says what to do, if that is known. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly fix: string | null = null,
  ) {
    super(message);
  }
}

const KEPT = 400;
const kept = new Map<string, Promise<unknown>>();

export function getSummary(): Promise<Summary> {
  return get("/api/summary");
}

export function getHealth(): Promise<Health> {
  return fetchJson("/api/health");
}

export function getFeature(id: number): Promise<Feature> {
  return get(`/api/features/${id}`);
}

export function getExamples(id: number, band: number | "top", offset: number, limit: number): Promise<ExamplePage> {
  const which = band === "top" ? "kind=top" : `kind=sample&band=${band}`;
  return get(`/api/features/${id}/examples?${which}&offset=${offset}&limit=${limit}`);
}

/** Rows `offset` to `offset + limit` of the list that `state` describes. */
export function getFeatures(state: ListState, offset: number, limit: number): Promise<FeaturePage> {
  const query = new URLSearchParams({ sort: state.sort, descending: String(state.descending) });
  const filters: [string, number | boolean | string | null][] = [
    ["min_density", state.minDensity],
    ["max_density", state.maxDensity],
    ["min_max", state.minMax],
    ["alive", state.alive],
    ["token", state.token || null],
    ["layer", state.layer],
  ];
  for (const [name, value] of filters) if (value !== null) query.set(name, String(value));
  query.set("offset", String(offset));
  query.set("limit", String(limit));
  return get(`/api/features?${query}`);
}

/** The features that fire on `text`. Not kept by the browser; a `signal` gives up on an answer that nobody waits for. */
export function encode(text: string, k: number, signal: AbortSignal): Promise<Encoded> {
  return fetchJson("/api/encode", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ text, k }),
    signal,
  });
}

function get<T>(address: string): Promise<T> {
  const known = kept.get(address);
  if (known) return known as Promise<T>;
  const answer = fetchJson<T>(address);
  kept.set(address, answer);
  answer.catch(() => kept.delete(address)); // an error is asked for again
  if (kept.size > KEPT) kept.delete(kept.keys().next().value!);
  return answer;
}

async function fetchJson<T>(address: string, options?: RequestInit): Promise<T> {
  let response: Response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError(0, "The workbench's server does not answer.", "Start it again with `microtome serve`, then reload this page.");
  }
  if (response.ok) return (await response.json()) as T;
  throw await explained(response);
}

async function explained(response: Response): Promise<ApiError> {
  try {
    const { error } = (await response.json()) as { error: Problem };
    return new ApiError(response.status, error.message, error.fix);
  } catch {
    return new ApiError(response.status, `The server answered with status ${response.status}.`);
  }
}
