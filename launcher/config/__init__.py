"""What you ask: the typed configuration, where each value came from, and the presets."""
