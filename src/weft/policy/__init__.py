"""One folder a decision, one file an answer; `presets` combines them. Pure."""
