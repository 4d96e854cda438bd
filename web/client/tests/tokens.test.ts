import { expect, test } from "vitest";
import { broken, parts, quoted, visible } from "$lib/pure/tokens";

test("line ends and tabs are shown by marks", () => {
  expect(visible("a\r\nb\nc\td\re")).toBe("a↵b↵c→d␍e");
  expect(visible("<img src=x onerror=alert(1)>")).toBe("<img src=x onerror=alert(1)>");
});

test("a line breaks behind the mark, before what follows in the token", () => {
  expect([broken("\n"), broken(" ↵    "), broken("word"), broken("\n\n")]).toEqual(["↵\n", " ↵\n    ", "word", "↵\n↵\n"]);
});

test("outer spaces are drawn as boxes, inner ones stay", () => {
  expect(parts("  in it ")).toEqual({ before: "␣␣", text: "in it", after: "␣" });
  expect(quoted(" court")).toBe("␣court");
  expect(quoted("   ")).toBe("␣␣␣");
  expect(quoted("")).toBe("∅");
});
