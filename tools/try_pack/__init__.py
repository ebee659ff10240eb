"""Loads a node pack on one rank and on two, runs its nodes, and compares what they return. See `__main__`."""
