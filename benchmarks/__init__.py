"""Measurements of Microtome against its peers, each in one run with all sides in turn. `microtome bench NAME` runs them."""
