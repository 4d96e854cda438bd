import { expect, test } from "vitest";
import { pagesOf, scrollTo, visibleRows } from "$lib/pure/window";

test("only the rows in sight are drawn, with a few to spare", () => {
  expect(visibleRows(0, 400, 40, 5000, 8)).toEqual({ first: 0, last: 18 });
  expect(visibleRows(4000, 400, 40, 5000, 8)).toEqual({ first: 92, last: 118 });
  expect(visibleRows(40 * 5000 - 400, 400, 40, 5000, 8)).toEqual({ first: 4982, last: 5000 });
});

test("odd sizes never draw what is not there", () => {
  expect(visibleRows(0, 400, 40, 0)).toEqual({ first: 0, last: 0 });
  expect(visibleRows(0, 400, 0, 10)).toEqual({ first: 0, last: 0 });
  expect(visibleRows(1e9, 400, 40, 100)).toEqual({ first: 92, last: 100 });
  expect(visibleRows(0, -5, 40, 3)).toEqual({ first: 0, last: 3 });
});

test("every visible row is in one of the pages", () => {
  expect(pagesOf({ first: 0, last: 0 }, 100)).toEqual([]);
  expect(pagesOf({ first: 95, last: 100 }, 100)).toEqual([0]);
  expect(pagesOf({ first: 95, last: 305 }, 100)).toEqual([0, 1, 2, 3]);
});

test("a row is brought into sight with the least movement", () => {
  expect(scrollTo(5, 0, 400, 40)).toBe(0);
  expect(scrollTo(10, 0, 400, 40)).toBe(40);
  expect(scrollTo(2, 400, 400, 40)).toBe(80);
});
