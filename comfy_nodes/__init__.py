"""The core nodes, by topic. `nodes` is where they are looked up."""
