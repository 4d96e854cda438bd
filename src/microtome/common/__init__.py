"""Floor 0: errors, configs, artifacts, devices and seeds, progress. No word of models or features here."""
