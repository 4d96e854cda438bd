/** The URL is the state. Here an address becomes a route and a route an address; nothing else knows how they look. */

export const SORTS = ["density", "max", "mean", "std", "count", "n_sequences", "feature"] as const;
export type Sort = (typeof SORTS)[number];

export interface ListState {
  sort: Sort;
  descending: boolean;
  minDensity: number | null;
  maxDensity: number | null;
  minMax: number | null;
  alive: boolean | null;
  token: string;
  layer: number | null;
  row: number;
}

export interface FeatureState {
  id: number;
  band: number | "top";
  scale: "shared" | "example";
  breaks: boolean;
  page: number;
}

export interface TextState {
  text: string;
  token: number | null;
  feature: number | null;
  order: "value" | "share";
}

export type Route =
  | { page: "overview" }
  | { page: "features"; state: ListState }
  | { page: "feature"; state: FeatureState }
  | { page: "text"; state: TextState }
  | { page: "lost"; path: string };

/** The longest text that is kept in an address; the server takes no more either. */
export const MAX_TEXT = 2000;

export const LIST_DEFAULTS: ListState = {
  sort: "density", descending: true, minDensity: null, maxDensity: null,
  minMax: null, alive: true, token: "", layer: null, row: 0,
};

/** The route that an address names. Whatever it does not understand in the query falls back to the default. */
export function parseRoute(path: string, query: string): Route {
  const q = new URLSearchParams(query);
  if (path === "/" || path === "") return { page: "overview" };
  if (path === "/features" || path === "/features/") return { page: "features", state: parseList(q) };
  if (path === "/text" || path === "/text/") return { page: "text", state: parseText(q) };
  const feature = /^\/features\/(\d{1,9})\/?$/.exec(path);
  if (feature) return { page: "feature", state: parseFeature(Number(feature[1]), q) };
  return { page: "lost", path };
}

/** The address of a route; `parseRoute` reads it back to the same route. Defaults are left out. */
export function formatRoute(route: Route): string {
  switch (route.page) {
    case "overview":
      return "/";
    case "features":
      return address("/features", listQuery(route.state));
    case "feature":
      return address(`/features/${route.state.id}`, featureQuery(route.state));
    case "text":
      return address("/text", textQuery(route.state));
    case "lost":
      return route.path;
  }
}

/** The address of a feature's page as it opens first. */
export function featureAddress(id: number): string {
  return `/features/${id}`;
}

/** The address of the list of features with `token` among their strongest. */
export function searchAddress(token: string): string {
  return formatRoute({ page: "features", state: { ...LIST_DEFAULTS, token } });
}

function address(path: string, entries: [string, string][]): string {
  const query = new URLSearchParams(entries).toString();
  return query ? `${path}?${query}` : path;
}

function parseList(q: URLSearchParams): ListState {
  const sort = SORTS.find((name) => name === q.get("sort")) ?? LIST_DEFAULTS.sort;
  const alive = q.get("alive");
  return {
    sort,
    descending: q.get("order") === "up" ? false : true,
    minDensity: decimal(q.get("min_density")),
    maxDensity: decimal(q.get("max_density")),
    minMax: decimal(q.get("min_max")),
    alive: alive === "all" ? null : alive === "dead" ? false : true,
    token: (q.get("token") ?? "").slice(0, 100),
    layer: integer(q.get("layer")),
    row: integer(q.get("row")) ?? 0,
  };
}

function listQuery(state: ListState): [string, string][] {
  const out: [string, string][] = [];
  if (state.token) out.push(["token", state.token]);
  if (state.sort !== LIST_DEFAULTS.sort) out.push(["sort", state.sort]);
  if (!state.descending) out.push(["order", "up"]);
  if (state.minDensity !== null) out.push(["min_density", String(state.minDensity)]);
  if (state.maxDensity !== null) out.push(["max_density", String(state.maxDensity)]);
  if (state.minMax !== null) out.push(["min_max", String(state.minMax)]);
  if (state.layer !== null) out.push(["layer", String(state.layer)]);
  if (state.alive === null) out.push(["alive", "all"]);
  if (state.alive === false) out.push(["alive", "dead"]);
  if (state.row > 0) out.push(["row", String(state.row)]);
  return out;
}

function parseFeature(id: number, q: URLSearchParams): FeatureState {
  const band = integer(q.get("band"));
  return {
    id,
    band: band === null ? "top" : band,
    scale: q.get("scale") === "example" ? "example" : "shared",
    breaks: q.get("breaks") === "1",
    page: integer(q.get("page")) ?? 0,
  };
}

function featureQuery(state: FeatureState): [string, string][] {
  const out: [string, string][] = [];
  if (state.band !== "top") out.push(["band", String(state.band)]);
  if (state.page > 0) out.push(["page", String(state.page)]);
  if (state.scale !== "shared") out.push(["scale", state.scale]);
  if (state.breaks) out.push(["breaks", "1"]);
  return out;
}

function parseText(q: URLSearchParams): TextState {
  return {
    text: (q.get("q") ?? "").slice(0, MAX_TEXT),
    token: integer(q.get("token")),
    feature: integer(q.get("feature")),
    order: q.get("order") === "share" ? "share" : "value",
  };
}

function textQuery(state: TextState): [string, string][] {
  const out: [string, string][] = [];
  if (state.text) out.push(["q", state.text.slice(0, MAX_TEXT)]);
  if (state.token !== null) out.push(["token", String(state.token)]);
  if (state.feature !== null) out.push(["feature", String(state.feature)]);
  if (state.order !== "value") out.push(["order", state.order]);
  return out;
}

function decimal(text: string | null): number | null {
  if (text === null || text.trim() === "") return null;
  const value = Number(text);
  return Number.isFinite(value) && value >= 0 ? value : null;
}

function integer(text: string | null): number | null {
  return text !== null && /^\d{1,9}$/.test(text) ? Number(text) : null;
}
