"""HTTP: OpenAI routes, text in and out, limits, metrics. Knows the hub, never the engine."""
