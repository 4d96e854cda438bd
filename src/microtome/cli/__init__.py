"""Floor 8: the commands. Each is one module: options, one library call, and how its result is shown."""
