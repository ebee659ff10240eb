"""Tiny autoencoders for previews."""
