"""What needs an engine: the Celery worker and the engines that render."""
