"""Faster ways to make a network call that is ours from end to end: captured in a CUDA graph, compiled where asked for."""
