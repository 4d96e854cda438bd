// Runs before the first paint, so that a chosen theme never flashes in the other one.
{
  const asked = new URLSearchParams(location.search).get("theme");
  let chosen = null;
  try {
    chosen = localStorage.getItem("theme");
  } catch {
    // storage is switched off: the system's theme it is
  }
  const theme = asked ?? chosen;
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
}
