"""The HTTP API: resources under /v1, health, metrics. Needs the extra `http`."""
