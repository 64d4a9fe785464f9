"""The engines, one module each; imported only in the engine's own process."""
