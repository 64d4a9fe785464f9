"""The demo model: a small text-to-image model of coloured shapes, its training and its judge."""
