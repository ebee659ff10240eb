"""The demo model: procedurally drawn, captioned scenes, a tiny Flux that draws them, and a judge of its pictures."""
