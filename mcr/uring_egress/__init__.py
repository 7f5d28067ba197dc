"""The worker: drains one interface's frames and sends them. Its C core does the work."""
