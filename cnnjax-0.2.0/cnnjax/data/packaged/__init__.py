"""What other programs keep in files and packages: fetched, verified, unpacked, read."""
