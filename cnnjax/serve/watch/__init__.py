"""Whether what a server sees and answers is still what its network was trained for."""
