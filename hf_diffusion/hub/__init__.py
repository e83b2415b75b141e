"""Loading from the Hub by the package's own classes, and pushing to it."""
