"""`python -m comfy.taco_dit.doctor`: whether this machine, this installation and this configuration can work, and how
to fix what cannot."""
