/** Where the page is. `router.route` follows the address bar; `go` and `replace` move it; links work by themselves. */

import { formatRoute, parseRoute, type Route } from "$lib/pure/route";

class Router {
  route: Route = $state.raw(parseRoute(location.pathname, location.search));

  /** A new entry in the history: back returns to here. */
  go(address: string): void {
    history.pushState(null, "", address);
    this.#read();
    window.scrollTo(0, 0);
  }

  /** The same entry, told more exactly: for scroll positions and toggles that back should not undo one by one. */
  replace(route: Route): void {
    history.replaceState(history.state, "", formatRoute(route));
    this.#read();
  }

  /** Follow back, forward and every plain click on a link of this site. Returns the way to stop. */
  listen(): () => void {
    const moved = () => this.#read();
    const clicked = (event: MouseEvent) => this.#click(event);
    window.addEventListener("popstate", moved);
    document.addEventListener("click", clicked);
    return () => {
      window.removeEventListener("popstate", moved);
      document.removeEventListener("click", clicked);
    };
  }

  #read(): void {
    this.route = parseRoute(location.pathname, location.search);
  }

  #click(event: MouseEvent): void {
    if (event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    const link = event.target instanceof Element ? event.target.closest("a") : null;
    if (!link || link.origin !== location.origin || link.target || link.hasAttribute("download")) return;
    if (link.pathname.startsWith("/api/") || link.hash) return;
    event.preventDefault();
    this.go(link.pathname + link.search);
  }
}

export const router = new Router();
