/** The arithmetic of a virtual list: rows of one height, and only those in sight are made. */

export interface Slice {
  first: number;
  last: number; // one past the end
}

/** The rows to draw when the viewport shows `height` pixels from `top`, with `spare` rows above and below. */
export function visibleRows(top: number, height: number, rowHeight: number, total: number, spare = 8): Slice {
  if (total <= 0 || rowHeight <= 0) return { first: 0, last: 0 };
  const first = Math.max(0, Math.min(total, Math.floor(top / rowHeight)) - spare);
  const last = Math.min(total, Math.ceil((top + Math.max(height, 0)) / rowHeight) + spare);
  return { first, last: Math.max(first, last) };
}

/** The pages of `size` rows that hold `slice`. */
export function pagesOf(slice: Slice, size: number): number[] {
  if (slice.last <= slice.first) return [];
  const pages: number[] = [];
  for (let page = Math.floor(slice.first / size); page * size < slice.last; page++) pages.push(page);
  return pages;
}

/** The scroll offset that brings row `index` into sight with the least movement. */
export function scrollTo(index: number, top: number, height: number, rowHeight: number): number {
  const above = index * rowHeight;
  if (above < top) return above;
  if (above + rowHeight > top + height) return above + rowHeight - height;
  return top;
}
