"""The gRPC side of a server: the protocol's messages and its service."""
