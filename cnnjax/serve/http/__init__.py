"""The HTTP side of a server: the protocol's routes, image files, the page."""
