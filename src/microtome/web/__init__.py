"""Floor 8: the workbench. A small HTTP server over a feature index, and the built client that it serves."""
