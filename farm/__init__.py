"""An asynchronous render farm for AI images: everything that runs without a GPU and without torch."""
