"""Data that packages of other programs hold: fetched by their own clients, verified, unpacked."""
