import { expect, test } from "vitest";
import { formatRoute, LIST_DEFAULTS, MAX_TEXT, parseRoute, searchAddress, type Route } from "$lib/pure/route";

function read(address: string): Route {
  const url = new URL(address, "http://localhost");
  return parseRoute(url.pathname, url.search);
}

const ROUTES: Route[] = [
  { page: "overview" },
  { page: "features", state: LIST_DEFAULTS },
  {
    page: "features",
    state: { sort: "max", descending: false, minDensity: 0.001, maxDensity: 0.5, minMax: 3, alive: null, token: " a&b=<i>%", layer: 12, row: 1200 },
  },
  { page: "features", state: { ...LIST_DEFAULTS, alive: false } },
  { page: "feature", state: { id: 12, band: "top", scale: "shared", breaks: false, page: 0 } },
  { page: "feature", state: { id: 0, band: 0, scale: "example", breaks: true, page: 3 } },
  { page: "text", state: { text: "", token: null, feature: null, order: "value" } },
  { page: "text", state: { text: "Zürich\n& 東京 🙂 +1", token: 0, feature: 99, order: "share" } },
];

test.each(ROUTES)("an address says everything: $page %#", (route) => {
  expect(read(formatRoute(route))).toEqual(route);
});

test("defaults are left out of the address", () => {
  expect(formatRoute({ page: "features", state: LIST_DEFAULTS })).toBe("/features");
  expect(searchAddress("court")).toBe("/features?token=court");
});

test("what cannot be understood falls back to the default", () => {
  expect(read("/features?sort=nonsense&min_density=-1&max_density=abc&row=1e9&alive=maybe")).toEqual({
    page: "features",
    state: LIST_DEFAULTS,
  });
  expect(read("/features/7?band=x&scale=y&page=-2")).toEqual({
    page: "feature",
    state: { id: 7, band: "top", scale: "shared", breaks: false, page: 0 },
  });
  expect(read("/features/abc")).toEqual({ page: "lost", path: "/features/abc" });
  expect(read("/features/12345678901")).toEqual({ page: "lost", path: "/features/12345678901" });
});

test("a text in the address is bounded", () => {
  const route = read(`/text?q=${"a".repeat(MAX_TEXT + 50)}`);
  expect(route.page === "text" && route.state.text.length).toBe(MAX_TEXT);
});
