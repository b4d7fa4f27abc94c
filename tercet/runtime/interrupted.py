"""The exception that ends an interrupted run, apart from everything that needs torch."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the state was saved at the last boundary."""
