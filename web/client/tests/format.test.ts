import { expect, test } from "vitest";
import { brief, briefPercent, count, duration, number, oneIn, percent, plural, short, signed } from "$lib/pure/format";

test("numbers keep three significant digits", () => {
  expect([0, 4.5, 0.0123, 789, 1234.6, 12.345].map((v) => number(v))).toEqual(["0", "4.50", "0.0123", "789", "1,235", "12.3"]);
  expect(number(1.2e-7)).toBe("1.2e-7");
  expect(number(Number.NaN)).toBe("–");
  expect(number(null as unknown as number)).toBe("–");
  expect([brief(4.5), brief(10), brief(0.5)]).toEqual(["4.5", "10", "0.5"]);
  expect([signed(4.5), signed(-0.31)]).toEqual(["+4.5", "−0.31"]);
});

test("shares are told in percent and as one in so many", () => {
  expect([percent(0.00123), percent(0.25), percent(0)]).toEqual(["0.123%", "25.0%", "0%"]);
  expect(briefPercent(0.1)).toBe("10%");
  expect([oneIn(0), oneIn(0.9), oneIn(0.25), oneIn(0.00123)]).toEqual(["never", "every token", "1 token in 4", "1 token in 813"]);
});

test("counts", () => {
  expect(count(1234567)).toBe("1,234,567");
  expect([short(950), short(1000), short(1_234_567), short(2.5e9)]).toEqual(["950", "1k", "1.23M", "2.5B"]);
  expect([duration(0.1234), duration(7.26)]).toEqual(["123 ms", "7.3 s"]);
  expect([plural(1, "feature"), plural(2, "feature")]).toEqual(["1 feature", "2 features"]);
});
